"""All weights in one anonymous memory file: trainer ranks write their slices, vLLM's workers read whole tensors.

The file has no name in any file system. It is reached through its creator's file descriptor, and vanishes with the
last process that holds it, however that ends.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import zlib
from dataclasses import dataclass

import torch

_ALIGNMENT = 64
_PATH = re.compile(r"/proc/\d+/fd/\d+")


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies: [(name, shape, offset)], all of one dtype, offsets in bytes."""

    dtype: str
    tensors: list[tuple[str, list[int], int]]
    num_bytes: int

    @classmethod
    def of(cls, shapes: dict[str, tuple[int, ...]], dtype: str) -> Layout:
        size, offset, tensors = getattr(torch, dtype).itemsize, 0, []
        for name, shape in shapes.items():
            tensors.append((name, list(shape), offset))
            offset += -(-math.prod(shape) * size // _ALIGNMENT) * _ALIGNMENT
        return cls(dtype, tensors, offset)

    def views(self, memory: mmap.mmap) -> dict[str, torch.Tensor]:
        dtype = getattr(torch, self.dtype)
        return {
            name: torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
            for name, shape, offset in self.tensors
        }


def create(layout: Layout) -> str:
    """Reserve the memory in this process; returns the path by which others reach it while this process lives."""
    descriptor = os.memfd_create("megatron_dgpo_weights", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, layout.num_bytes)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def attach(path: str, layout: Layout) -> dict[str, torch.Tensor]:
    """{name: tensor in the shared memory}. Raises ValueError for any path but a process's file descriptor."""
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not the file descriptor of a process")
    descriptor = os.open(path, os.O_RDWR)
    try:
        return layout.views(mmap.mmap(descriptor, layout.num_bytes))
    finally:
        os.close(descriptor)


def crc32(tensor: torch.Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor.view(-1).view(torch.uint8).numpy())
