"""Whole sequences packed end to end, which run through the model together, and a context-parallel rank's part of them.

Layout, that of Transformer Engine: a sequence is padded at its end to a multiple of 2·cp and cut into as many chunks;
rank r holds chunks r and 2·cp − 1 − r of each sequence, which together meet as many keys on every rank. What predicts
what is found before the cut, so that no rank needs its neighbour's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt with its response on the host, as it travels between replicas; int32 and float32 arrays."""

    prompt: np.ndarray
    response: np.ndarray
    advantage: float = 0.0
    generator_logprobs: np.ndarray | None = None
    """What the engine that sampled the response reported for its tokens."""
    counted: bool = True
    """Whether it has a loss and is in the normaliser."""
    lags: np.ndarray | None = None
    """int32, of each of its tokens: versions that the weights that made it were behind the policy; None: none."""
    key: tuple[int, int] = (0, 0)
    """Position of its group in the run's order of prompts, and its place in the group."""

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        response: Sequence[int],
        advantage: float = 0.0,
        generator_logprobs: Sequence[float] | None = None,
        counted: bool = True,
        lags: Sequence[int] | None = None,
        key: tuple[int, int] = (0, 0),
    ) -> TrainingSequence:
        sampled = None if generator_logprobs is None else np.asarray(generator_logprobs, np.float32)
        behind = None if lags is None else np.asarray(lags, np.int32)
        tokens = np.asarray(prompt, np.int32), np.asarray(response, np.int32)
        return cls(*tokens, advantage, sampled, counted, behind, key)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class MicroBatch:
    """B sequences in T positions, of which this context-parallel rank holds T / cp, predicting N of M response tokens.

    Without context parallelism N = M and all is as it was before the cut. All tensors are on one device and the same on
    every tensor-parallel rank and pipeline stage.

    Example: B = 2, T = 6, N = M = 3.

    >>> batch = MicroBatch.pack([TrainingSequence.of([1, 2, 3], [7], 1.0), TrainingSequence.of([4], [8, 9], -1.0)],
    ...                         multiple_of=6)
    >>> batch.tokens.tolist(), batch.position_ids.tolist(), batch.seqlens
    ([[1, 2, 3, 7, 4, 8, 9, 0, 0, 0, 0, 0]], [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]], (4, 3, 5))
    >>> batch.targets.tolist(), batch.response_ids.tolist(), batch.cu_responses.tolist()
    ([7, 8, 9], [0, 1, 1], [0, 1, 3])

    A token is predicted by the state before it. With states that are their own positions, [T, 1, 1]:

    >>> batch.predicting(torch.arange(12).view(12, 1, 1)).flatten().tolist()
    [2, 4, 5]

    Over two ranks a sequence of three tokens is padded to four and cut into as many; each predicts one token.

    >>> sequence = TrainingSequence.of([4], [8, 9])
    >>> parts = [MicroBatch.pack([sequence], 4, cp_size=2, cp_rank=rank) for rank in (0, 1)]
    >>> [part.tokens.tolist() for part in parts], [part.targets.tolist() for part in parts]
    ([[[4, 0]], [[8, 9]]], [[8], [9]])
    """

    tokens: torch.Tensor
    """[1, T / cp] int64."""
    position_ids: torch.Tensor
    """[1, T / cp] int64: of each token in its own sequence."""
    predicts: torch.Tensor
    """[N] int64: places among T / cp whose next token is a response token."""
    targets: torch.Tensor
    """[N] int64: those tokens."""
    response_index: torch.Tensor
    """[N] int64: their places among the M response tokens of the micro-batch, in the order of its sequences."""
    response_ids: torch.Tensor
    """[N] int64: the sequence that each belongs to."""
    generator_logprobs: torch.Tensor
    """[N] float32; 0 where no engine reported any."""
    lags: torch.Tensor
    """[N] int64: versions that the weights that sampled were behind the policy that is trained."""
    advantages: torch.Tensor
    """[B] float32."""
    counted: torch.Tensor
    """[B] bool: which responses have a loss and are in the normaliser."""
    cu_responses: torch.Tensor
    """[B + 1] int64: where each response starts among the M response tokens."""
    seqlens: tuple[int, ...]
    """Padded lengths before the cut, on the host; a last one of padding alone is no sequence. T is their sum."""
    num_response_tokens: int
    """M."""
    counts_responses: bool = True
    """Whether what belongs to a whole response is this rank's to count: of those that share it, the first's."""
    reference_states: torch.Tensor | None = None
    """The reference's, on the last pipeline stage alone: [⌈N / tp⌉, H], this tensor-parallel rank's (`Reference`)."""
    old_logprobs: torch.Tensor | None = None
    """[N] float32: of the policy before the step's first update (`Objective.freeze`)."""
    deviation: torch.Tensor | None = None
    """[N] float32, of that policy, where credit is."""
    reference_logprobs: torch.Tensor | None = None
    """[N] float32, kept instead of the reference's states."""
    start_logprobs: torch.Tensor | None = None
    """[N] float32: of the model that the student started from, where a teacher is extrapolated."""
    credit: torch.Tensor | None = None
    """[M] float32, scored by that policy; the same on every context-parallel rank."""
    tau: torch.Tensor | None = None
    """[B] float32, of that credit, where every response has its own."""

    @classmethod
    def pack(
        cls,
        sequences: Sequence[TrainingSequence],
        multiple_of: int = 1,
        *,
        positions: int | None = None,
        cp_size: int = 1,
        cp_rank: int = 0,
    ) -> MicroBatch:
        """T is the least multiple of `multiple_of` that holds the sequences, or `positions`, where that is one.

        multiple_of: a multiple of 2·cp under context parallelism. No sequence is a legal micro-batch, too: of padding.
        """
        seqlens = _padded_lengths(sequences, multiple_of, cp_size)
        used = sum(seqlens)
        positions = positions or num_positions(sequences, multiple_of, cp_size)
        if positions < used or positions % multiple_of:
            raise ValueError(f"{used} tokens do not fit {positions} positions, a multiple of {multiple_of}")
        seqlens += [positions - used] if positions > used else []
        tokens: np.ndarray = np.zeros(positions, np.int64)
        # Of the token that follows, where that is a response token: which, where among them, whose, how likely.
        following, index, ids = np.zeros_like(tokens), np.full_like(tokens, -1), np.zeros_like(tokens)
        sampled, behind = np.zeros_like(tokens, np.float32), np.zeros_like(tokens)
        starts = np.cumsum([0, *(len(sequence.response) for sequence in sequences)])
        start = 0
        for place, (sequence, padded) in enumerate(zip(sequences, seqlens, strict=False)):
            tokens[start : start + len(sequence)] = np.concatenate([sequence.prompt, sequence.response])
            predicting = slice(start + len(sequence.prompt) - 1, start + len(sequence) - 1)
            following[predicting] = sequence.response
            index[predicting] = np.arange(starts[place], starts[place + 1])
            ids[predicting] = place
            if sequence.generator_logprobs is not None:
                sampled[predicting] = sequence.generator_logprobs
            if sequence.lags is not None:
                behind[predicting] = sequence.lags
            start += padded
        mine = zigzag(seqlens, cp_size, cp_rank)
        predicts = np.flatnonzero(index[mine] >= 0)
        before_cut = mine[predicts]
        return cls(
            torch.from_numpy(tokens[mine])[None],
            torch.from_numpy(np.concatenate([np.arange(length) for length in seqlens])[mine])[None],
            torch.from_numpy(predicts),
            torch.from_numpy(following[before_cut]),
            torch.from_numpy(index[before_cut]),
            torch.from_numpy(ids[before_cut]),
            torch.from_numpy(sampled[before_cut]),
            torch.from_numpy(behind[before_cut]),
            torch.tensor([sequence.advantage for sequence in sequences], dtype=torch.float32),
            torch.tensor([sequence.counted for sequence in sequences], dtype=torch.bool),
            torch.from_numpy(starts),
            tuple(seqlens),
            int(starts[-1]),
            cp_rank == 0,
        )

    def __len__(self) -> int:
        """B."""
        return len(self.advantages)

    @property
    def num_positions(self) -> int:
        """T."""
        return sum(self.seqlens)

    def to(self, device: torch.device | int) -> MicroBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {n: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for n, v in values.items()}
        return MicroBatch(**moved)

    def predicting(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T / cp, 1, H] final hidden states -> [N, H]: for each response token, the state that predicts it."""
        return hidden_states[:, 0][self.predicts]


ROTARY_TABLE_STEP = 1024
"""Megatron keeps a table of rotary angles for each of the last 32 lengths that it was asked for; these are rounded."""


def with_known(micro_batches: list[MicroBatch], found: list[dict[str, torch.Tensor | None]]) -> list[MicroBatch]:
    """The same with each one's fields in `found`, which is empty on all pipeline stages but the last."""
    known: list[dict[str, Any]] = found or [{}] * len(micro_batches)  # type: ignore[assignment]
    return [replace(batch, **tensors) for batch, tensors in zip(micro_batches, known, strict=True)]


