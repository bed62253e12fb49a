"""The planner's micro-batches, against those that the trainer makes of drawn lengths."""

import math
import random

import pytest

from megatron_dgpo.balance import sequence_cost, share_out
from megatron_dgpo.planning.hardware import GPUS, Cluster
from megatron_dgpo.planning.sides import BUDGETS, TrainerSide, Workload, budgets, contexts, micro_batches
from megatron_dgpo.planning.step_time import attention_pairs, imbalance, update_time
from tools.scaling.models import sizes_of

SIZES = sizes_of("Qwen2.5-7B")
WORKS = [
    Workload(64, 16, 200, 2000, 1024, 8192),
    Workload(64, 16, 200, 4000, 1024, 20480, minibatches=2),
    Workload(32, 16, 150, 3101, 200, 3896),
    Workload(32, 8, 100, 2000, 100, 2000),
]


def drawn(work: Workload, draw: random.Random) -> list[range]:
    """Sequences of an optimizer step; a range has a length, and that is all the trainer's plan looks at."""
    number = work.rows // work.minibatches
    return [
        range(work.prompt_tokens + round(work.max_response_tokens * draw.random() ** (1 / work.exponent)))
        for _ in range(number)
    ]


@pytest.mark.parametrize("work", WORKS, ids=range(len(WORKS)))
def test_lengths_have_the_moments_that_formulas_use(work):
    lengths = work.lengths(4096)
    assert sum(lengths) / 4096 == pytest.approx(work.mean_tokens, rel=2e-3)
    assert sum(length**2 for length in lengths) / 4096 == pytest.approx(work.mean_square_tokens, rel=2e-3)
    draw = random.Random(1)
    longest = [max(map(len, drawn(work, draw))) for _ in range(20)]
    assert sum(longest) / 20 == pytest.approx(work.longest_of(work.rows / work.minibatches), rel=0.01)


@pytest.mark.parametrize("data, pipeline, chunks, context", ((4, 1, 1, 1), (2, 4, 1, 1), (4, 4, 2, 1), (2, 2, 1, 2)))
@pytest.mark.parametrize("budget", BUDGETS[:3])
@pytest.mark.parametrize("work", WORKS, ids=range(len(WORKS)))
def test_as_many_and_as_long_as_the_trainers(work, budget, data, pipeline, chunks, context):
    side = TrainerSide(1, pipeline, data, chunks, context=context, micro_batch_tokens=budget)
    found, rounds = micro_batches(work, side), pipeline if chunks > 1 else 1
    draw, cost = random.Random(budget), sequence_cost(SIZES.architecture)
    counts, longest = [], []
    for _ in range(3):
        shares = share_out(drawn(work, draw), cost, data, budget * context, rounds)
        counts.append(len(shares[0]))
        longest.append(max(sum(map(len, part)) for share in shares for part in share))
    assert found.count % rounds == 0
    assert found.count == pytest.approx(sum(counts) / 3, rel=0.08, abs=max(1, rounds / 2))
    assert found.most >= max(longest)
    if pipeline > 1:
        assert found.positions == pytest.approx(sum(longest) / 3, rel=0.08)
    else:
        assert found.positions == found.tokens
    assert found.count * found.sequences * data == pytest.approx(work.rows / work.minibatches)


def test_a_budget_below_the_longest_sequence_is_legal_and_counted():
    work = WORKS[1]
    assert micro_batches(work, TrainerSide(micro_batch_tokens=4096)).most == work.context
    assert micro_batches(work, TrainerSide(micro_batch_tokens=4096, context=8)).most == 8 * 4096


def test_budgets_and_contexts_that_are_tried():
    work = WORKS[1]
    assert contexts(work, 24) == [1, 2, 4] and contexts(WORKS[3], 24) == [1]
    assert budgets(work, TrainerSide()) == [16384] and budgets(work, TrainerSide(context=4)) == [4096]
    assert budgets(work, TrainerSide(pipeline=2)) == [16384, 32768, 65536]


def test_context_parallelism_shares_what_replicas_cannot():
    """Eight sequences over eight replicas: the longest alone is as slow as most. Over two ranks each it is not."""
    work, cluster = Workload(8, 1, 200, 2000, 1024, 32768, reference=False), Cluster(GPUS["h100"], 8)
    alone, shared = (TrainerSide(data=8 // context, context=context) for context in (1, 2))
    assert imbalance(SIZES, work, alone) > 1.5 * imbalance(SIZES, work, shared)
    assert update_time(SIZES, work, alone, cluster).total > 1.5 * update_time(SIZES, work, shared, cluster).total
    # Work that replicas do share is divided, too, and keys travel.
    work = WORKS[0]
    alone, shared = (TrainerSide(data=8 // context, context=context) for context in (1, 2))
    pairs = [micro_batches(work, side).count * attention_pairs(work, side) for side in (alone, shared)]
    assert math.isclose(*pairs)
    times = [update_time(SIZES, work, side, cluster) for side in (alone, shared)]
    assert times[0].compute == pytest.approx(times[1].compute, rel=1e-6) and times[0].network < times[1].network
