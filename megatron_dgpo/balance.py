"""Which replica trains on which sequences, and which run through the model together.

Pure functions of lengths, so that whoever knows these makes the same plan. It cannot change the loss: that is a sum
over all tokens of an optimizer step divided by a count, wherever they are (`Policy.step`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence, Sized
from typing import TypeVar

from megatron_dgpo.weights.architectures import Architecture

T = TypeVar("T", bound=Sized)


def share_out(
    sequences: Sequence[T], cost: Callable[[T], float], replicas: int, budget: int, multiple_of: int = 1
) -> list[list[list[T]]]:
    """[replica][micro-batch][sequence] of one optimizer step.

    Replicas get about equal cost. All get the same number of micro-batches, a multiple of `multiple_of`, because their
    ranks meet in collectives; some may be empty. In each the longest sequences come last, so that those of one length
    are neighbours, which the portable attention serves at once. budget: most tokens of a micro-batch.
    """
    shares = [_pick(sequences, part) for part in partition([cost(s) for s in sequences], replicas)]
    plans = [fit([len(s) for s in share], budget, multiple_of) for share in shares]
    count = max(map(len, plans))
    plans = [
        plan if len(plan) == count else fit([len(s) for s in share], budget, count)
        for share, plan in zip(shares, plans, strict=True)
    ]
    return [[sorted(_pick(share, part), key=len) for part in plan] for share, plan in zip(shares, plans, strict=True)]


def partition(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices in `parts` lists of about equal cost: the largest differencing method (Karmarkar and Karp, 1982).

    >>> partition([8, 7, 6, 5, 4], 2)
    [[1, 3, 4], [0, 2]]
    """
    # A state fills all parts with some of the items, the fullest part first. The two states that are most uneven are
    # merged, what is full in one on what is empty in the other; ties by the first item, so that all make the same plan.
    states = []
    for index, value in enumerate(costs):
        states.append((-float(value), index, [(float(value), [index]), *[(0.0, [])] * (parts - 1)]))
    heapq.heapify(states)
    while len(states) > 1:
        (_, tie, full), (_, _, other) = heapq.heappop(states), heapq.heappop(states)
        joined = [(a + b, x + y) for (a, x), (b, y) in zip(full, reversed(other), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(states, (joined[-1][0] - joined[0][0], tie, joined))
    return [sorted(indices) for _, indices in states[0][2]] if states else [[] for _ in range(parts)]


def fit(lengths: Sequence[int], budget: int, multiple_of: int = 1) -> list[list[int]]:
    """Indices of sequences in micro-batches of about equal length and at most `budget` tokens, but for one that is
    longer by itself. As few as that takes, rounded up to a multiple of `multiple_of`, at least that many.

    >>> fit([5, 3, 3, 2], 8), fit([5, 3, 3, 2], 4, multiple_of=2), fit([], 4, multiple_of=2)
    ([[0, 3], [1, 2]], [[0], [1], [2], [3]], [[], []])
    """
    bins: list[list[int]] = []
    sizes: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((i for i, size in enumerate(sizes) if size + lengths[index] <= budget), None)
        if place is None:
            bins.append([index])
            sizes.append(lengths[index])
        else:
            bins[place].append(index)
            sizes[place] += lengths[index]
    count = -(-max(len(bins), 1) // multiple_of) * multiple_of
    balanced = partition(lengths, count)
    if all(len(part) <= 1 or sum(lengths[i] for i in part) <= budget for part in balanced):
        return balanced
    return bins + [[] for _ in range(count - len(bins))]


def sequence_cost(architecture: Architecture) -> Callable[[Sized], float]:
    """Multiplications of one layer for a sequence: those of its weights for each token, and attention's for each pair
    of a token and one before it."""
    weights = architecture.attention_weights + architecture.active_mlp_weights
    width = architecture.num_attention_heads * architecture.head_dim
    return lambda sequence: len(sequence) * (weights + width * len(sequence))


def _pick(items: Sequence[T], places: Sequence[int]) -> list[T]:
    return [items[place] for place in places]
