"""Buckets of shards from trainer ranks to vLLM workers, over a group of both, beside the groups that each side has."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_dgpo.weights.resharding import Move


@dataclass(frozen=True)
class Meeting:
    """Where trainer ranks and workers find one another: a store that trainer rank 0 keeps."""

    host: str
    port: int
    token: str
    """A secret. The store answers anyone who reaches it, but only to those who know its keys' names."""
    timeout_s: float
    """Longest wait for another member, then and later."""


def open_meeting(host: str, timeout_s: float) -> tuple[Meeting, dist.TCPStore]:
    """Listens on this address only."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(
        host, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return Meeting(host, port, secrets.token_urlsafe(16), timeout_s), store


def join_group(meeting: Meeting, rank: int, size: int, store: dist.TCPStore | None = None) -> dist.ProcessGroup:
    """Trainer ranks come first; rank 0 gives its store. Returns when every member has joined.

    Raises after the meeting's timeout where one does not. Collective over trainer and workers. gloo on CPU, NCCL on
    GPUs.
    """
    timeout = timedelta(seconds=meeting.timeout_s)
    store = store or dist.TCPStore(meeting.host, meeting.port, timeout=timeout, wait_for_workers=False)
    prefixed = dist.PrefixStore(f"megatron_dgpo_{meeting.token}", store)
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(prefixed, rank, size, options)
    group = dist.ProcessGroupGloo(prefixed, rank, size, timeout)
    group.barrier().wait()
    return group


def send_buckets(
    group: dist.ProcessGroup, moves: list[list[Move]], piece: Callable[[Move], torch.Tensor], first_worker: int
) -> None:
    """Send one rank's moves of every bucket, one message for each worker that gets any.

    piece(move): the tensor of move.shape, in the dtype that travels. first_worker: rank of worker 0 in group. Two
    buckets are alive at a time: one under way and one being packed.
    """
    flying: list[list] = []
    for index, bucket in enumerate(moves):
        works = []
        for worker, mine in _grouped(bucket, lambda move: move.worker):
            buffer = torch.cat([piece(move).reshape(-1) for move in mine])
            with _peer_named(f"a bucket for vLLM worker {worker}"):
                # The buffer lives until it is sent.
                works.append((worker, buffer, group.send([buffer], first_worker + worker, index)))
        flying.append(works)
        if len(flying) > 1:
            _land(flying.pop(0))
    for works in flying:
        _land(works)


def receive_buckets(
    group: dist.ProcessGroup,
    moves: list[list[Move]],
    load: Callable[[Move, torch.Tensor], None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Receive one worker's moves of every bucket and give each piece to `load`, with the next bucket under way."""

    def post(index: int) -> list:
        posted = []
        for rank, mine in _grouped(moves[index], lambda move: move.rank) if index < len(moves) else []:
            buffer = torch.empty(sum(move.numel for move in mine), dtype=dtype, device=device)
            with _peer_named(f"bucket {index + 1} of {len(moves)} from trainer rank {rank}"):
                posted.append((rank, mine, buffer, group.recv([buffer], rank, index)))
        return posted

    arriving = post(0)
    for index in range(len(moves)):
        following = post(index + 1)
        for rank, mine, buffer, work in arriving:
            with _peer_named(f"bucket {index + 1} of {len(moves)} from trainer rank {rank}"):
                work.wait()
            for move, piece in zip(mine, buffer.split([move.numel for move in mine]), strict=True):
                load(move, piece.view(move.shape))
        arriving = following


def _grouped(bucket: list[Move], key: Callable[[Move], int]) -> list[tuple[int, list[Move]]]:
    found: dict[int, list[Move]] = defaultdict(list)
    for move in bucket:
        found[key(move)].append(move)
    return sorted(found.items())


def _land(works: list) -> None:
    for worker, _, work in works:
        with _peer_named(f"a bucket for vLLM worker {worker}"):
            work.wait()


@contextlib.contextmanager
def _peer_named(what: str) -> Iterator[None]:
    """Errors of sending and receiving say what did not arrive."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise RuntimeError(f"weights: {what} did not arrive: the other side is gone or stuck ({first})") from None
