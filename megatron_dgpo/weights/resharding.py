"""Which bytes go from which trainer rank to which vLLM worker: exactly each worker's own shard, once.

The plan follows from the two layouts alone, so that every rank and every worker works out its own part of it. Replicas
of a block share the sending evenly.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_dgpo.errors import UsageError
from megatron_dgpo.weights.architectures import Architecture, expert_of
from megatron_dgpo.weights.slices import Slice, shard_slices

# vLLM pads its vocabulary to a multiple of this before it splits it (DEFAULT_VOCAB_PADDING_SIZE).
_VLLM_VOCAB_MULTIPLE = 64
_CHECKSUM_PERIOD = 65521
_CHECKSUM_NUMEL = 2**20


@dataclass(frozen=True)
class TrainerLayout:
    """How Megatron numbers its ranks: tensor parallel fastest, then data, then pipeline."""

    tensor: int
    pipeline: int
    chunks_per_stage: int
    data: int
    expert: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def rank(self, tensor: int, pipeline: int, data: int) -> int:
        return tensor + self.tensor * (data + self.data * pipeline)

    def expert_rank(self, rank: int) -> int:
        """Neighbouring ranks of a pipeline stage share its layers' experts."""
        return rank % (self.tensor * self.data) % self.expert

    def stage(self, architecture: Architecture, name: str) -> int:
        """Pipeline stage that holds a Megatron parameter (global layer number)."""
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            per_chunk = architecture.num_layers // (self.pipeline * self.chunks_per_stage)
            return int(parts[2]) // per_chunk % self.pipeline
        return 0 if name.startswith("embedding.") else self.pipeline - 1

    def holders(self, architecture: Architecture, name: str) -> Iterator[tuple[list[Slice], list[int]]]:
        """(shard, ranks that hold it) of a Megatron parameter, for every shard of it."""
        first, expert = self.rank(0, self.stage(architecture, name), 0), expert_of(name)
        ranks = range(first, first + self.tensor * self.data)
        if expert is not None:
            owner = expert * self.expert // architecture.num_experts
            yield shard_slices(architecture, name, 0, 1), [r for r in ranks if self.expert_rank(r) == owner]
        elif architecture.parameters[name][0] == "copy":
            yield shard_slices(architecture, name, 0, 1), list(ranks)
        else:
            for tensor in range(self.tensor):
                yield shard_slices(architecture, name, tensor, self.tensor), list(ranks[tensor :: self.tensor])


@dataclass(frozen=True)
class VllmLayout:
    """Workers are numbered server by server."""

    tensor: int
    servers: int
    expert_parallel: bool = False
    """Every expert is whole on one of a server's workers; otherwise each is cut over all of them."""

    @property
    def num_workers(self) -> int:
        return self.tensor * self.servers


def check_vllm_layout(architecture: Architecture, layout: VllmLayout) -> None:
    """Raise UsageError when vLLM would not cut the model in this way."""
    size, heads, groups = layout.tensor, architecture.num_attention_heads, architecture.num_query_groups
    if heads % size:
        raise UsageError(f"rollout.tensor={size} does not divide num_attention_heads={heads}")
    if groups % size and size % groups:
        raise UsageError(f"rollout.tensor={size} and num_key_value_heads={groups}: neither divides the other")
    if layout.expert_parallel:
        if not architecture.num_experts or architecture.num_experts % size:
            raise UsageError(
                f"rollout.expert_parallel=true, but rollout.tensor={size} does not divide {architecture.num_experts} "
                "experts; set it to false"
            )
    else:
        ffn = architecture.expert_ffn_hidden_size or architecture.ffn_hidden_size
        if ffn % size:
            hint = "; set rollout.expert_parallel=true" if architecture.num_experts else ""
            raise UsageError(f"rollout.tensor={size} does not divide the intermediate size {ffn}{hint}")
    if _padded_vocab(architecture) % size:
        raise UsageError(f"rollout.tensor={size} does not divide the padded vocabulary {_padded_vocab(architecture)}")


@dataclass(frozen=True)
class VllmParameter:
    """How vLLM holds Hugging Face tensors: q, k, v and gate, up are one parameter, and experts are stacked in one."""

    split: str
    experts: list[list[str]]
    """The Hugging Face tensors of each expert; of a parameter that is not of experts, all in one list."""
    stacked: bool


