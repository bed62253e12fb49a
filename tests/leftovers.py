"""What a test must not leave behind: processes, threads of process groups, shared memory, temporary files."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil

from megatron_dgpo import process

_MARK = "MEGATRON_DGPO_TESTS"
_SHARED_MEMORY = Path("/dev/shm")
# Processes that were asked to end may take as long on a busy machine.
_PATIENCE_S = 20
# One for all tests: pytest's folders, of which it keeps few, multiprocessing's, and a cache.
_KEPT = ("pytest-of-", "pymp-", "torchinductor_")


def own_temporary_folder() -> Path:
    """From now on temporary files of this process and its children go there; children can be told from others'."""
    os.environ[_MARK] = str(os.getpid())
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="dgpo-")
    # Of the servers that tests start; the commands that they run have their own.
    process._temporary_folder()
    return Path(tempfile.tempdir)


@contextlib.contextmanager
def nothing_left(processes: bool = True) -> Iterator[None]:
    """Fail unless what the body started or wrote is gone, after a moment; processes are ended then."""
    before = _present(processes)
    yield
    deadline = time.monotonic() + _PATIENCE_S
    while (left := _left(before, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        for found in left.values():
            if isinstance(found, psutil.Process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.kill()
        raise AssertionError("the test left behind: " + "; ".join(sorted(map(_described, left.items()))))


def _present(processes: bool) -> dict[object, object]:
    """By what tells each apart."""
    found: dict[object, object] = {}
    if processes:
        found |= {("process", child.pid, child.create_time()): child for child in _children()}
    found |= {("thread", thread.ident): thread for thread in threading.enumerate() if not thread.daemon}
    # All: one that has only just been started has no name of its own yet.
    found |= {("task", task.name): task for task in _tasks()}
    found |= {("file", path): path for path in _SHARED_MEMORY.iterdir()}
    files = Path(tempfile.gettempdir()).iterdir()
    return found | {("file", path): path for path in files if not path.name.startswith(_KEPT)}


def _left(before: dict, processes: bool) -> dict:
    after = {key: found for key, found in _present(processes).items() if key not in before}
    return {key: found for key, found in after.items() if not _is_no_matter(key[0], found)}


def _is_no_matter(kind: str, found: object) -> bool:
    if kind == "task":
        return not _is_of_gloo(found)
    return isinstance(found, Path) and _is_anothers(found)


def _children() -> Iterator[psutil.Process]:
    """Of this process, orphans too, without those that all tests share."""
    shared = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    if process._guardian.cache_info().currsize:
        shared.add(process._guardian().pid)
    own = psutil.Process()
    for child in [*own.children(recursive=True), *_orphans()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.pid not in shared and child.status() != psutil.STATUS_ZOMBIE:
                yield child


def _orphans() -> Iterator[psutil.Process]:
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if candidate.ppid() == 1 and candidate.environ().get(_MARK) == os.environ[_MARK]:
                yield candidate


def _tasks() -> Iterator[Path]:
    """Threads of this process, PyTorch's among them."""
    return Path("/proc/self/task").iterdir()


def _is_of_gloo(task: Path) -> bool:
    with contextlib.suppress(OSError):
        return "gloo" in (task / "comm").read_text()
    return False


def left_in_shared_memory(before: set[Path]) -> list[Path]:
    """What has come since, is still there after a moment, and belongs to no process."""
    deadline = time.monotonic() + _PATIENCE_S
    while left := [path for path in set(_SHARED_MEMORY.iterdir()) - before if not _is_anothers(path)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left


def _is_anothers(path: Path) -> bool:
    """Gone by now, or shared memory that a process has, another worker's of this session perhaps: it ends with that."""
    if path.parent == _SHARED_MEMORY:
        try:
            # A semaphore was mapped under another name than it has now.
            inode = path.stat().st_ino
        except FileNotFoundError:
            return True
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
                if any(f" {inode} " in line and str(_SHARED_MEMORY) in line for line in lines):
                    return True
    # Looking at all processes takes its time.
    return not os.path.lexists(path)


def _described(item: tuple[tuple, object]) -> str:
    (kind, *_), found = item
    if isinstance(found, psutil.Process):
        with contextlib.suppress(psutil.NoSuchProcess):
            return f"process {found.pid} ({' '.join(found.cmdline())[:200]})"
    return f"{kind} {found}"
