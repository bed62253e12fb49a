"""Packing and its cut over context-parallel ranks: Transformer Engine's layout, and nothing lost or met twice."""

import random

import numpy as np
import pytest
import torch

from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence, zigzag
from megatron_dgpo.model.packed import AttentionPlan


def random_sequences(draw: random.Random, count: int) -> list[TrainingSequence]:
    found = []
    for _ in range(count):
        prompt, response = draw.randint(1, 9), draw.randint(0, 30)
        tokens = [draw.randint(1, 99) for _ in range(prompt + response)]
        logprobs = [-draw.random() for _ in range(response)]
        found.append(TrainingSequence.of(tokens[:prompt], tokens[prompt:], draw.random(), logprobs))
    return found


def transformer_engine_index(token: int, cu_seqlens: list[int], rank: int, world_size: int) -> int:
    """`thd_partition_indices_kernel` of Transformer Engine's context_parallel.cu, its arithmetic alone: where the
    token at `token` of a rank's part was before the cut."""
    cut = [end // world_size for end in cu_seqlens]
    sequence = next(i for i in range(len(cut) - 1) if cut[i] <= token < cut[i + 1])
    size = cut[sequence + 1] - cut[sequence]
    index = token - cut[sequence]
    offset = rank if index < size // 2 else (world_size - 1) * 2 - rank
    return index + cut[sequence] * world_size + size // 2 * offset


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_zigzag_is_transformer_engine_s(cp_size):
    draw = random.Random(cp_size)
    for _ in range(1000):
        seqlens = [2 * cp_size * draw.randint(1, 12) for _ in range(draw.randint(1, 8))]
        cu_seqlens = np.cumsum([0, *seqlens]).tolist()
        rank = draw.randrange(cp_size)
        found = zigzag(seqlens, cp_size, rank)
        theirs = [transformer_engine_index(i, cu_seqlens, rank, cp_size) for i in range(cu_seqlens[-1] // cp_size)]
        assert found.tolist() == theirs


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("multiple_of", [8, 24])
def test_ranks_together_hold_every_sequence(cp_size, multiple_of):
    draw = random.Random(7)
    for _ in range(50):
        sequences = random_sequences(draw, draw.randint(0, 6))
        parts = [MicroBatch.pack(sequences, multiple_of, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]
        responses = np.concatenate([s.response for s in sequences] or [np.zeros(0, np.int32)])
        sampled = np.concatenate([s.generator_logprobs for s in sequences] or [np.zeros(0, np.float32)])
        assert parts[0].num_positions % multiple_of == 0
        targets, logprobs = np.full_like(responses, -1), np.full_like(sampled, 1)
        for part in parts:
            assert part.tokens.shape[1] * cp_size == part.num_positions
            index = part.response_index.numpy()
            # Whoever predicts a token holds the one before it, in its own sequence.
            for place, target, ids in zip(part.predicts, part.targets, part.response_ids, strict=True):
                sequence = sequences[ids]
                whole = [*sequence.prompt, *sequence.response]
                position = part.position_ids[0, place].item()
                assert part.tokens[0, place] == whole[position] and target == whole[position + 1]
            assert (targets[index] == -1).all(), "a token is predicted twice"
            targets[index], logprobs[index] = part.targets.numpy(), part.generator_logprobs.numpy()
        assert np.array_equal(targets, responses) and np.array_equal(logprobs, sampled)
        assert [part.counts_responses for part in parts] == [True] + [False] * (cp_size - 1)
        assert parts[0].cu_responses.diff().tolist() == [len(s.response) for s in sequences]


def test_what_does_not_fit_is_refused():
    sequence = TrainingSequence.of([1, 2, 3], [4, 5])
    with pytest.raises(ValueError, match="5 tokens do not fit 4 positions"):
        MicroBatch.pack([sequence], 2, positions=4)
    with pytest.raises(ValueError, match="not a multiple of the 4 chunks"):
        MicroBatch.pack([sequence], 2, cp_size=2)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_a_query_meets_its_sequence_up_to_itself(cp_size, window):
    """Every (query, key) pair that the plan of some rank allows, and no other, is in one sequence and causal."""
    draw = random.Random(cp_size)
    seqlens = [2 * cp_size * draw.randint(1, 5) for _ in range(4)]
    held = [zigzag(seqlens, cp_size, rank) for rank in range(cp_size)]
    gathered = np.concatenate(held)
    found = set()
    for rank in range(cp_size):
        plan = AttentionPlan.of(seqlens, cp_size, rank, None, torch.device("cpu"))
        assert sum(plan.queries) == len(held[rank])
        places = gathered if plan.gathered is None else gathered[plan.gathered.numpy()]
        for piece, (queries, keys) in enumerate(zip(plan.queries, plan.keys, strict=True)):
            mask = plan.mask(queries, keys, window)
            if mask is None:
                mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            mine = held[rank][sum(plan.queries[:piece]) :][:queries]
            theirs = places[sum(plan.keys[:piece]) :][:keys]
            found |= {(int(mine[q]), int(theirs[k])) for q, k in mask.nonzero().tolist()}
    ends = np.cumsum(seqlens)
    expected = {
        (q, k)
        for start, end in zip(ends - seqlens, ends, strict=True)
        for q in range(start, end)
        for k in range(start, q + 1)
        if window is None or q - k < window
    }
    assert found == expected