@dataclass(frozen=True)
class Block:
    """A block of a Hugging Face tensor, and where in a shard it lies."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    shard_start: tuple[int, ...]
    """One dimension more than the tensor where experts are stacked."""

    @classmethod
    def of_slice(cls, part: Slice, architecture: Architecture, *stack: int) -> Block:
        shape, zeros = architecture.hf_shapes[part.name], (0,) * len(architecture.hf_shapes[part.name])
        at = (*zeros[: part.dim], part.local_start, *zeros[part.dim + 1 :])
        start = (*zeros[: part.dim], part.start, *zeros[part.dim + 1 :])
        return cls(part.name, start, (*shape[: part.dim], part.length, *shape[part.dim + 1 :]), (*stack, *at))


@dataclass(frozen=True)
class Move:
    """A block of a trainer rank's shard becomes a block of a worker's."""

    rank: int
    """Trainer rank that sends."""
    worker: int
    source: str
    """Megatron parameter, with its global layer and expert numbers."""
    source_start: tuple[int, ...]
    target: str
    """vLLM parameter."""
    target_start: tuple[int, ...]
    """One dimension more than the source where vLLM stacks experts."""
    shape: tuple[int, ...]
    """Of the block, in the source's dimensions."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of_source(self, shard: torch.Tensor) -> torch.Tensor:
        return block(shard, self.source_start, self.shape)

    def of_target(self, shard: torch.Tensor) -> torch.Tensor:
        """A view of self.shape."""
        stack = len(self.target_start) - len(self.shape)
        return block(shard[self.target_start[:stack]] if stack else shard, self.target_start[stack:], self.shape)


