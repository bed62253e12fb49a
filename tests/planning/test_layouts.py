"""Legality: what the planner calls legal builds; what it refuses, the trainer, Megatron-Core or vLLM refuses."""

import itertools
import random

import pytest

from megatron_dgpo import legality
from megatron_dgpo.config import Batching, Config, Parallel, Rollout, Servers
from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.planning.plan import sides_of, workload_of
from megatron_dgpo.planning.sides import RolloutSide, TrainerSide, Workload, refusal, rollout_refusal, trainer_sides
from megatron_dgpo.preflight import check_layout
from megatron_dgpo.weights.architectures import FAMILIES, Architecture, Family, read_architecture
from tests.layouts import make_config
from tests.ranks import run_ranks
from tools.scaling.models import shape
from tools.tiny_models import make_tiny_model

WORLD = 4
# Beyond any rule of preflight's on step sizes.
WORK = Workload(16, 2, 8, 8, 8, 32768)


def model_dirs(folder):
    """Four heads and two key/value heads; six layers so that pipelines of 2 and 3 fit and 4 does not."""
    return {
        "qwen3": make_tiny_model(folder / "dense", "qwen3", num_hidden_layers=6),
        "qwen3_moe": make_tiny_model(folder / "mixture", "qwen3_moe", num_hidden_layers=6),
    }


def candidates(architecture) -> list[TrainerSide]:
    """Everything a hand could write for four ranks, sensible or not."""
    found = []
    for tensor, pipeline, context, chunks, expert, sequence in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2, 3), (1, 2, 4) if architecture.num_experts else (1, 2), (False, True)
    ):
        if WORLD % (tensor * pipeline * context) == 0:
            data = WORLD // tensor // pipeline // context
            found.append(TrainerSide(tensor, pipeline, data, chunks, expert, sequence, context))
    return found


def try_to_build(model_dir, side):
    """None, or why this rank could not run one forward pass."""
    try:
        _build(model_dir, side)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _build(model_dir, side):
    import torch

    from megatron_dgpo.micro_batch import TrainingSequence
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.packed import pack_micro_batches
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import run_schedule
    from megatron_dgpo.weights.architectures import read_architecture

    init_device()
    config = make_config(model_dir, side.parallel().model_dump())
    architecture = read_architecture(model_dir)
    # Without legality.py's rules: what they forbid is to fail by itself here.
    initialize_parallel(config.parallel, 1)
    chunks = build_chunks(config, architecture)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.01)
        sequence = TrainingSequence.of([5, 6], [7, 8, 9, 10])
        micro_batches = pack_micro_batches([[sequence]] * 4, config.parallel)
        run_schedule(chunks, micro_batches, lambda batch, states, head: states.sum())


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
    """By the rules that every command goes through, or when the process groups are made."""
    model_dir = model_dirs(tmp_path)[family]
    architecture = read_architecture(model_dir)
    left = []
    for side in candidates(architecture):
        if refusal(architecture, side, WORK, 8) and not legality.first(legality.of_model(architecture, side, "it")):
            left.append(side)
    assert len(left) < len(candidates(architecture)) / 2
    for side in left:
        assert all(run_ranks(try_to_build, WORLD, model_dir, side)), side


def test_step_sizes_are_refused_as_preflight_refuses_them(tmp_path):
    architecture = read_architecture(model_dirs(tmp_path)["qwen3"])
    compared = set()
    for prompts, group, minibatches, chunks, data in itertools.product((4, 6, 8), (1, 3), (1, 2, 4), (1, 3), (1, 2, 4)):
        work = Workload(prompts, group, 8, 8, 8, 8, minibatches)
        side = TrainerSide(1, 2, data, chunks)
        config = make_config(
            tmp_path,
            side.parallel().model_dump(),
            rollout={"prompts_per_step": prompts, "group_size": group},
            batch={"minibatches": minibatches},
        )
        try:
            check_layout("train", config, architecture, side)
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
        assert (rollout_refusal(architecture, RolloutSide(tensor), 8) is None) == accepted
        compared.add(accepted)
    assert compared == {True, False}


def test_search_leaves_no_legal_layout_out(tmp_path):
    """Up to the recomputation and placement of one it lists."""
    architecture = read_architecture(model_dirs(tmp_path)["qwen3_moe"])
    listed = {s.layout for s, reason in trainer_sides(architecture, WORK, WORLD, 8) if reason is None}
    legal = {s.layout for s in candidates(architecture) if refusal(architecture, s, WORK, 8) is None}
    assert legal <= listed


def random_architecture(family: Family, draw: random.Random) -> Architecture:
    """Of a size that something divides."""
    groups, layers = draw.choice((1, 2, 3, 4)), draw.choice((4, 6, 12))
    heads, ffn, vocab = groups * draw.choice((1, 2, 4)), draw.choice((96, 100)), draw.choice((131, 320))
    experts = (draw.choice((4, 6, 8)), 2, draw.choice((96, 100))) if family.expert_ffn else (0, 0, 0)
    return shape(family.name, layers, 64, ffn, heads, groups, vocab, experts=experts)


def random_config(base: Config, draw: random.Random) -> tuple[Config, int]:
    """With the number of ranks it is to run on."""
    tensor, pipeline, replicas = (draw.choice((1, 1, 2, 2, 3, 4)) for _ in range(3))
    context = draw.choice((1, 1, 2, 3))
    parallel = Parallel(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        chunks_per_stage=draw.choice((1, 1, 2, 3)),
        expert=draw.choice((1, 1, 1, 2, 4)),
        data=draw.choice((None, replicas)),
        sequence=draw.random() < (0.9 if tensor > 1 else 0.1),
    )
    rollout = Rollout(prompts_per_step=draw.choice((4, 8, 12, 24)), group_size=draw.choice((1, 3, 4)))
    servers = Servers(
        tensor=draw.choice((1, 1, 2, 3, 5)),
        count=draw.choice((1, 2)),
        expert_parallel=draw.random() < 0.2,
    )
    batch = Batching(minibatches=draw.choice((1, 1, 2, 3)))
    update = {"parallel": parallel, "rollout": rollout, "servers": servers, "batch": batch}
    return base.model_copy(update=update), tensor * pipeline * context * replicas


@pytest.mark.parametrize("family", FAMILIES)
def test_planner_and_preflight_never_disagree(family, tmp_path):
    """On 1,000 random layouts: they accept the same, and say the same of what they refuse.

    Machines are as large as the job: that tensor parallelism stays inside one is a rule of the planner alone.
    """
    draw, base, accepted = random.Random(family), make_config(tmp_path), 0
    for _ in range(1000):
        architecture = random_architecture(FAMILIES[family], draw)
        config, ranks = random_config(base, draw)
        try:
            check_layout("train", config, architecture, Layout.from_config(config.parallel, ranks))
            found = None
        except UsageError as error:
            found = str(error)
        gpus = ranks + ServerLayout.from_config(config.servers).num_workers
        trainer, rollout = sides_of(config, gpus, gpus)
        planned = refusal(architecture, trainer, workload_of(config, 8, 8), gpus, str(tmp_path))
        planned = planned or rollout_refusal(architecture, rollout, gpus)
        assert found == planned, (architecture, config)
        accepted += found is None
    assert 30 < accepted < 970
