"""Folders that appear complete or not at all: checkpoints, exported models, converted ones."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


def partial_folder(target: Path) -> Path:
    """Where `complete_folder(target)` gathers what becomes `target`; beside it, and so on the same file system."""
    return target.with_name(f".writing_{target.name}")


@contextlib.contextmanager
def complete_folder(target: Path, resume: bool = False) -> Iterator[Path]:
    """Give the partial folder to write in; at the end of the block it is flushed to disk and renamed to `target`.

    At `target` a reader sees what was there before, for a moment nothing, then all that the block wrote: never a part,
    not even after a power cut. An old target moves to `.replaced_NAME`, and is removed when the new one is on disk; it
    stays there after a kill in that moment.

    If the block raises or the process is killed, `target` is as it was, and the partial folder stays: the next attempt
    starts by removing it, or with `resume` goes on with what it holds, whose worth is for the block to know.

    Where several processes write, one opens the block; the others begin after that, and are done before it ends.
    """
    partial, replaced = partial_folder(target), target.with_name(f".replaced_{target.name}")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=resume)
    yield partial
    flush([*partial.rglob("*"), partial])
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    flush([target.parent])
    shutil.rmtree(replaced, ignore_errors=True)


def flush(paths: Iterable[Path]) -> None:
    """Files, or folders in the sense of which names they hold, to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
