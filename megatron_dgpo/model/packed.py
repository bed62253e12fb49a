"""Micro-batches as Megatron's attention takes them: which queries of a pack meet which keys."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dgpo.config import Parallel
from megatron_dgpo.micro_batch import (
    ROTARY_TABLE_STEP,
    MicroBatch,
    TrainingSequence,
    num_positions,
    own_chunks,
    zigzag,
)
from megatron_dgpo.model.parallel import context_group, context_place


def pack_micro_batches(parts: Sequence[Sequence[TrainingSequence]], parallel: Parallel) -> list[MicroBatch]:
    """This rank's part of a micro-batch of each, on its device. Collectives: none.

    The messages of a pipeline have one size: there all micro-batches get the positions of the longest.
    """
    cp_rank, cp_size = context_place()
    step = positions_step(parallel)
    longest = max(num_positions(part, step, cp_size) for part in parts) if parallel.pipeline > 1 else None
    device = torch.cuda.current_device()
    return [
        MicroBatch.pack(part, step, positions=longest, cp_size=cp_size, cp_rank=cp_rank).to(device) for part in parts
    ]


def positions_step(parallel: Parallel) -> int:
    """What the positions of a micro-batch are a multiple of: cut for context parallelism, then for sequence
    parallelism."""
    cut = parallel.tensor if parallel.sequence else 1
    return math.lcm(2 * parallel.context, cut * parallel.context) if parallel.context > 1 else cut


class Run(NamedTuple):
    """Pieces that follow one another and are alike: one product serves them."""

    pieces: int
    queries: int
    """Of each."""
    keys: int


@dataclass(frozen=True)
class AttentionPlan:
    """What every layer of the portable attention does with one micro-batch.

    A piece of a sequence that this rank holds meets the keys of its sequence from the first to its own last: causal
    attention, aligned at the end. Without context parallelism a piece is a whole sequence.
    """

    queries: tuple[int, ...]
    """Positions of each piece."""
    keys: tuple[int, ...]
    """Keys that each piece meets."""
    cu_queries: torch.Tensor
    """[pieces + 1] int32, on the device: where the queries of each piece start."""
    cu_keys: torch.Tensor
    """[pieces + 1] int32, on the device: the same for its keys."""
    gathered: torch.Tensor | None
    """[Σ keys] int64: where the pieces' keys are among the T of all ranks, in rank order; None: in place."""
    cp_group: dist.ProcessGroup | None
    _masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def runs(self) -> list[Run]:
        if self.cu_queries.is_cuda:
            # There, in float32, a product keeps its masks: of one piece they are smallest.
            return [Run(1, *lengths) for lengths in zip(self.queries, self.keys, strict=True)]
        alike = itertools.groupby(zip(self.queries, self.keys, strict=True))
        return [Run(len(list(pieces)), *lengths) for lengths, pieces in alike]

    def mask(self, queries: int, keys: int, window: int | None) -> torch.Tensor | None:
        """[queries, keys] bool of a piece: what each query meets, itself and `window` - 1 or all keys before it.

        One for all layers, which keep it for their backward pass. None: plain causal attention.
        """
        width = min(window or keys, keys)
        if queries == keys == width:
            return None
        if (queries, keys, width) not in self._masks:
            device = self.cu_queries.device
            ahead = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            self._masks[queries, keys, width] = (ahead >= 0) & (ahead < width)
        return self._masks[queries, keys, width]

    @classmethod
    def of(
        cls,
        seqlens: Sequence[int],
        cp_size: int,
        cp_rank: int,
        cp_group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> AttentionPlan:
        """seqlens: of `MicroBatch`, before the cut."""
        if cp_size == 1:
            cu_seqlens = _starts(seqlens).to(device, non_blocking=True)
            return cls(tuple(seqlens), tuple(seqlens), cu_seqlens, cu_seqlens, None, None)
        held = np.concatenate([zigzag(seqlens, cp_size, rank) for rank in range(cp_size)])
        places = np.empty_like(held)
        places[held] = np.arange(len(held))
        queries, keys, gathered, start = [], [], [], 0
        for length in seqlens:
            chunk = length // (2 * cp_size)
            for number in own_chunks(cp_size, cp_rank):
                queries.append(chunk)
                keys.append((number + 1) * chunk)
                gathered.append(places[start : start + keys[-1]])
            start += length
        cu_queries, cu_keys = (_starts(lengths).to(device, non_blocking=True) for lengths in (queries, keys))
        indices = torch.from_numpy(np.concatenate(gathered)).to(device, non_blocking=True)
        return cls(tuple(queries), tuple(keys), cu_queries, cu_keys, indices, cp_group)


class PackedAttentionParams(PackedSeqParams):
    """Megatron's, with the plan that the portable attention follows."""

    attention_plan: AttentionPlan


def packed_seq_params(batches: Sequence[MicroBatch], portable: bool) -> PackedAttentionParams:
    """Of micro-batches one after the other.

    portable: for the portable layers, which follow the plan; Megatron alone reads the boundaries there, on the host,
    for rotary angles. Transformer Engine makes its own plan of boundaries on the device.
    """
    device = batches[0].tokens.device
    seqlens = [length for batch in batches for length in batch.seqlens]
    cu_seqlens = _starts(seqlens).to("cpu" if portable else device, non_blocking=True)
    longest = -(-max(seqlens) // ROTARY_TABLE_STEP) * ROTARY_TABLE_STEP
    # A table as long as the pack Megatron takes for one of positions that run through the whole of it.
    longest += ROTARY_TABLE_STEP if longest == sum(seqlens) else 0
    # Padding is a part of its sequence for the kernels: it comes last, and nothing real looks at what comes later. Four
    # times the same tensor: Transformer Engine tells by identity that nothing lies between sequences.
    params = PackedAttentionParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if portable:
        cp_rank, cp_size = context_place()
        params.attention_plan = AttentionPlan.of(seqlens, cp_size, cp_rank, context_group(), device)
    return params


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    """[len + 1] int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
