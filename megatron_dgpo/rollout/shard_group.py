"""The process group of all trainer ranks and all vLLM workers, beside the groups that each side has of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist


def join_group(host: str, port: int, rank: int, size: int, timeout_s: float) -> dist.ProcessGroup:
    """Trainer ranks come first; rank 0 keeps the store that all meet at. Returns when every member has joined.

    Raises after timeout_s where one does not. Collective over trainer and workers. gloo on CPU, NCCL on GPUs.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, size, rank == 0, timeout=timeout, wait_for_workers=False)
    prefixed = dist.PrefixStore("megatron_dgpo_shards", store)
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(prefixed, rank, size, options)
    group = dist.ProcessGroupGloo(prefixed, rank, size, timeout)
    group.barrier().wait()
    return group


@contextlib.contextmanager
def peer_named(what: str) -> Iterator[None]:
    """Errors of sending and receiving say what did not arrive."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise RuntimeError(f"weights: {what} did not arrive: the other side is gone or stuck ({first})") from None
