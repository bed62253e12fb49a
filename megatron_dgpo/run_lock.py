"""One run a folder: `run.dir` belongs to one launcher and its ranks, on whatever node of a shared file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_dgpo.errors import UsageError

_POLL_S = 0.2
# The ranks of a launcher that was killed are ended within seconds, and keep the folder as long; where a job's node is
# lost, its file system's server keeps it for minutes.
PATIENCE_S, _OWN_JOB_S = 30.0, 600.0


@contextlib.contextmanager
def run_lock(run_dir: Path, patience_s: float = PATIENCE_S) -> Iterator[int]:
    """Hold the folder until the block ends, and until every child that inherits the descriptor has ended; yields it.

    Raises UsageError naming who holds it: at once where that process runs on this machine, else after `patience_s`, or
    ten minutes for an earlier start of the same SLURM job.
    """
    file, job = run_dir / ".lock", os.environ.get("SLURM_JOB_ID")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"run.dir={run_dir}: {file} cannot be opened: {error.strerror}") from None
    try:
        begin, told = time.monotonic(), False
        while not _locked(descriptor):
            holder = _holder(file)
            limit_s = _OWN_JOB_S if job and holder.get("job") == job else patience_s
            if not told and not _runs_here(holder):
                print(f"waiting for run.dir={run_dir}, held by {_described(holder)}", file=sys.stderr, flush=True)
                told = True
            if time.monotonic() > begin + limit_s or _runs_here(holder):
                raise UsageError(
                    f"run.dir={run_dir} is in use by {_described(holder)}: end that run, or give another run.dir"
                )
            time.sleep(_POLL_S)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(own | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print("warning: run.dir's file system has no locks: nobody else must train there", file=sys.stderr, flush=True)
    return True


def _holder(file: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        if isinstance(found := json.loads(file.read_text()), dict):
            return found
    return {}


def _runs_here(holder: dict) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _described(holder: dict) -> str:
    if not holder.keys() >= {"host", "pid", "since"}:
        return "another process"
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder['pid']} on {holder['host']} since {holder['since']}"
