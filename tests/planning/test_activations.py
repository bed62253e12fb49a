"""Activations that layers keep for the backward pass, against what autograd saves in a real forward pass.

On a CPU PyTorch composes a norm of smaller operations, which keep more (`kernels="composite"`); that and only that
differs from a GPU, whose kernels this test cannot run.
"""

import pytest

from megatron_dgpo.planning.memory import activations, chunk_activations, layer_activations
from megatron_dgpo.planning.sides import TrainerSide, Workload
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.weights.architectures import read_architecture
from tests.layouts import make_config
from tests.ranks import run_ranks
from tools.tiny_models import make_tiny_model

MODELS = {
    "qwen3": dict(num_hidden_layers=2),
    "wide qwen2": dict(num_hidden_layers=2, hidden_size=128, intermediate_size=512, num_attention_heads=8),
    "llama": dict(num_hidden_layers=2, num_key_value_heads=4),
    "qwen3_moe": dict(num_hidden_layers=2),
}
PARALLEL = ({}, {"tensor": 2}, {"tensor": 2, "sequence": True})
RECOMPUTE = ("none", "selective", "full")
# Rows and length of a micro-batch.
SHAPES = ((1, 64), (3, 32))


def saved_bytes(model_dir, parallel, model, rows, length):
    """Bytes of unique storages that autograd keeps after a forward pass of this rank's layers, parameters left out."""
    import torch

    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.parallel import initialize_parallel

    init_device()
    config = make_config(model_dir, parallel, model=model)
    initialize_parallel(config.parallel, 1)
    architecture = read_architecture(model_dir)
    [chunk] = build_chunks(config, architecture)
    chunk.train()
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_(std=0.1)
    share = config.parallel.tensor if config.parallel.sequence else 1
    dtype = getattr(torch, config.model.dtype)
    hidden = torch.randn(length // share, rows, architecture.hidden_size, dtype=dtype, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # An address must not be used again while it is being counted.
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=chunk.rotary_pos_emb(length))
    return sum(kept.values())


def expected_bytes(sizes, parallel, model, rows, length):
    """The decoder's layers and its final norm."""
    side = TrainerSide(
        parallel.get("tensor", 1),
        1,
        1,
        sequence=parallel.get("sequence", False),
        recompute=model["recompute"],
        micro_batch=rows,
    )
    e = 2 if model["dtype"] == "bfloat16" else 4
    mine = rows * length / (side.tensor if side.sequence else 1)
    layers = chunk_activations(sizes, sizes.layers, rows, length, side, e, "composite")
    return layers + 8 * mine * sizes.h + 4 * mine


@pytest.mark.parametrize("name", MODELS)
def test_within_a_tenth_of_what_autograd_saves(name, tmp_path):
    model_dir = make_tiny_model(tmp_path / "model", name.split()[-1], **MODELS[name])
    sizes = Sizes(read_architecture(model_dir))
    errors = []
    for world in (1, 2):
        cases = [
            (parallel, {"dtype": dtype, "recompute": recompute}, *shape)
            for parallel in PARALLEL
            for dtype in ("float32", "bfloat16")
            for recompute in RECOMPUTE
            for shape in SHAPES
            if parallel.get("tensor", 1) == world
            # A mixture needs sequence parallelism beside tensor parallelism.
            and not (sizes.experts and world > 1 and not parallel.get("sequence"))
        ]
        for case in cases:
            found = run_ranks(saved_bytes, world, model_dir, *case)
            expected = expected_bytes(sizes, *case)
            # Experts' shares are uneven: the formula is the mean over ranks.
            errors.append(abs(sum(found) / world / expected - 1))
            assert errors[-1] < 0.1, f"{name} {case}"
    print(f"{name}: {len(errors)} cases, largest difference {max(errors):.1%}")
    assert len(errors) >= 24


def test_stages_hold_what_the_schedule_starts():
    """1F1B: stage i of p holds p − i micro-batches; interleaving adds (p − 1)/(p·v) to the first ([K], §4.2.3)."""
    architecture = _eight_layers()
    sizes, work = Sizes(architecture), Workload(64, 4, 64, 64, 64, 192)
    one = layer_activations(sizes, 1, 256, TrainerSide(1, 4, 1), 2)
    for chunks, first in ((1, 4 * 2), (2, (1 + 3 / 8) * 8)):
        side = TrainerSide(1, 4, 1, chunks)
        assert activations(sizes, work, side, 0)["activations"] == pytest.approx(first * one)
    stages = [activations(sizes, work, TrainerSide(1, 4, 1), stage)["activations"] / one / 2 for stage in range(3)]
    assert stages == [4, 3, 2]


def _eight_layers():
    from dataclasses import replace

    from megatron_dgpo.weights.architectures import Architecture

    tiny = Architecture("qwen3", 4, 64, 96, 4, 2, 32, 131, False, False, True, 1e-6, 1e4, None, 256, None)
    return replace(tiny, num_layers=8)
