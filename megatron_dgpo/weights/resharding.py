"""Which bytes go from which trainer rank to which vLLM worker: exactly each worker's own shard, once.

The plan follows from the two layouts alone: every rank and every worker works out its own moves and nothing else, and
both sides of a move find the same sender for it, the same bucket and the same place in their message.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_dgpo.layout import Layout, ServerLayout, vllm_vocab_size
from megatron_dgpo.weights.architectures import Architecture, expert_of
from megatron_dgpo.weights.slices import Slice, shard_slices

_CHECKSUM_PERIOD = 65521
_CHECKSUM_NUMEL = 2**20


def stage_of(architecture: Architecture, layout: Layout, name: str) -> int:
    """Pipeline stage that holds a Megatron parameter (global layer number)."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        return layout.stage_of_layer(int(parts[2]), architecture.num_layers)
    return 0 if name.startswith("embedding.") else layout.pipeline - 1


def holders_of(architecture: Architecture, layout: Layout, name: str) -> tuple[range, ...]:
    """The ranks that hold each shard of a Megatron parameter; of one that is held whole there is one shard."""
    stage, expert = stage_of(architecture, layout, name), expert_of(name)
    if expert is not None:
        return (layout.ranks_of_expert(stage, expert, architecture.num_experts),)
    ranks = layout.ranks_of_stage(stage)
    if architecture.parameters[name][0] == "copy":
        return (ranks,)
    return tuple(ranks[tensor :: layout.tensor] for tensor in range(layout.tensor))


@dataclass(frozen=True)
class VllmParameter:
    """How vLLM holds Hugging Face tensors: q, k, v and gate, up are one parameter, and experts are stacked in one."""

    split: str
    experts: list[list[str]]
    """The Hugging Face tensors of each expert; of a parameter that is not of experts, all in one list."""
    names: list[str]
    """The Megatron parameter that holds the same tensors, for each expert."""
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


@dataclass(frozen=True, slots=True)
class Move:
    """A block of a trainer rank's shard becomes a block of a worker's.

    Example: of a down projection [2, 4] rank 1 of two holds the columns from 2 on, and the only worker all of them.

    >>> move = Move(
    ...     rank=1,
    ...     worker=0,
    ...     source="decoder.layers.0.mlp.linear_fc2.weight",
    ...     source_start=(0, 0),
    ...     target="model.layers.0.mlp.down_proj.weight",
    ...     target_start=(0, 2),
    ...     shape=(2, 2),
    ... )
    >>> shard, whole = torch.ones(2, 2), torch.zeros(2, 4)
    >>> _ = move.of_target(whole).copy_(move.of_source(shard))
    >>> whole.tolist(), move.numel
    ([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]], 4)
    """

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
            found[fused] = VllmParameter(split, [sources], [name], stacked=False)
        else:
            experts = sources[0].partition(".experts.")[0] + ".experts.routed_experts."
            stack = experts + ("w13_weight" if split == "gate_up" else "w2_weight")
            parameter = found.setdefault(stack, VllmParameter(split, [], [], stacked=True))
            parameter.experts.append(sources)
            parameter.names.append(name)
    return found


def vllm_blocks(
    architecture: Architecture, parameter: VllmParameter, worker: int, layout: ServerLayout
) -> Iterator[Block]:
    """The blocks that make up the shard of one worker, counted within its server."""
    for expert, sources in enumerate(parameter.experts):
        first, size, stack = _cut_over(architecture, parameter, expert, layout)
        if first <= worker < first + size:
            parts = _vllm_slices(architecture, parameter.split, sources, worker - first, size)
            yield from (Block.of_slice(part, architecture, *stack) for part in parts)