def num_positions(sequences: Sequence[TrainingSequence], multiple_of: int, cp_size: int) -> int:
    """T of `MicroBatch.pack`."""
    return _round_up(max(sum(_padded_lengths(sequences, multiple_of, cp_size)), 1), multiple_of)


def _padded_lengths(sequences: Sequence[TrainingSequence], multiple_of: int, cp_size: int) -> list[int]:
    chunks = 2 * cp_size if cp_size > 1 else 1
    if multiple_of % chunks:
        raise ValueError(f"multiple_of={multiple_of} is not a multiple of the {chunks} chunks of a sequence")
    return [_round_up(len(sequence), chunks) for sequence in sequences]


def own_chunks(cp_size: int, cp_rank: int) -> tuple[int, int]:
    """Numbers, of the 2·cp chunks of a sequence, of the two that a context-parallel rank holds."""
    return cp_rank, 2 * cp_size - 1 - cp_rank


def zigzag(seqlens: Sequence[int], cp_size: int, cp_rank: int) -> np.ndarray:
    """[T / cp] int64: the positions before the cut that a context-parallel rank holds, in its order.

    seqlens: multiples of 2·cp. Source: Transformer Engine, `thd_get_partitioned_indices`.
    """
    if cp_size == 1:
        return np.arange(sum(seqlens))
    parts, start = [], 0
    for length in seqlens:
        chunk = length // (2 * cp_size)
        for number in own_chunks(cp_size, cp_rank):
            parts.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return np.concatenate(parts)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
