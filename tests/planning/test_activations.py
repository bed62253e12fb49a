"""Activations that layers keep for the backward pass, against what autograd saves in a real forward pass.

The portable layers on a CPU keep more than Transformer Engine's (`kernels="composite"`): norms and rotation composed of
smaller operations, and under context parallelism the keys of other ranks. Only in that does the formula differ from a
GPU's, whose kernels this test cannot run.
"""

import itertools

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
PARALLEL = (
    {},
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"context": 2},
    {"context": 2, "tensor": 2, "sequence": True},
)
RECOMPUTE = ("none", "selective", "full")
# Tokens of a micro-batch's sequences, which no layout has to pad.
PACKS = ((64,), (24, 40, 8, 56))


def saved_bytes(model_dir, parallel, cases):
    """[case] bytes of unique storages that autograd keeps after a forward pass of this rank's layers. Left out are
    parameters and what all layers share: the table of angles, the places of gathered keys, and masks."""
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel

    init_device()
    initialize_parallel(make_config(model_dir, parallel).parallel, 1)
    return [_saved_bytes(make_config(model_dir, parallel, model=model), lengths) for model, lengths in cases]


def _saved_bytes(config, lengths):
    import torch

    from megatron_dgpo.micro_batch import TrainingSequence
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.packed import pack_micro_batches, packed_seq_params

    architecture = read_architecture(config.model.path)
    [chunk] = build_chunks(config, architecture)
    chunk.train()
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_(std=0.1)
    sequences = [TrainingSequence.of([1] * (length // 2), [2] * (length // 2)) for length in lengths]
    [batch] = pack_micro_batches([sequences], config.parallel)
    assert batch.num_positions == sum(lengths)
    params = packed_seq_params([batch], portable=True)
    angles = chunk.rotary_pos_emb(params.max_seqlen_q, packed_seq=True)
    plan = params.attention_plan
    shared = [angles, *chunk.parameters(), *([] if plan.gathered is None else [plan.gathered])]
    shared = {tensor.untyped_storage().data_ptr() for tensor in shared}
    masks = set(zip(plan.queries, plan.keys, strict=True))
    share = config.parallel.tensor if config.parallel.sequence else 1
    positions, dtype = batch.tokens.shape[1], getattr(torch, config.model.dtype)
    hidden = torch.randn(positions // share, 1, architecture.hidden_size, dtype=dtype, requires_grad=True)
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared and not (tensor.shape[-2:] in masks and tensor.grad_fn is None):
            kept[storage.data_ptr()] = storage.nbytes()
        # An address must not be used again while it is being counted.
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk.decoder(hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=params)
    return sum(kept.values())


def expected_bytes(sizes, parallel, model, lengths):
    """The decoder's layers and its final norm."""
    side = TrainerSide(**{"tensor": 1, **parallel}, recompute=model["recompute"])
    e = 2 if model["dtype"] == "bfloat16" else 4
    n = sum(lengths) / side.context
    mine = n / (side.tensor if side.sequence else 1)
    return chunk_activations(sizes, sizes.layers, n, side, e, "composite") + 8 * mine * sizes.h + 4 * mine


@pytest.mark.parametrize("name", MODELS)
def test_within_three_hundredths_of_what_autograd_saves(name, tmp_path):
    model_dir = make_tiny_model(tmp_path / "model", name.split()[-1], **MODELS[name])
    sizes = Sizes(read_architecture(model_dir))
    kinds = itertools.product(("float32", "bfloat16"), RECOMPUTE, PACKS)
    cases = [({"dtype": dtype, "recompute": recompute}, lengths) for dtype, recompute, lengths in kinds]
    errors = {}
    for parallel in PARALLEL:
        if sizes.experts and parallel.get("tensor") and not parallel.get("sequence"):
            # A mixture needs sequence parallelism beside tensor parallelism.
            continue
        world = parallel.get("tensor", 1) * parallel.get("context", 1)
        ranks = run_ranks(saved_bytes, world, model_dir, parallel, cases)
        for case, *found in zip(cases, *ranks, strict=True):
            # Experts' shares are uneven: the formula is the mean over ranks.
            errors[str((parallel, *case))] = expected_bytes(sizes, parallel, *case) / (sum(found) / world) - 1
    print(f"{name}: {len(errors)} cases, largest difference {max(map(abs, errors.values())):.1%}")
    assert len(errors) >= 48
    assert {case: error for case, error in errors.items() if abs(error) > 0.03} == {}


def test_stages_hold_what_the_schedule_starts():
    """1F1B: stage i of p holds p − i micro-batches; interleaving adds (p − 1)/(p·v) to the first ([K], §4.2.3)."""
    architecture = _eight_layers()
    sizes, work = Sizes(architecture), Workload(256, 4, 64, 64, 64, 192)
    one = layer_activations(sizes, 8192, TrainerSide(1, 4, 1), 2)
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
