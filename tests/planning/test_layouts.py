"""Legality: what the planner calls legal builds; what it refuses, the trainer, Megatron-Core or vLLM refuses."""

import itertools

import pytest

from megatron_dgpo.errors import UsageError
from megatron_dgpo.planning.layout import RolloutSide, TrainerSide, Workload, refusal, rollout_refusal, trainer_sides
from megatron_dgpo.weights.architectures import check_layout, read_architecture
from tests.layouts import make_config
from tests.ranks import run_ranks
from tools.tiny_models import make_tiny_model

WORLD = 4
# Beyond any rule of preflight's on step sizes.
WORK = Workload(16, 2, 8, 8, 8, 8)


def model_dirs(folder):
    """Four heads and two key/value heads; six layers so that pipelines of 2 and 3 fit and 4 does not."""
    return {
        "qwen3": make_tiny_model(folder / "dense", "qwen3", num_hidden_layers=6),
        "qwen3_moe": make_tiny_model(folder / "mixture", "qwen3_moe", num_hidden_layers=6),
    }


def candidates(architecture) -> list[TrainerSide]:
    """Everything a hand could write for four ranks, sensible or not."""
    found = []
    for tensor, pipeline, chunks, expert, sequence in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2, 3), (1, 2, 4) if architecture.num_experts else (1, 2), (False, True)
    ):
        if WORLD % (tensor * pipeline) == 0:
            data = WORLD // tensor // pipeline
            found.append(TrainerSide(tensor, pipeline, data, chunks, expert, sequence))
    return found


def try_to_build(model_dir, side):
    """None, or why this rank could not run one forward pass."""
    try:
        _build(model_dir, side)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _build(model_dir, side):
    import torch

    from megatron_dgpo.batch import Batch
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import run_schedule
    from megatron_dgpo.weights.architectures import read_architecture

    init_device()
    config = make_config(model_dir, side.parallel().model_dump())
    architecture = read_architecture(model_dir)
    # Not check_layout: what it forbids is to fail by itself here.
    initialize_parallel(config.parallel, 1)
    chunks = build_chunks(config, architecture)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.01)
        batch = Batch.from_sequences([[5, 6]] * 4, [[7, 8, 9, 10]] * 4, multiple_of=4)
        run_schedule(chunks, batch.split(1), lambda batch, index, states, head: states.sum())


@pytest.mark.parametrize("family", ("qwen3", "qwen3_moe"))
def test_legal_layouts_build_and_run(family, tmp_path):
    model_dir = model_dirs(tmp_path)[family]
    architecture = read_architecture(model_dir)
    legal = [side for side in candidates(architecture) if refusal(architecture, side, WORK, 8) is None]
    assert len(legal) >= 8
    for side in legal:
        assert run_ranks(try_to_build, WORLD, model_dir, side) == [None] * WORLD, side


@pytest.mark.parametrize("family", ("qwen3", "qwen3_moe"))
def test_refused_layouts_are_refused_by_the_trainer(family, tmp_path):
    """By check_layout, which every command calls, or when the process groups are made."""
    model_dir = model_dirs(tmp_path)[family]
    architecture = read_architecture(model_dir)
    left = []
    for side in candidates(architecture):
        if refusal(architecture, side, WORK, 8) is None:
            continue
        try:
            check_layout(architecture, side.parallel(), model_dir)
            left.append(side)
        except UsageError:
            pass
    assert len(left) < len(candidates(architecture)) / 2
    for side in left:
        assert all(run_ranks(try_to_build, WORLD, model_dir, side)), side


def test_step_sizes_are_refused_as_preflight_refuses_them(tmp_path):
    from megatron_dgpo.preflight import _check_step_sizes

    architecture = read_architecture(model_dirs(tmp_path)["qwen3"])
    compared = set()
    for prompts, group, minibatches, rows, chunks, data in itertools.product(
        (4, 6, 8), (1, 3), (1, 2, 4), (1, 2, 4), (1, 3), (1, 2, 4)
    ):
        work = Workload(prompts, group, 8, 8, 8, 8, minibatches)
        side = TrainerSide(1, 2, data, chunks, micro_batch=rows)
        config = make_config(
            tmp_path,
            side.parallel().model_dump(),
            rollout={"prompts_per_step": prompts, "group_size": group},
            batch={"minibatches": minibatches, "micro_batch_size": rows},
        )
        try:
            _check_step_sizes(config, data)
            accepted = True
        except UsageError:
            accepted = False
        assert (refusal(architecture, side, work, 8) is None) == accepted, (work, side)
        compared.add(accepted)
    assert compared == {True, False}


def test_vllm_refuses_what_the_planner_refuses():
    """vLLM's own functions on the sizes of its layers: heads, key/value heads, intermediate size, vocabulary."""
    from dataclasses import replace

    from vllm.distributed.utils import divide
    from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size as padded

    from megatron_dgpo.weights.architectures import Architecture

    base = Architecture("qwen3", 4, 64, 96, 4, 2, 32, 131, False, False, True, 1e-6, 1e4, None, 256, None)
    compared = set()
    for heads, groups, ffn, tensor in itertools.product((4, 12, 40), (1, 2, 4), (96, 100), (1, 2, 3, 4, 5, 8)):
        if heads % groups:
            continue
        architecture = replace(base, num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=ffn)
        try:
            divide(heads, tensor)
            # QKVParallelLinear: key/value heads are divided, or copied to an equal number of workers each.
            divide(max(groups, tensor), min(groups, tensor))
            divide(ffn, tensor)
            divide(padded(architecture.vocab_size), tensor)
            accepted = True
        except AssertionError:
            accepted = False
        assert (rollout_refusal(architecture, RolloutSide(tensor, 1, False), 8) is None) == accepted
        compared.add(accepted)
    assert compared == {True, False}


def test_search_leaves_no_legal_layout_out(tmp_path):
    """Up to the recomputation and placement of one it lists."""
    architecture = read_architecture(model_dirs(tmp_path)["qwen3_moe"])
    listed = {
        (s.tensor, s.pipeline, s.data, s.chunks, s.expert, s.sequence)
        for s, reason in trainer_sides(architecture, WORK, WORLD, 8)
        if reason is None
    }
    legal = {
        (s.tensor, s.pipeline, s.data, s.chunks, s.expert, s.sequence)
        for s in candidates(architecture)
        if refusal(architecture, s, WORK, 8) is None
    }
    assert legal <= listed
