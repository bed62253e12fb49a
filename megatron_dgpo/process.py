"""Child processes that cannot outlive their parent, and the supervision of several of them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 25


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Child:
    """A process in a session of its own: Ctrl-C reaches only the parent, which then ends it in order."""

    name: str
    process: subprocess.Popen
    log: Path

    def last_lines(self, count: int = _LAST_LINES) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
        except OSError:
            return ""


def start(name: str, command: list[str], env: dict[str, str], log: Path, show_output: bool = False) -> Child:
    """Start a child whose output goes to `log`; with `show_output` only its errors do.

    The kernel kills the child when the thread that started it ends, so that even `kill -9` leaves nothing running.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=None if show_output else file,
            stderr=file,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    return Child(name, process, log)


def stop(children: Iterable[Child], grace_s: float = 10) -> None:
    """Ask every child's process group to end, wait up to `grace_s` for all together, then kill what is left."""
    children = list(children)
    for child in children:
        _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
    for child in children:
        # The leader may be gone while its own children linger.
        _signal_group(child, signal.SIGKILL)
        child.process.wait()


def _signal_group(child: Child, number: signal.Signals) -> None:
    try:
        os.killpg(child.process.pid, number)
    except ProcessLookupError:
        pass


def supervise(workers: list[Child], servers: list[Child], poll_s: float = 0.2) -> Child | None:
    """Wait until every worker has ended well (None), or until any worker fails or any server ends (that child)."""
    while True:
        for child in workers:
            if child.process.poll() not in (None, 0):
                return child
        if all(child.process.returncode == 0 for child in workers):
            return None
        for child in servers:
            if child.process.poll() is not None:
                return child
        time.sleep(poll_s)
