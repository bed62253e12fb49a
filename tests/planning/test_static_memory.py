"""Weights, gradients and optimizer state: the formula's bytes are what Megatron allocates, on every rank's stage."""

import itertools
import math

import pytest

from megatron_dgpo.config import Parallel
from megatron_dgpo.layout import Layout
from megatron_dgpo.planning.memory import reference_weights, static_memory
from megatron_dgpo.planning.plan import workload_of
from megatron_dgpo.planning.sides import TrainerSide
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.weights.architectures import read_architecture
from tests.layouts import make_config
from tests.ranks import run_ranks
from tools.tiny_models import make_tiny_model

# Head dimension 32 and 131 tokens: parameters of 32 elements, and buffers whose ends need padding.
SHAPES = [
    *(dict(tensor=t, data=d) for t, d in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 3))),
    *(dict(pipeline=2, data=d, chunks_per_stage=v) for d in (1, 2) for v in (1, 2)),
    dict(tensor=2, pipeline=2),
    dict(pipeline=4),
    dict(context=2),
    *(dict(context=2, **more) for more in (dict(data=2), dict(tensor=2), dict(pipeline=2))),
]
MIXTURE_SHAPES = [
    dict(expert=2, data=2),
    dict(expert=2, data=4),
    dict(tensor=2, sequence=True, expert=2, data=2),
    dict(pipeline=2, expert=2, data=2),
    dict(context=2, expert=2),
]
DTYPES = ("float32", "bfloat16")
# Whether its head is its embedding.
FAMILIES = {"qwen3": False, "qwen2": True, "qwen3_moe": False}


def settings() -> list[tuple[str, dict, str]]:
    """(family, parallel, dtype) of every layout that is compared."""
    found = []
    dense = itertools.product(("qwen3", "qwen2"), SHAPES, DTYPES)
    for family, shape, dtype in (*dense, *itertools.product(("qwen3_moe",), MIXTURE_SHAPES, DTYPES)):
        for sharded in (False, True) if shape.get("data", 1) * shape.get("context", 1) > 1 else (False,):
            found.append((family, {**shape, "distributed_optimizer": sharded}, dtype))
    return found


def world_size(parallel: dict) -> int:
    return math.prod(parallel.get(name, 1) for name in ("tensor", "pipeline", "data", "context"))


def allocated(model_dir, parallel, dtype):
    """This rank's stage and the bytes of its weights, gradients and optimizer after one step."""
    import torch
    from megatron.core import parallel_state

    from megatron_dgpo.micro_batch import TrainingSequence
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.packed import pack_micro_batches
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.sft import mean_negative_logprob

    init_device()
    config = make_config(model_dir, parallel, model={"dtype": dtype})
    initialize_parallel(config.parallel, 1)
    policy = Policy(config, read_architecture(model_dir), 1)
    with torch.no_grad():
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.fill_(0.01)
    policy.reload_master_weights()
    # The moments exist after the first step.
    sequence = TrainingSequence.of([5, 6], [7, 8, 9, 10])
    result = policy.step(pack_micro_batches([[sequence]] * 4, config.parallel), mean_negative_logprob(131))
    assert not result.skipped
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in policy.modules for p in m.parameters()
    }
    buffers = [buffer for chunk in policy.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        sum(storages.values()),
        gradients,
        sum(_optimizer_bytes(optimizer) for optimizer in optimizers),
    )


def _optimizer_bytes(optimizer) -> int:
    """Moments and master copies, without the counters of steps."""
    moments = (t for state in optimizer.optimizer.state.values() for name, t in state.items() if name != "step")
    masters = getattr(optimizer, "fp32_from_float16_groups", None)
    masters = masters or getattr(optimizer, "shard_fp32_from_float16_groups", [])
    return sum(t.nbytes for t in moments) + sum(t.nbytes for group in masters for t in group)


def cases() -> list[tuple[str, int]]:
    """(family, ranks)"""
    return sorted({(family, world_size(parallel)) for family, parallel, _ in settings()})


@pytest.mark.parametrize("family, world", cases())
def test_bytes_equal_megatrons(family, world, tmp_path):
    model_dir = make_tiny_model(tmp_path / family, family, tie_word_embeddings=FAMILIES[family])
    layouts = [item for item in settings() if (item[0], world_size(item[1])) == (family, world)]
    sizes = Sizes(read_architecture(model_dir))
    for _, parallel, dtype in layouts:
        ranks = run_ranks(allocated, world, model_dir, parallel, dtype)
        layout = Layout.from_config(Parallel(**parallel))
        for stage in range(layout.pipeline):
            found = [rank[1:] for rank in ranks if rank[0] == stage]
            e = 2 if dtype == "bfloat16" else 4
            expected = static_memory(sizes, stage, layout, parallel["distributed_optimizer"], e)
            where = f"{family} {parallel} {dtype} stage {stage}"
            assert {(w, g) for w, g, _ in found} == {(expected.weights, expected.gradients)}, where
            assert max(o for _, _, o in found) == expected.optimizer, where


def frozen(model_dir, parallel):
    """This rank's stage and the bytes of all frozen models' weights."""
    from megatron.core import parallel_state

    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.reference import Reference

    init_device()
    config = make_config(model_dir, parallel, algorithm=BEYOND)
    initialize_parallel(config.parallel, 1)
    reference = Reference(config, read_architecture(model_dir))
    models = [model for model in (reference._model, reference._start) if model]
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for model in models
        for module in model.modules
        for p in module.parameters()
    }
    return parallel_state.get_pipeline_model_parallel_rank(), sum(storages.values())


BEYOND = {"credit": "none", "teacher": 1.0, "teacher_extrapolation": 1.25}


@pytest.mark.parametrize("parallel", [dict(), dict(tensor=2), dict(pipeline=2)])
def test_bytes_of_a_second_frozen_model_are_counted(parallel, tmp_path):
    model_dir = make_tiny_model(tmp_path / "qwen2", "qwen2", tie_word_embeddings=True)
    config, world = make_config(model_dir, parallel, algorithm=BEYOND), world_size(parallel)
    trainer, work = TrainerSide.from_config(config.parallel, world), workload_of(config, 8, 8)
    for stage, found in run_ranks(frozen, world, model_dir, parallel):
        assert found == reference_weights(Sizes(read_architecture(model_dir)), work, trainer, stage)


def test_enough_layouts():
    assert len(settings()) >= 40
