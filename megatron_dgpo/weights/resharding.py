"""Which bytes go from which trainer rank to which vLLM worker: exactly each worker's own shard, once.

The plan follows from the two layouts alone, so that every rank and every worker works out its own part of it. Replicas
of a slice share the sending evenly.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.slices import Slice, shard_slices

# vLLM pads its vocabulary to a multiple of this before it splits it (DEFAULT_VOCAB_PADDING_SIZE).
_VLLM_VOCAB_MULTIPLE = 64
_CHECKSUM_PERIOD = 65521


@dataclass(frozen=True)
class TrainerLayout:
    """How Megatron numbers its ranks: tensor parallel fastest, then data, then pipeline."""

    tensor: int
    pipeline: int
    chunks_per_stage: int
    data: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def rank(self, tensor: int, pipeline: int, data: int) -> int:
        return tensor + self.tensor * (data + self.data * pipeline)

    def stage(self, architecture: Architecture, name: str) -> int:
        """Pipeline stage that holds a Megatron parameter (global layer number)."""
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            per_chunk = architecture.num_layers // (self.pipeline * self.chunks_per_stage)
            return int(parts[2]) // per_chunk % self.pipeline
        return 0 if name.startswith("embedding.") else self.pipeline - 1


@dataclass(frozen=True)
class VllmLayout:
    """Workers are numbered server by server."""

    tensor: int
    servers: int

    @property
    def num_workers(self) -> int:
        return self.tensor * self.servers


@dataclass(frozen=True)
class Move:
    """`target.narrow(dim, target_start, length)` of a worker becomes `source.narrow(dim, source_start, length)`."""

    rank: int
    """Trainer rank that sends."""
    worker: int
    source: str
    """Megatron parameter, with its global layer number."""
    source_start: int
    target: str
    """vLLM parameter."""
    target_start: int
    dim: int
    length: int
    shape: tuple[int, ...]
    """Of the piece."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def vllm_parameters(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """vLLM parameter -> (how its workers split it, Hugging Face tensors): q, k, v and gate, up are fused."""
    return {
        sources[0].replace(".q_proj.", ".qkv_proj.").replace(".gate_proj.", ".gate_up_proj."): (split, *sources)
        for split, *sources in architecture.parameters.values()
    }


def vllm_shape(architecture: Architecture, name: str, tp_size: int) -> tuple[int, ...]:
    """Of one worker's shard."""
    split, *sources = vllm_parameters(architecture)[name]
    shape = list(architecture.hf_shapes[sources[0]])
    if split == "vocab":
        shape[0] = _vllm_vocab_rows(architecture, tp_size)
    elif split != "copy":
        last = vllm_slices(architecture, name, 0, tp_size)[-1]
        shape[last.dim] = last.local_start + last.length
    return tuple(shape)


