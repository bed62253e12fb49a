"""Megatron's random number generators work on this device, and can be put back."""

import pytest
import torch

from tests.ranks import run_ranks


def draws(parallel):
    """Per rank: numbers of the default generator and of the tensor-parallel one, drawn twice from one saved state."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_dgpo.config import Parallel
    from megatron_dgpo.model.device import init_device, peak_memory_bytes
    from megatron_dgpo.model.parallel import initialize_parallel

    device = init_device()
    initialize_parallel(Parallel(**parallel), seed=5)
    tracker = get_cuda_rng_tracker()
    # As a checkpoint saves and restores them.
    states = torch.cuda.get_rng_state(), tracker.get_states()

    def draw():
        default = torch.rand(4, device=device).tolist()
        with tracker.fork():
            split = torch.rand(4, device=device).tolist()
        return default, split

    first = draw()
    moved_on = draw()
    torch.cuda.set_rng_state(states[0])
    tracker.set_states(states[1])
    assert moved_on != first
    assert draw() == first
    assert peak_memory_bytes() > 0
    return first


@pytest.mark.parametrize("axis", ["tensor", "data"])
def test_generators(axis):
    (default, split), (other_default, other_split) = run_ranks(draws, 2, {"tensor": 2} if axis == "tensor" else {})
    # Tensor-parallel ranks draw alike outside the split parts of a layer and differently inside; replicas draw alike.
    assert default == other_default
    assert (split == other_split) == (axis == "data")
