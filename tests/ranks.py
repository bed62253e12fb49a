"""Real torch.distributed ranks over gloo for tests: a pool of processes that outlives one test.

`run_ranks(function, world_size, *args)` calls `function(*args)` in `world_size` fresh gloo groups and returns
the list of results by rank. `function` must be importable (a module-level function of a test file or the
package). Importing torch and Megatron takes seconds, so the processes are kept for the next call. A failure on
any rank is raised here with that rank's own traceback; a call that outlasts its limit kills the pool.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from multiprocessing.connection import wait


def _serve(connection, rank: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    if not torch.cuda.is_available():
        # As in conftest.py, before Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        function, args, world_size, rendezvous = task
        try:
            connection.send((True, _run(function, args, rank, world_size, rendezvous)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _run(function, args, rank, world_size, rendezvous):
    from datetime import timedelta

    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    try:
        return function(*args)
    finally:
        from megatron_dgpo.model.parallel import destroy_parallel

        destroy_parallel()
        dist.destroy_process_group()


class _Pool:
    def __init__(self) -> None:
        self.workers: list[tuple] = []

    def grow(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            # Not daemonic: Megatron's checkpoint writer starts processes of its own.
            process = context.Process(target=_serve, args=(theirs, len(self.workers)))
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def kill(self) -> None:
        for _, connection in self.workers:
            connection.close()
        for process, _ in self.workers:
            # One that is idle ends by itself, and with it the process in which Megatron's checkpoint writer keeps a
            # queue, which would outlive a rank that is killed.
            process.join(timeout=3)
            process.kill()
            process.join()
        self.workers.clear()


_pool = _Pool()
atexit.register(_pool.kill)


def run_ranks(function, world_size: int, *args, timeout_s: float = 240) -> list:
    _pool.grow(world_size)
    folder = tempfile.mkdtemp()
    workers = _pool.workers[:world_size]
    try:
        for _, connection in workers:
            connection.send((function, args, world_size, os.path.join(folder, "rendezvous")))
        results: dict[int, object] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        pending = {connection: rank for rank, (_, connection) in enumerate(workers)}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                _pool.kill()
                raise TimeoutError(f"ranks {sorted(pending.values())} of {function.__name__} outlasted {timeout_s} s")
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    ok, value = connection.recv()
                except EOFError:
                    ok, value = False, f"rank {rank} died"
                (results if ok else failures)[rank] = value
                if not ok:
                    # The others may wait for this rank in a collective: give them a moment, no more.
                    deadline = min(deadline, time.monotonic() + 5)
            if failures and not pending:
                break
        if failures:
            _pool.kill()
            raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(world_size)]
    except TimeoutError:
        if failures:
            raise AssertionError("\n".join(f"rank {r}:\n{t}" for r, t in sorted(failures.items()))) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
