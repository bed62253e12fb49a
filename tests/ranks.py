"""Real torch.distributed ranks over gloo for tests, a fresh process for each rank and call.

`run_ranks(function, world_size, *args)` calls `function(*args)` on every rank of a gloo world and returns the results
by rank. `function` must be importable (a module-level function of a test file or the package). A failure on any rank is
raised here with that rank's own traceback; a call that outlasts its limit is ended. Nothing of a call is left when it
returns: processes that were kept for the next one collected the threads of gloo groups that nobody could destroy.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from urllib.parse import urlsplit

from megatron_dgpo.rollout.server import free_port

_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(["tests.rank_preload"])
# For ranks that end by themselves, and for what a failed rank's peers have to say.
_GRACE_S = 5


def run_ranks(function: Callable, world_size: int, *args, timeout_s: float = 240, joined: bool = True) -> list:
    """joined: they are a gloo world already; otherwise their environment says, as a launcher's would, how to be one."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous" if joined else f"tcp://127.0.0.1:{free_port()}"
        ranks: list = []
        connections: list[Connection] = []
        try:
            for rank in range(world_size):
                ours, theirs = _START.Pipe()
                # Not daemonic: Megatron's checkpoint writer starts processes of its own.
                arguments = theirs, rank, world_size, rendezvous, pickle.dumps((function, args))
                ranks.append(_START.Process(target=_serve, args=arguments))
                ranks[-1].start()
                theirs.close()
                connections.append(ours)
            return _results(function, connections, timeout_s)
        finally:
            _end(ranks, connections)


def _results(function: Callable, connections: list[Connection], timeout_s: float) -> list:
    results: dict[int, object] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    pending = {connection: rank for rank, connection in enumerate(connections)}
    while pending and (ready := wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            rank = pending.pop(connection)
            try:
                ok, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                ok, value = False, f"rank {rank} died"
            (results if ok else failures)[rank] = value
        if failures:
            # The others may wait for that rank in a collective.
            deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
    if pending:
        raise TimeoutError(f"ranks {sorted(pending.values())} of {function.__name__} outlasted {timeout_s} s")
    return [results[rank] for rank in range(len(connections))]


def _end(ranks: list, connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + _GRACE_S
    for rank in ranks:
        # One that ends by itself ends the process, too, in which Megatron's checkpoint writer keeps a queue.
        rank.join(timeout=max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.kill()
        rank.join()


def _serve(connection: Connection, rank: int, world_size: int, rendezvous: str, task: bytes) -> None:
    os.setsid()
    assert "tests.rank_preload" in sys.modules, "the fork server could not import tests.rank_preload"
    try:
        answer = True, _run(task, rank, world_size, rendezvous)
    except BaseException:
        answer = False, traceback.format_exc()
    # Not `send`: it would pass tensors by handles, which end with this process.
    connection.send_bytes(pickle.dumps(answer))


def _run(task: bytes, rank: int, world_size: int, rendezvous: str):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    function, args = pickle.loads(task)
    address = urlsplit(rendezvous)
    if address.scheme == "tcp":
        os.environ.update(MASTER_ADDR=address.hostname, MASTER_PORT=str(address.port))
    else:
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
    return function(*args)
