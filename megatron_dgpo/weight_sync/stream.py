"""Runs in trainer ranks and in vLLM's workers: buckets of shards from the ones to the others.

Over a group of both, beside the groups that each side has.
"""

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
    """Whoever is late for another meeting at this address is no member of this one.

    Not a secret: the store shows its keys and values to anyone who reaches it, as PyTorch's stores have no
    authentication. The network between trainer and servers must be trusted.
    """
    join_timeout_s: float
    """Longest wait until all have come. Each first plans its part, and NCCL then introduces everyone to everyone."""
    timeout_s: float
    """Longest wait for another member later."""


def open_meeting(host: str, join_timeout_s: float, timeout_s: float) -> tuple[Meeting, dist.TCPStore]:
    """Listens on this address only."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=join_timeout_s)
    store = dist.TCPStore(
        host, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return Meeting(host, port, secrets.token_urlsafe(16), join_timeout_s, timeout_s), store


class CalledOffError(RuntimeError):
    """Not all who were to join a group will come; says why."""


def join_group(meeting: Meeting, rank: int, size: int, store: dist.TCPStore | None = None) -> dist.ProcessGroup:
    """Trainer ranks come first; rank 0 gives its store. gloo on CPU, NCCL on GPUs, where the group makes its one
    communicator here. Returns when every member has joined.

    Raises RuntimeError after the meeting's join_timeout_s where one has not, CalledOffError at once where one cannot
    (`call_off`). Collectives, over trainer and workers: one all-reduce of a number.
    """
    patience = timedelta(seconds=meeting.join_timeout_s)
    keys = _keys(meeting, store)
    # All come before a group is made: its constructor cannot be called off, and NCCL's meets nobody.
    if keys.add("members", 1) == size:
        keys.set("called off", "")
    try:
        reason = keys.get("called off").decode()
    except dist.DistStoreError:
        come = keys.add("members", 0)
        raise RuntimeError(f"{come} of {size} trainer ranks and workers came within {patience}") from None
    if reason:
        raise CalledOffError(reason)
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        group, device = dist.ProcessGroupNCCL(keys, rank, size, options), "cuda"
    else:
        group, device = dist.ProcessGroupGloo(keys, rank, size, patience), "cpu"
    return _connected(group, device, meeting)


def call_off(meeting: Meeting, reason: str) -> None:
    """Whoever waits in join_group for members that will not come raises CalledOffError."""
    # A connection of its own: the store of a thread that waits makes others wait, too.
    _keys(meeting, None).set("called off", reason)


def _keys(meeting: Meeting, store: dist.TCPStore | None) -> dist.PrefixStore:
    patience = timedelta(seconds=meeting.join_timeout_s)
    store = store or dist.TCPStore(meeting.host, meeting.port, timeout=patience, wait_for_workers=False)
    return dist.PrefixStore(f"megatron_dgpo_{meeting.token}", store)


def _connected(group: dist.ProcessGroup, device: str, meeting: Meeting) -> dist.ProcessGroup:
    """NCCL makes a communicator of all members for a collective only, and messages in `_post` need it."""
    group.allreduce([torch.zeros(1, device=device)]).wait(timedelta(seconds=meeting.join_timeout_s))
    group.set_timeout(timedelta(seconds=meeting.timeout_s))
    return group


def send_buckets(
    group: dist.ProcessGroup,
    moves: list[list[Move]],
    piece: Callable[[Move], torch.Tensor],
    first_worker: int,
    timeout_s: float,
) -> None:
    """Send one rank's moves of every bucket, one message for each worker that gets any; returns when all are sent.

    piece(move): the tensor of move.shape, in the dtype that travels. first_worker: rank of worker 0 in group. Two
    buckets are alive at a time: one under way and one being packed. Raises RuntimeError, naming the worker, when one
    takes longer than timeout_s. With NCCL that is the end of this process, too, a little later, by NCCL's watchdog: a
    communicator that has lost a member serves nobody.
    """
    under_way = None
    for index, bucket in enumerate(moves):
        # All is packed before anything is posted: an error between would leave NCCL's call open.
        messages = [
            (worker, torch.cat([piece(move).reshape(-1) for move in mine]))
            for worker, mine in _grouped(bucket, lambda move: move.worker)
        ]
        posted = _post(group, group.send, messages, first_worker, index, "a bucket for vLLM worker")
        if under_way:
            under_way.land(timeout_s)
        under_way = posted
    if under_way:
        under_way.land(timeout_s)


def receive_buckets(
    group: dist.ProcessGroup,
    moves: list[list[Move]],
    load: Callable[[Move, torch.Tensor], None],
    dtype: torch.dtype,
    device: torch.device,
    timeout_s: float,
) -> None:
    """Receive one worker's moves of every bucket and give each piece to `load`, with the next bucket under way.

    A piece has arrived when `load` gets it. Raises as send_buckets does.
    """

    def post(index: int) -> tuple[_Posted, list[list[Move]]]:
        ranks = _grouped(moves[index], lambda move: move.rank)
        messages = [
            (rank, torch.empty(sum(move.numel for move in mine), dtype=dtype, device=device)) for rank, mine in ranks
        ]
        what = f"bucket {index + 1} of {len(moves)} from trainer rank"
        return _post(group, group.recv, messages, 0, index, what), [mine for _, mine in ranks]

    def take(posted: _Posted, shares: list[list[Move]]) -> None:
        posted.land(timeout_s)
        for mine, (_, buffer) in zip(shares, posted.messages, strict=True):
            for move, piece in zip(mine, buffer.split([move.numel for move in mine]), strict=True):
                load(move, piece.view(move.shape))

    under_way: list[tuple[_Posted, list[list[Move]]]] = []
    for index in range(len(moves) + 1):
        if index < len(moves):
            under_way.append(post(index))
        if index:
            take(*under_way.pop(0))


@dataclass
class _Posted:
    messages: list[tuple[int, torch.Tensor]]
    """(place of the other member, buffer); a buffer must live until it has landed."""
    works: list[tuple[str, dist.Work]]
    """What each of them carries."""

    def land(self, timeout_s: float) -> None:
        for what, work in self.works:
            with _peer_named(what):
                # With a limit of its own NCCL's wait blocks until all is there, or raises. Without one it would only
                # make the GPU's current stream wait: errors would show nowhere, and buffers would pile up.
                work.wait(timedelta(seconds=timeout_s))


def _post(
    group: dist.ProcessGroup,
    call: Callable,
    messages: list[tuple[int, torch.Tensor]],
    first: int,
    tag: int,
    what: str,
) -> _Posted:
    """Start all messages of a bucket. call: group.send or group.recv; first: rank in group of a member at place 0.

    On NCCL within one group call, over the group's one communicator: messages posted singly would make another for
    every pair of members (ProcessGroupNCCL.pointToPoint), each with its own buffers on the GPU. Members without a
    message make no call.
    """
    if not group.supports_coalescing:
        works = []
        for place, buffer in messages:
            with _peer_named(f"{what} {place}"):
                works.append((f"{what} {place}", call([buffer], first + place, tag)))
        return _Posted(messages, works)
    if not messages:
        return _Posted([], [])
    places = ", ".join(str(place) for place, _ in messages)
    what = f"{what} {places}" if len(messages) == 1 else f"{what}s {places}, or one of them,"
    with _peer_named(what):
        group._start_coalescing()
        try:
            for place, buffer in messages:
                call([buffer], first + place, tag)
        finally:
            work = group._end_coalescing()
    return _Posted(messages, [(what, work)])


def _grouped(bucket: list[Move], key: Callable[[Move], int]) -> list[tuple[int, list[Move]]]:
    found: dict[int, list[Move]] = defaultdict(list)
    for move in bucket:
        found[key(move)].append(move)
    return sorted(found.items())


@contextlib.contextmanager
def _peer_named(what: str) -> Iterator[None]:
    """Errors of sending and receiving say what did not arrive."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise RuntimeError(f"weights: {what} did not arrive: the other side is gone or stuck ({first})") from None
