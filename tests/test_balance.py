"""Who trains on what: every sequence once, at equal cost, under the budget, and as many micro-batches everywhere."""

import itertools
import random

import pytest

from megatron_dgpo.balance import fit, partition, sequence_cost, share_out
from megatron_dgpo.weights.architectures import Architecture
from tools import simulate_balance

TINY = Architecture("qwen3", 4, 64, 96, 4, 2, 32, 131, False, False, True, 1e-6, 1e4, None, 256, None)


def skewed(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [min(4000, 20 + int(draw.lognormvariate(5, 1))) for _ in range(count)]


@pytest.mark.parametrize("replicas", [1, 2, 8, 64])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_shares(replicas, multiple_of):
    sequences = [range(length) for length in skewed(16 * replicas)]
    cost = sequence_cost(TINY)
    shares = share_out(sequences, cost, replicas, 1024, multiple_of)
    assert len(shares) == replicas
    assert sorted(map(len, itertools.chain(*itertools.chain(*shares)))) == sorted(map(len, sequences))
    [count] = {len(share) for share in shares}
    assert count % multiple_of == 0
    for micro_batch in itertools.chain(*shares):
        assert sum(map(len, micro_batch)) <= 1024 or len(micro_batch) == 1
    costs = [sum(cost(s) for s in itertools.chain(*share)) for share in shares]
    mean = sum(costs) / replicas
    assert max(costs) <= max(1.02 * mean, max(map(cost, sequences)))


def test_the_same_plan_whoever_makes_it():
    """Ties, of which equal lengths make many, are broken by place."""
    lengths = [7, 7, 7, 3, 3, 3, 3, 7]
    assert partition(lengths, 3) == partition(list(lengths), 3)
    sequences = [range(length) for length in lengths]
    assert share_out(sequences, len, 2, 10) == share_out(list(sequences), len, 2, 10)


@pytest.mark.parametrize("seed", range(200))
def test_as_few_micro_batches_as_first_fit_needs(seed):
    draw = random.Random(seed)
    budget = draw.randint(1, 60)
    lengths = [draw.randint(1, 40) for _ in range(draw.randint(0, 40))]
    parts = fit(lengths, budget)
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in part) <= budget or len(part) == 1 for part in parts)
    # First-fit never leaves two bins that would go together, so all but one are more than half full.
    assert len(parts) <= 2 * sum(min(n, budget) for n in lengths) // budget + 1


def test_more_replicas_than_sequences():
    """Some have nothing but empty micro-batches, as many as the others have."""
    shares = share_out([range(30), range(20)], len, 4, 8)
    assert sorted(map(len, itertools.chain(*shares))) == [0, 0, 1, 1]
    assert {len(share) for share in shares} == {1}


@pytest.mark.parametrize("minibatches, replicas", [(1, 64), (4, 16), (4, 64)])
def test_simulated_steps_take_little_longer_than_an_even_split(minibatches, replicas):
    found = simulate_balance.ratios(replicas, minibatches, draws=3)
    assert 1 <= found["balanced"] <= 1.02
    assert found["in a pipeline"] <= 1.15
    assert found["padded"] > 4
