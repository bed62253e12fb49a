"""Megatron's random number generators work on this device, and can be put back."""

import pytest
import torch

from megatron_dgpo import launcher, process
from megatron_dgpo.cluster import Node
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


@pytest.mark.parametrize("gpus, own, expected", [(False, None, None), (True, None, "1"), (True, "8", "8")])
def test_queues_of_a_rank_s_gpu(tmp_path, monkeypatch, gpus, own, expected):
    """CUDA_DEVICE_MAX_CONNECTIONS: one for ranks on GPUs, unless the user's environment says otherwise."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if own:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", own)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    started = []
    monkeypatch.setattr(
        process, "start", lambda name, command, environment, *args, **kwargs: started.append(environment)
    )
    launcher._start_rank(0, Node.here(tmp_path), 1, ("127.0.0.1", 1), ["sft", "config"], [], "secret")
    assert started[0].get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
