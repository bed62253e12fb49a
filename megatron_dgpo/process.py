"""Child processes that cannot outlive their parent, and the supervision of several of them."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LAST_LINES = 25
_POLL_S = 0.05
_SUPERVISE_S = 0.2

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


@dataclass
class Child:
    """A process in a session of its own: Ctrl-C reaches only the parent, which then ends it in order."""

    name: str
    process: subprocess.Popen
    log: Path

    def failure(self) -> str:
        """The first error in its log, which causes the others, and the last lines."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        last = "\n".join(lines[-_LAST_LINES:])
        first = next((m[2] for line in lines if "WARNING" not in line and (m := _ERROR.search(line))), None)
        return last if first is None else f"{last}\n\n{self.name}, first error: {first}"


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


def start(name: str, command: list[str], env: dict[str, str], log: Path, show_output: bool = False) -> Child:
    """Start a child whose output goes to `log`; with `show_output` only its errors do.

    However this process ends, by `kill -9` too, the child and its own children are gone within seconds, and so is the
    folder of their temporary files.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=env | {"TMPDIR": _temporary_folder().name},
            stdin=subprocess.DEVNULL,
            stdout=None if show_output else file,
            stderr=file,
            start_new_session=True,
        )
    _tell_guardian(str(process.pid))
    return Child(name, process, log)


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


def supervise(workers: list[Child], servers: list[Child], good: tuple[int, ...] = (0,)) -> Child | None:
    """Wait until every worker has ended well (None), or until any worker fails or any server ends (that child).

    Without workers: until a server ends. Of several that failed at once, the first to fall silent: its peers wrote
    their tracebacks after it. good: exit statuses of a worker that has ended well.
    """
    while True:
        if failed := [child for child in workers if child.process.poll() not in (None, *good)]:
            return min(failed, key=lambda child: child.log.stat().st_mtime)
        if workers and all(child.process.returncode is not None for child in workers):
            return None
        for child in servers:
            if child.process.poll() is not None:
                return child
        time.sleep(_SUPERVISE_S)
