"""Where each block of a tensor-parallel rank's shard lies in the full Hugging Face tensors.

Loading, export, weight updates and checks all read this one description.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dgpo.weights.architectures import Architecture, expert_of


@dataclass(frozen=True)
class Slice:
    """`shard.narrow(dim, local_start, length)` is `hf[name].narrow(dim, start, length)`."""

    name: str
    dim: int
    start: int
    local_start: int
    length: int

    def of_shard(self, shard: torch.Tensor) -> torch.Tensor:
        return shard.narrow(self.dim, self.local_start, self.length)

    def of_full(self, full: torch.Tensor) -> torch.Tensor:
        return full.narrow(self.dim, self.start, self.length)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The smallest multiple of tp_size that holds the vocabulary."""
    return -(-vocab_size // tp_size) * tp_size


def shard_slices(architecture: Architecture, name: str, tp_rank: int, tp_size: int) -> list[Slice]:
    """The blocks that make up the shard of Megatron parameter `name` (global layer number) on one rank.

    Together the ranks cover every Hugging Face tensor exactly once, but for `copy`, which every rank holds whole, and
    for experts, which are whole wherever they are.
    """
    split, *sources = architecture.parameters[name]
    if expert_of(name) is not None:
        tp_rank, tp_size = 0, 1
    shapes = architecture.hf_shapes
    return _SPLITS[split](architecture, sources, [shapes[source] for source in sources], tp_rank, tp_size)


def _copy(_, sources, shapes, rank, size) -> list[Slice]:
    return [Slice(sources[0], 0, 0, 0, shapes[0][0])]


def _row(_, sources, shapes, rank, size) -> list[Slice]:
    length = shapes[0][1] // size
    return [Slice(sources[0], 1, rank * length, 0, length)]


def _gate_up(_, sources, shapes, rank, size) -> list[Slice]:
    length = shapes[0][0] // size
    return [Slice(source, 0, rank * length, i * length, length) for i, source in enumerate(sources)]


def _vocab(architecture, sources, shapes, rank, size) -> list[Slice]:
    rows = padded_vocab_size(architecture.vocab_size, size) // size
    length = min(rows, architecture.vocab_size - rank * rows)
    return [Slice(sources[0], 0, rank * rows, 0, length)] if length > 0 else []


def _qkv(architecture, sources, shapes, rank, size) -> list[Slice]:
    query, key, value = sources
    dim, groups = architecture.head_dim, architecture.num_query_groups // size
    width = architecture.num_attention_heads // architecture.num_query_groups * dim
    slices = []
    for local in range(groups):
        group, at = rank * groups + local, local * (width + 2 * dim)
        slices += [
            Slice(query, 0, group * width, at, width),
            Slice(key, 0, group * dim, at + width, dim),
            Slice(value, 0, group * dim, at + width + dim, dim),
        ]
    return slices


_SPLITS = {"copy": _copy, "row": _row, "gate_up": _gate_up, "vocab": _vocab, "qkv": _qkv}
