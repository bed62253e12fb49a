"""Runs in trainer ranks and in vLLM's workers: a rank's weights in memory that workers on its machine read in place."""

from __future__ import annotations

import math
import mmap
import os
import re
import resource
from dataclasses import dataclass

import torch

from megatron_dgpo.errors import UsageError

_PATH = re.compile(r"/proc/\d+/fd/\d+")
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Handle:
    """Where other processes of the same user find a tensor, as long as its owner lives."""

    path: str
    """The owner's file descriptor: the memory has no name in any file system, and goes with its last user."""
    num_bytes: int
    """Of all that is there."""
    dtype: str
    offset: int
    """Of the tensor, in bytes."""
    shape: tuple[int, ...]


def share(tensors: dict[str, torch.Tensor]) -> dict[str, Handle]:
    """Move contiguous CPU tensors to shared memory where they stand: all views of their storages stay valid.

    Raises UsageError when there is not enough of it.
    """
    # Views of one storage have one entry, by the address it has now.
    _check_space({s.data_ptr(): s.nbytes() for t in tensors.values() if not (s := t.untyped_storage()).is_shared()})
    handles = {}
    for name, tensor in tensors.items():
        descriptor, num_bytes = tensor.untyped_storage()._share_fd_cpu_()
        path, offset = f"/proc/{os.getpid()}/fd/{descriptor}", tensor.storage_offset() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        handles[name] = Handle(path, num_bytes, dtype, offset, tuple(tensor.shape))
    return handles


def _check_space(storages: dict[int, int]) -> None:
    needed, space = sum(storages.values()), os.statvfs(_SHARED_MEMORY)
    if needed > space.f_bavail * space.f_frsize:
        raise UsageError(
            f"weight_sync.transport=memory needs {needed / 2**20:,.0f} MiB of {_SHARED_MEMORY}, which has "
            f"{space.f_bavail * space.f_frsize / 2**20:,.0f} MiB left: enlarge it, or use weight_sync.transport=shards"
        )
    allowed, used = resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/proc/self/fd"))
    if len(storages) > allowed - used:
        raise UsageError(
            f"weight_sync.transport=memory needs an open file for each of {len(storages)} parameters, and `ulimit -n` "
            f"allows {allowed - used} more: raise it, or use weight_sync.transport=shards"
        )


def attach(handles: dict[str, Handle]) -> dict[str, torch.Tensor]:
    """The tensors, for reading. Raises ValueError for any path but a process's file descriptor."""
    memories: dict[str, mmap.mmap] = {}
    found = {}
    for name, handle in handles.items():
        if not _PATH.fullmatch(handle.path):
            raise ValueError(f"{handle.path!r} is not the file descriptor of a process")
        if handle.path not in memories:
            descriptor = os.open(handle.path, os.O_RDWR)
            try:
                memories[handle.path] = mmap.mmap(descriptor, handle.num_bytes)
            finally:
                os.close(descriptor)
        dtype, count = getattr(torch, handle.dtype), math.prod(handle.shape)
        flat = torch.frombuffer(memories[handle.path], dtype=dtype, count=count, offset=handle.offset)
        found[name] = flat.view(handle.shape)
    return found