def block(tensor: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """A view."""
    return tensor[tuple(slice(first, first + length) for first, length in zip(start, shape, strict=True))]


def vllm_parameters(architecture: Architecture) -> dict[str, VllmParameter]:
    """In the order of the computation, so that each of vLLM's layers is complete soon after its first bytes arrive."""
    found: dict[str, VllmParameter] = {}
    for name, (split, *sources) in architecture.parameters.items():
        if expert_of(name) is None:
            fused = sources[0].replace(".q_proj.", ".qkv_proj.").replace(".gate_proj.", ".gate_up_proj.")
            found[fused] = VllmParameter(split, [sources], stacked=False)
        else:
            experts = sources[0].partition(".experts.")[0] + ".experts.routed_experts."
            stack = experts + ("w13_weight" if split == "gate_up" else "w2_weight")
            found.setdefault(stack, VllmParameter(split, [], stacked=True)).experts.append(sources)
    return found


def vllm_blocks(
    architecture: Architecture, parameter: VllmParameter, worker: int, layout: VllmLayout
) -> Iterator[Block]:
    """The blocks that make up the shard of one worker, counted within its server."""
    size = layout.tensor
    for expert, sources in enumerate(parameter.experts):
        if not parameter.stacked:
            parts = _vllm_slices(architecture, parameter.split, sources, worker, size)
            yield from (Block.of_slice(part, architecture) for part in parts)
        elif not layout.expert_parallel:
            parts = _vllm_slices(architecture, parameter.split, sources, worker, size)
            yield from (Block.of_slice(part, architecture, expert) for part in parts)
        elif expert * size // architecture.num_experts == worker:
            place = expert % (architecture.num_experts // size)
            parts = _vllm_slices(architecture, parameter.split, sources, 0, 1)
            yield from (Block.of_slice(part, architecture, place) for part in parts)


def vllm_shape(architecture: Architecture, parameter: VllmParameter, layout: VllmLayout) -> tuple[int, ...]:
    """Of one worker's shard."""
    if parameter.split == "vocab":
        [[name]] = parameter.experts
        return _vllm_vocab_rows(architecture, layout.tensor), architecture.hf_shapes[name][1]
    last = list(vllm_blocks(architecture, parameter, 0, layout))[-1]
    lengths = (1,) * (len(last.shard_start) - len(last.shape)) + last.shape
    return tuple(start + length for start, length in zip(last.shard_start, lengths, strict=True))


def _vllm_slices(architecture: Architecture, split: str, sources: list[str], tp_rank: int, tp_size: int) -> list[Slice]:
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
    return _padded_vocab(architecture) // tp_size


def _padded_vocab(architecture: Architecture) -> int:
    return -(-architecture.vocab_size // _VLLM_VOCAB_MULTIPLE) * _VLLM_VOCAB_MULTIPLE


def plan_moves(architecture: Architecture, trainer: TrainerLayout, vllm: VllmLayout) -> list[Move]:
    """Every worker's shards, each byte from one rank, in the order of `vllm_parameters`."""
    holders: dict[str, list[tuple[Block, str, list[int]]]] = defaultdict(list)
    for name in architecture.parameters:
        for parts, ranks in trainer.holders(architecture, name):
            for part in parts:
                holders[part.name].append((Block.of_slice(part, architecture), name, ranks))
    sent: dict[int, int] = defaultdict(int)
    moves = []
    for target, parameter in vllm_parameters(architecture).items():
        for worker in range(vllm.num_workers):
            for wanted in vllm_blocks(architecture, parameter, worker % vllm.tensor, vllm):
                for held, source, ranks in holders[wanted.name]:
                    common = _intersection(wanted, held)
                    if common is None:
                        continue
                    start, shape = common
                    rank = min(ranks, key=lambda rank: (sent[rank], rank))
                    sent[rank] += math.prod(shape)
                    places = _within(held, start), _within(wanted, start)
                    moves.append(Move(rank, worker, source, places[0], target, places[1], shape))
    return moves


def _intersection(a: Block, b: Block) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(start, shape) in their common Hugging Face tensor."""
    start = tuple(max(pair) for pair in zip(a.start, b.start, strict=True))
    ends = (min(i + m, j + n) for i, m, j, n in zip(a.start, a.shape, b.start, b.shape, strict=True))
    shape = tuple(end - first for end, first in zip(ends, start, strict=True))
    return (start, shape) if min(shape) > 0 else None


def _within(block: Block, start: tuple[int, ...]) -> tuple[int, ...]:
    """Where in the block's shard the element `start` of the Hugging Face tensor lies."""
    stack = len(block.shard_start) - len(start)
    own = zip(block.shard_start[stack:], start, block.start, strict=True)
    return (*block.shard_start[:stack], *(at + first - begin for at, first, begin in own))


def buckets(moves: list[Move], bucket_numel: int) -> Iterator[list[Move]]:
    """All moves in order, as many at a time as no worker gets more than bucket_numel elements of.

    A move that is larger is cut between rows; one row always fits.
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
    rows, *row = move.shape
    stack = len(move.target_start) - len(move.shape)
    step = max(1, most_numel // math.prod(row))
    for first in range(0, rows, step):
        source, target = list(move.source_start), list(move.target_start)
        source[0] += first
        target[stack] += first
        shape = (min(step, rows - first), *row)
        yield replace(move, source_start=tuple(source), target_start=tuple(target), shape=shape)


def checksum(piece: torch.Tensor, shape: tuple[int, ...], start: tuple[int, ...] | None = None) -> int:
    """Of a block that lies at `start` in a tensor of `shape`: those of its blocks add up to a tensor's own.

    Σ bits · (1 + place mod a prime) in 64-bit integers that wrap: a bit that differs or a row in the wrong place shows.
    piece: of one or two dimensions, the tensor's last ones. Memory: that of a million 64-bit integers, some times.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(at * stride for at, stride in zip(start or (0,) * len(shape), strides, strict=True))
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[piece.element_size()]
    rows = piece.contiguous().view(integers).view(len(piece), -1)
    columns = torch.arange(rows.shape[1], device=piece.device)
    step = max(1, _CHECKSUM_NUMEL // max(1, rows.shape[1]))
    total = 0
    for begin in range(0, len(rows), step):
        bits = rows[begin : begin + step].to(torch.int64)
        numbers = torch.arange(begin, begin + len(bits), device=piece.device)
        places = first + numbers[:, None] * strides[-piece.dim()] + columns
        total = wrapped_sum(total, int((bits * (places % _CHECKSUM_PERIOD + 1)).sum()))
    return total


def wrapped_sum(*checksums: int) -> int:
    """In 64-bit integers that wrap."""
    return (sum(checksums) + 2**63) % 2**64 - 2**63