def _cut_over(
    architecture: Architecture, parameter: VllmParameter, expert: int, layout: ServerLayout
) -> tuple[int, int, tuple[int, ...]]:
    """(first, number) of a server's workers that an expert is cut over, and its place in each one's stack of them."""
    if not (parameter.stacked and layout.expert_parallel):
        return 0, layout.tensor, (expert,) if parameter.stacked else ()
    worker, place = divmod(expert, architecture.num_experts // layout.tensor)
    return worker, 1, (place,)


def vllm_shape(architecture: Architecture, parameter: VllmParameter, layout: ServerLayout) -> tuple[int, ...]:
    """Of one worker's shard."""
    if parameter.split == "vocab":
        [[name]] = parameter.experts
        return vllm_vocab_size(architecture.vocab_size) // layout.tensor, architecture.hf_shapes[name][1]
    _, size, _ = _cut_over(architecture, parameter, 0, layout)
    last = _vllm_slices(architecture, parameter.split, parameter.experts[0], 0, size)[-1]
    block = Block.of_slice(last, architecture)
    shape = tuple(start + length for start, length in zip(block.shard_start, block.shape, strict=True))
    return (len(parameter.experts) * size // layout.tensor, *shape) if parameter.stacked else shape


def _vllm_slices(architecture: Architecture, split: str, sources: list[str], tp_rank: int, tp_size: int) -> list[Slice]:
    shapes = [architecture.hf_shapes[source] for source in sources]
    if split == "copy":
        return [Slice(sources[0], 0, 0, 0, shapes[0][0])]
    if split == "row":
        length = shapes[0][1] // tp_size
        return [Slice(sources[0], 1, tp_rank * length, 0, length)]
    if split == "vocab":
        rows = vllm_vocab_size(architecture.vocab_size) // tp_size
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


@dataclass(frozen=True, slots=True)
class _Want:
    """What one of the workers that a tensor is cut over wants of one of the trainer's shards of it."""

    worker: int
    """Among the workers that the tensor is cut over."""
    shard: int
    number: int
    """Among the workers that want anything of this shard, of which there are `count`."""
    count: int
    source_start: tuple[int, ...]
    target_start: tuple[int, ...]
    """Without the place in a stack of experts."""
    shape: tuple[int, ...]


def plan_moves(
    architecture: Architecture,
    trainer: Layout,
    vllm: ServerLayout,
    rank: int | None = None,
    worker: int | None = None,
) -> Iterator[Move]:
    """The moves of one trainer rank, or to one worker, or all; in the same order, that of `vllm_parameters`.

    The holders of a shard take turns: its n-th request, over the workers that want some of it and over all shards of
    the same form on the same ranks, goes to the (n mod holders)-th. So each serves as many workers as another, one more
    or less, and where that comes out even a worker keeps to its few senders from layer to layer.
    """
    forms: dict[tuple, list[_Want]] = {}
    earlier: Counter[tuple] = Counter()
    for target, parameter in vllm_parameters(architecture).items():
        shapes = tuple(architecture.hf_shapes[source] for source in parameter.experts[0])
        for expert, (name, sources) in enumerate(zip(parameter.names, parameter.experts, strict=True)):
            holders = holders_of(architecture, trainer, name)
            first, size, stack = _cut_over(architecture, parameter, expert, vllm)
            form = (parameter.split, shapes, len(holders), size)
            if form not in forms:
                forms[form] = list(_wants(architecture, name, len(holders), sources, size))
            turn = earlier[form, holders] * vllm.servers
            earlier[form, holders] += 1
            for want in forms[form]:
                ranks = holders[want.shard]
                if rank is not None and rank not in ranks:
                    continue
                receivers = range(first + want.worker, vllm.num_workers, vllm.tensor)
                for receiver in receivers if worker is None else {worker}.intersection(receivers):
                    request = (turn + receiver // vllm.tensor) * want.count + want.number
                    sender = ranks[request % len(ranks)]
                    if rank is None or rank == sender:
                        places = want.source_start, target, (*stack, *want.target_start)
                        yield Move(sender, receiver, name, *places, want.shape)


def _wants(architecture: Architecture, name: str, shards: int, sources: list[str], size: int) -> Iterator[_Want]:
    """Of a Megatron parameter in so many shards and its Hugging Face tensors, which vLLM cuts over `size` workers."""
    split = architecture.parameters[name][0]
    wanted = [
        [Block.of_slice(part, architecture) for part in _vllm_slices(architecture, split, sources, worker, size)]
        for worker in range(size)
    ]
    for shard in range(shards):
        held = [Block.of_slice(part, architecture) for part in shard_slices(architecture, name, shard, shards)]
        common = {
            worker: [(a, b, both) for a in blocks for b in held if (both := _intersection(a, b))]
            for worker, blocks in enumerate(wanted)
        }
        workers = [worker for worker, found in common.items() if found]
        for number, worker in enumerate(workers):
            for want, have, (start, shape) in common[worker]:
                yield _Want(worker, shard, number, len(workers), _within(have, start), _within(want, start), shape)


def _intersection(a: Block, b: Block) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(start, shape) in their common Hugging Face tensor."""
    if a.name != b.name:
        return None
    start = tuple(max(pair) for pair in zip(a.start, b.start, strict=True))
    ends = (min(i + m, j + n) for i, m, j, n in zip(a.start, a.shape, b.start, b.shape, strict=True))
    shape = tuple(end - first for end, first in zip(ends, start, strict=True))
    return (start, shape) if min(shape) > 0 else None


def _within(block: Block, start: tuple[int, ...]) -> tuple[int, ...]:
    """Where in the block's shard the element `start` of the Hugging Face tensor lies."""
    own = zip(block.shard_start, start, block.start, strict=True)
    return tuple(at + first - begin for at, first, begin in own)


def plan_buckets(
    architecture: Architecture,
    trainer: Layout,
    vllm: ServerLayout,
    bucket_numel: int,
    rank: int | None = None,
    worker: int | None = None,
) -> list[list[Move]]:
    """The moves of `plan_moves` cut into buckets; those without a move of this rank or worker are there too, empty.

    A worker's shards, one after the other, are cut every so many elements, and every move to a shard is cut between its
    rows in the shard's own proportions: all workers and all senders of a shard are busy in each of its buckets. No
    worker gets, and no rank sends, more than bucket_numel elements and one row of every move in a bucket.
    """
    # Where more workers than a pipeline stage has ranks want its layers, a rank sends to several at once.
    numel = max(1, bucket_numel // math.ceil(vllm.num_workers / trainer.stage_size))
    spans, end = {}, 0
    for name, parameter in vllm_parameters(architecture).items():
        start, end = end, end + math.prod(vllm_shape(architecture, parameter, vllm))
        spans[name] = start, end
    buckets: list[list[Move]] = [[] for _ in range(math.ceil(end / numel))]
    for move in plan_moves(architecture, trainer, vllm, rank, worker):
        start, end = spans[move.target]
        rows = move.shape[0]
        for number in range(start // numel, math.ceil(end / numel)):
            edges = (min(max(edge * numel - start, 0), end - start) for edge in (number, number + 1))
            first, last = (rows * edge // (end - start) for edge in edges)
            if first < last:
                buckets[number].append(_rows(move, first, last))
    return buckets


def _rows(move: Move, first: int, last: int) -> Move:
    rows, *row = move.shape
    if last - first == rows:
        return move
    stack = len(move.target_start) - len(move.shape)
    source, target = list(move.source_start), list(move.target_start)
    source[0] += first
    target[stack] += first
    return Move(move.rank, move.worker, move.source, tuple(source), move.target, tuple(target), (last - first, *row))


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
