"""Child processes that cannot outlive their parent, and the supervision of several of them."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

_LAST_LINES = 25
_POLL_S = 0.05
_SUPERVISE_S = 0.2
# A culprit has said what it died of before it has ended: how long it may take for that, and may hang in it.
_ENDING_S, _HANGING_S = 5, 60
# For all threads' stacks, into a log.
_STACKS_S = 0.5
# A killed process is gone when the kernel has freed what it held, a GPU's memory perhaps.
_KILLED_S = 10
_STACKS = signal.SIGUSR2

# Reads the children's process groups, and their temporary folder, until its parent is gone, then ends what is left of
# them: first by asking, so that their resource trackers unlink shared memory. (By SIGINT: they may have SIGTERM
# blocked, see stop.py.) Groups, because a dead rank's own children (Megatron's checkpoint writers, vLLM's workers)
# would stay otherwise.
_GUARDIAN = """
trap '' INT TERM HUP USR1
while read -r line; do case "$line" in /*) folder="$line";; *) groups="$groups $line";; esac; done
end() { kill "-$1" "-$group" 2>/dev/null && left="$left $group"; }
for group in $groups; do end INT; done
if [ "$left" ]; then sleep 5; for group in $left; do end KILL; done; fi
[ -z "$folder" ] || rm -rf -- "$folder"
"""

# The last line of a Python traceback, wherever a logger put it.
_ERROR = re.compile(r"(^|\s)([\w.]*(Error|Exception|Interrupt)(: .+|$))")


def error_file(log: Path) -> Path:
    """Where a rank tells what it ends of, before any other rank can notice: see `session.world`."""
    return log.with_suffix(".error")


@dataclass
class Child:
    """A process in a session of its own: Ctrl-C reaches only the parent, which then ends it in order."""

    name: str
    process: subprocess.Popen
    log: Path
    command: list[str]
    env: dict[str, str]

    @property
    def error_file(self) -> Path:
        return error_file(self.log)

    @property
    def silent_since(self) -> float:
        """When it failed, by the clock of the logs' file system, which all nodes share."""
        try:
            return self.error_file.stat().st_mtime
        except OSError:
            return self.log.stat().st_mtime

    @property
    def stopped(self) -> bool:
        """By a signal such as SIGSTOP, until another continues it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        return False

    def ending(self) -> str:
        """How it ended."""
        status = self.process.returncode
        if status is None:
            return "it has failed and does not end"
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def first_error(self) -> str | None:
        """The error that it told, or the first one in its log, which causes the others."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads(self.error_file.read_text())["message"]["message"]
        lines = self._lines()
        return next((m[2] for line in lines if "WARNING" not in line and (m := _ERROR.search(line))), None)

    def failure(self) -> str:
        """The last lines of its log, and its first error."""
        last, first = "\n".join(self._lines()[-_LAST_LINES:]), self.first_error()
        return last if first is None else f"{last}\n\n{self.name}, first error: {first}"

    def _lines(self) -> list[str]:
        try:
            return self.log.read_text(errors="replace").splitlines()
        except OSError:
            return []


@functools.cache
def _guardian() -> subprocess.Popen:
    return subprocess.Popen(["sh", "-c", _GUARDIAN], stdin=subprocess.PIPE, start_new_session=True)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """For all children: vLLM leaves sockets and files in theirs, Megatron's checkpoint writers folders."""
    # Short, as a socket's path has at most 107 characters.
    folder = tempfile.TemporaryDirectory(prefix="dgpo-", ignore_cleanup_errors=True)
    _tell_guardian(folder.name)
    return folder


def _tell_guardian(line: str) -> None:
    pipe = _guardian().stdin
    assert pipe
    pipe.write(f"{line}\n".encode())
    pipe.flush()


def start(
    name: str,
    command: list[str],
    env: dict[str, str],
    log: Path,
    show_output: bool = False,
    kept: tuple[int, ...] = (),
) -> Child:
    """Start a child whose output goes to `log`; with `show_output` only its errors do. kept: descriptors it inherits.

    However this process ends, by `kill -9` too, the child and its own children are gone within seconds, and so is the
    folder of their temporary files.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    error_file(log).unlink(missing_ok=True)
    return Child(name, _started(command, env, log, show_output, kept), log, command, env)


def restart(child: Child) -> None:
    """Start one that has ended, and showed no output, anew, in the same place and with the same log, which goes on.

    What is left of its process group is killed first: an engine of vLLM's outlives its server.
    """
    deadline = time.monotonic() + _KILLED_S
    while _signal_group(child, signal.SIGKILL) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    child.process = _started(child.command, child.env, child.log)


def _started(
    command: list[str], env: dict[str, str], log: Path, show_output: bool = False, kept: tuple[int, ...] = ()
) -> subprocess.Popen:
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=env | {"TMPDIR": _temporary_folder().name},
            stdin=subprocess.DEVNULL,
            stdout=None if show_output else file,
            stderr=file,
            start_new_session=True,
            pass_fds=kept,
        )
    _tell_guardian(str(process.pid))
    return process


def write_stacks(children: Iterable[Child]) -> list[Child]:
    """Have those that run end their logs with the stacks of their threads (`stacks_on_request`); returns them."""
    running = [child for child in children if child.process.poll() is None]
    for child in running:
        child.process.send_signal(_STACKS)
    if running:
        time.sleep(_STACKS_S)
    return running


def stacks_on_request() -> None:
    """In a child: by a handler in C, which runs whatever Python waits for."""
    faulthandler.register(_STACKS)


def stop(children: Iterable[Child], grace_s: float = 10) -> None:
    """Ask every child's process group to end, wait up to `grace_s` for all together, then kill what is left."""
    children = list(children)
    for child in children:
        _signal_group(child, signal.SIGINT)
    deadline = time.monotonic() + grace_s
    # The leader may be gone while its own children linger, or its resource tracker unlinks shared memory.
    while any([_signal_group(child, 0) for child in children]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for child in children:
        _signal_group(child, signal.SIGKILL)
        child.process.wait()


def _signal_group(child: Child, number: int) -> bool:
    """Whether the group has processes left."""
    child.process.poll()
    try:
        os.killpg(child.process.pid, number)
    except ProcessLookupError:
        return False
    return True


def supervise(
    workers: list[Child],
    servers: list[Child],
    good: tuple[int, ...] = (0,),
    revived: Callable[[Child], bool] = lambda server: False,
    look: Callable[[], None] = lambda: None,
) -> Child | None:
    """Wait until every worker has ended well (None), or until any worker fails or a server ends for good (that child).

    Without workers: until a server does. Of several that failed, the first to say so or to fall silent, though it may
    end after its peers, whose connections it closed, or hang in its end. good: exit statuses of a worker that has ended
    well. revived: whether a server that has ended, however, runs again. look: called now and then; what it raises ends
    the waiting.
    """
    heard = math.inf
    while True:
        look()
        failed = [child for child in workers if child.process.poll() not in (None, *good)]
        told = [child for child in workers if child.error_file.exists()]
        if not failed and workers and all(child.process.returncode is not None for child in workers):
            return None
        heard = min(heard, time.monotonic()) if told else math.inf
        if not failed:
            failed = [child for child in servers if child.process.poll() is not None and not revived(child)]
        if failed or time.monotonic() > heard + _HANGING_S:
            first = min([*failed, *told], key=lambda child: child.silent_since)
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.process.wait(_ENDING_S)
            return first
        time.sleep(_SUPERVISE_S)