def vllm_slices(architecture: Architecture, name: str, tp_rank: int, tp_size: int) -> list[Slice]:
    """The blocks that make up one worker's shard of vLLM parameter `name`."""
    split, *sources = vllm_parameters(architecture)[name]
    shapes = [architecture.hf_shapes[source] for source in sources]
    if split == "copy":
        return [Slice(sources[0], 0, 0, 0, shapes[0][0])]
    if split == "row":
        length = shapes[0][1] // tp_size
        return [Slice(sources[0], 1, tp_rank * length, 0, length)]
    if split == "vocab":
        rows = _vllm_vocab_rows(architecture, tp_size)
        length = min(rows, architecture.vocab_size - tp_rank * rows)
        return [Slice(sources[0], 0, tp_rank * rows, 0, length)] if length > 0 else []
    if split == "gate_up":
        length = shapes[0][0] // tp_size
        return [Slice(source, 0, tp_rank * length, i * length, length) for i, source in enumerate(sources)]
    query = shapes[0][0] // tp_size
    # With more workers than key/value heads each head is on several of them.
    copies = max(1, tp_size // architecture.num_query_groups)
    key = shapes[1][0] * copies // tp_size
    starts = (tp_rank * query, tp_rank // copies * key, tp_rank // copies * key)
    places = (0, query, query + key)
    return [
        Slice(source, 0, start, place, length)
        for source, start, place, length in zip(sources, starts, places, (query, key, key), strict=True)
    ]


def _vllm_vocab_rows(architecture: Architecture, tp_size: int) -> int:
    return -(-architecture.vocab_size // _VLLM_VOCAB_MULTIPLE) * _VLLM_VOCAB_MULTIPLE // tp_size


def plan_moves(architecture: Architecture, trainer: TrainerLayout, vllm: VllmLayout) -> list[Move]:
    """Every worker's shards, each byte from one rank, in the order of the model's parameters."""
    holders = _holders(architecture, trainer)
    sent: dict[int, int] = defaultdict(int)
    moves = []
    for target in vllm_parameters(architecture):
        for worker in range(vllm.num_workers):
            for wanted in vllm_slices(architecture, target, worker % vllm.tensor, vllm.tensor):
                for held, source, ranks in holders[wanted.name]:
                    first, last = (
                        max(wanted.start, held.start),
                        min(wanted.start + wanted.length, held.start + held.length),
                    )
                    if first >= last:
                        continue
                    shape = list(architecture.hf_shapes[wanted.name])
                    shape[wanted.dim] = last - first
                    rank = min(ranks, key=lambda rank: (sent[rank], rank))
                    sent[rank] += math.prod(shape)
                    moves.append(
                        Move(
                            rank,
                            worker,
                            source,
                            held.local_start + first - held.start,
                            target,
                            wanted.local_start + first - wanted.start,
                            wanted.dim,
                            last - first,
                            tuple(shape),
                        )
                    )
    return moves


def _holders(architecture: Architecture, trainer: TrainerLayout) -> dict[str, list[tuple[Slice, str, list[int]]]]:
    """Hugging Face tensor -> [(block of it, Megatron parameter, ranks that hold the block there)]."""
    ranks: dict[tuple[Slice, str], list[int]] = defaultdict(list)
    for name in architecture.parameters:
        stage = trainer.stage(architecture, name)
        for tensor in range(trainer.tensor):
            for part in shard_slices(architecture, name, tensor, trainer.tensor):
                ranks[part, name] += [trainer.rank(tensor, stage, data) for data in range(trainer.data)]
    holders: dict[str, list] = defaultdict(list)
    for (part, name), found in ranks.items():
        holders[part.name].append((part, name, found))
    return holders


def buckets(moves: list[Move], bucket_numel: int) -> Iterator[list[Move]]:
    """All moves in order, as many at a time as no worker gets more than bucket_numel elements of.

    A move that is larger is cut along its dimension; one row of it always fits.
    """
    found: list[Move] = []
    filled: dict[int, int] = defaultdict(int)
    for part in itertools.chain.from_iterable(_cut(move, bucket_numel) for move in moves):
        if filled[part.worker] + part.numel > bucket_numel and found:
            yield found
            found, filled = [], defaultdict(int)
        found.append(part)
        filled[part.worker] += part.numel
    if found:
        yield found


def _cut(move: Move, most_numel: int) -> Iterator[Move]:
    step = max(1, most_numel * move.length // move.numel)
    for start in range(0, move.length, step):
        length = min(step, move.length - start)
        shape = (*move.shape[: move.dim], length, *move.shape[move.dim + 1 :])
        yield replace(
            move,
            source_start=move.source_start + start,
            target_start=move.target_start + start,
            length=length,
            shape=shape,
        )


def checksum(piece: torch.Tensor, shape: tuple[int, ...], dim: int = 0, start: int = 0) -> int:
    """Of a piece that lies at `start` of dimension `dim` in a tensor of `shape`: those of its pieces add up to its own.

    Σ bits · (1 + place mod a prime) in 64-bit integers that wrap: a bit that differs or a row in the wrong place shows.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[piece.element_size()]
    bits = piece.contiguous().view(integers).to(torch.int64)
    places = torch.arange(math.prod(shape), device=piece.device).view(shape).narrow(dim, start, piece.shape[dim])
    return int((bits * (places % _CHECKSUM_PERIOD + 1)).sum())


def wrapped_sum(*checksums: int) -> int:
    """In 64-bit integers that wrap."""
    return (sum(checksums) + 2**63) % 2**64 - 2**63
