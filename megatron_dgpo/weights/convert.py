"""Conversion between Hugging Face directories, Megatron checkpoints and ModelOpt FP8, one tensor at a time.

Output files are the units of work: any process writes any of them, and one that is there is complete. So a conversion
that was killed goes on from what its partial folder holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_dgpo.complete_folder import complete_folder, partial_folder
from megatron_dgpo.errors import UsageError
from megatron_dgpo.manifest import check_architecture, read_manifest
from megatron_dgpo.weights import fp8
from megatron_dgpo.weights.architectures import Architecture, read_architecture
from megatron_dgpo.weights.directory import (
    FILE_BYTES,
    HfDirectory,
    Safetensors,
    SafetensorsWriter,
    bytes_of,
    copy_small_files,
    group,
)
from megatron_dgpo.weights.distributed import DistributedCheckpoint, DistributedWriter, dtype_name
from megatron_dgpo.weights.formats import is_distributed

# PyTorch's writer holds all tensors of a distributed file until it is closed, so these are small.
_DISTRIBUTED_FILE_BYTES = 256 * 10**6
_PLAN = ".plan.json"
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1

Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is converted into what; `kind` of the target is hf, megatron or fp8."""

    source: Path
    target: Path
    kind: str
    dtype: str | None = None
    """Of the target's weights; None: the source's (fp8: of what is not quantised, bfloat16 for float32)."""
    like: Path | None = None
    """Directory with config and tokenizer, where the source has none: it is a training checkpoint."""
    file_bytes: int | None = None
    """No output file is larger, unless a single tensor is."""

    @property
    def work(self) -> Path:
        return partial_folder(self.target)


def detect_kind(path: Path) -> str:
    """Raises UsageError when it is neither."""
    if is_distributed(path):
        return "megatron"
    if path.is_dir() and (any(path.glob("*.safetensors")) or (path / "config.json").is_file()):
        return "hf"
    raise UsageError(f"{path} is neither a Hugging Face directory (config.json) nor a Megatron checkpoint (.metadata)")


def convert(job: Job, workers: int = 1, verify: bool = False, force: bool = False) -> None:
    """Write job.target, complete or not at all, with `workers` processes.

    With `verify`, what was written is compared with the source before it appears; a target that is there already is
    compared and left as it is. Raises UsageError for bad input, a target that is there without `force`, and
    differences.
    """
    _conversion.cache_clear()
    if job.source.resolve() == job.target.resolve():
        raise UsageError(f"{job.target} is both source and target: give another target")
    if job.kind == "fp8":
        fp8.check_installed()
    if verify and job.target.is_dir() and not force:
        _verify(job, job.target, workers)
        return
    if job.target.exists() and not force:
        raise UsageError(f"{job.target} exists: use --force to replace it, or --verify to compare it with the source")
    conversion = _conversion(job, job.work)
    with _claimed(job), complete_folder(job.target, resume=True):
        todo = [number for number in range(len(conversion.files)) if not conversion.target.is_done(number)]
        _run_all(_write_file, job, job.work, todo, workers, "converting")
        conversion.finish()
        if verify:
            try:
                _verify(job, job.work, workers)
            except UsageError:
                # Nothing in it can be trusted: the next attempt starts from nothing.
                shutil.rmtree(job.work)
                raise
        (job.work / _PLAN).unlink()


# The work folder


@contextlib.contextmanager
def _claimed(job: Job) -> Iterator[None]:
    """Hold the work folder against other conversions; what it has of another job or source is dropped."""
    job.work.mkdir(parents=True, exist_ok=True)
    folder = os.open(job.work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{job.work} is in use: another conversion to {job.target} is running") from None
        plan = json.dumps([dataclasses.asdict(job), _fingerprint(job.source)], default=str)
        path = job.work / _PLAN
        if not path.is_file() or path.read_text() != plan:
            for file in job.work.iterdir():
                file.unlink()
            path.write_text(plan)
        yield
    finally:
        os.close(folder)


def _fingerprint(source: Path) -> list:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(source.iterdir())]


# Source and target


class Conversion:
    """A job with its source checked and its output files planned; made anew in every process."""

    def __init__(self, job: Job, folder: Path) -> None:
        """folder: where output is written or, to verify it, read."""
        self._job, self._folder = job, folder
        self._model_dir = job.like or job.source
        if not (self._model_dir / "config.json").is_file() and is_distributed(job.source):
            raise UsageError(
                f"{self._model_dir / 'config.json'} is missing, as in every training checkpoint: give --like with the "
                "Hugging Face directory that the run started from"
            )
        self.architecture = read_architecture(self._model_dir)
        self._source = _open_source(job.source, self.architecture)
        self._dtype = self._output_dtype()
        limit = job.file_bytes or (_DISTRIBUTED_FILE_BYTES if job.kind == "megatron" else FILE_BYTES)
        self.files = group(list(self.architecture.parameters), self.nbytes, limit)
        """The Megatron parameters that go into each output file."""
        self.target: DistributedWriter | SafetensorsWriter
        if job.kind == "megatron":
            self.target = DistributedWriter(folder, self.architecture, self.files, self._dtype)
        else:
            self.target = SafetensorsWriter(folder, self.files, self._layout)

    def tensors(self, name: str) -> Tensors:
        """What is written of Megatron parameter `name`, under Hugging Face names."""
        for source, tensor in self._source.tensors(name):
            yield from self._encode(source, tensor)

    def nbytes(self, name: str) -> int:
        return sum(tensor.nbytes for tensor in self._layout(name).values())

    def write(self, number: int, count: Callable[[int], None]) -> None:
        """Write one file, reporting bytes to `count` as they are made."""

        def tensors(name: str) -> Tensors:
            for item in self.tensors(name):
                yield item
                count(item[1].nbytes)

        self.target.write(number, tensors)

    def finish(self) -> None:
        """Add what is not weights, once all files are written."""
        self.target.finish()
        copy_small_files(self._model_dir, self._folder, self._dtype)
        if self._job.kind == "fp8":
            fp8.write_config(self._folder, list(self.architecture.hf_shapes))

    def differences(self, number: int, count: Callable[[int], None]) -> list[str]:
        """Tensors of one output file whose checksums are not those of the source."""
        wrong = []
        for name in self.files[number]:
            expected = {source: _checksum(tensor) for source, tensor in self.tensors(name)}
            found = {source: _checksum(tensor) for source, tensor in self._written(name, list(expected))}
            wrong += [source for source in expected if found[source] != expected[source]]
            count(self.nbytes(name))
        return wrong

    @functools.cached_property
    def _output(self) -> DistributedCheckpoint | HfDirectory | Safetensors:
        if self._job.kind == "fp8":
            return Safetensors(self._folder)
        return _open_source(self._folder, self.architecture)

    def _written(self, name: str, sources: list[str]) -> Tensors:
        if isinstance(self._output, Safetensors):
            return ((source, self._output[source]) for source in sources)
        return self._output.tensors(name)

    def _encode(self, name: str, tensor: torch.Tensor) -> Tensors:
        tensor = tensor.to(self._dtype)
        if self._job.kind == "fp8":
            yield from fp8.quantize(name, tensor)
        else:
            yield name, tensor

    def _layout(self, name: str) -> dict[str, torch.Tensor]:
        """What `tensors` yields, on the meta device: shapes and dtypes only."""
        shapes = self.architecture.hf_shapes
        empty = (
            (source, torch.empty(shapes[source], device="meta")) for source in self.architecture.parameters[name][1:]
        )
        return dict(item for source, tensor in empty for item in self._encode(source, tensor))

    def _output_dtype(self) -> torch.dtype:
        if self._job.dtype:
            return getattr(torch, self._job.dtype)
        (first, dtype), *rest = self._source.dtypes.items()
        for name, other in rest:
            if other != dtype:
                raise UsageError(
                    f"{self._job.source}: tensor {name} is {dtype_name(other)}, but {first} is {dtype_name(dtype)}: "
                    "the model mixes types; give --dtype to make them one"
                )
        return torch.bfloat16 if self._job.kind == "fp8" and dtype == torch.float32 else dtype


def _open_source(path: Path, architecture: Architecture) -> DistributedCheckpoint | HfDirectory:
    if detect_kind(path) == "hf":
        return HfDirectory(path, architecture)
    manifest = read_manifest(path)
    if manifest:
        check_architecture(path, manifest, architecture)
    return DistributedCheckpoint(path, architecture)


def _checksum(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, zlib.crc32(bytes_of(tensor))


# Processes


_bytes_done: Any = None


def _start_worker(counter, in_process: bool) -> None:
    global _bytes_done
    _bytes_done = counter
    if not in_process:
        # Even kill -9 of the parent leaves nobody waiting for work.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        torch.set_num_threads(1)


@functools.lru_cache(maxsize=1)
def _conversion(job: Job, folder: Path) -> Conversion:
    return Conversion(job, folder)


def _count(nbytes: int) -> None:
    with _bytes_done.get_lock():
        _bytes_done.value += nbytes


def _write_file(job: Job, folder: Path, number: int) -> list[str]:
    _conversion(job, folder).write(number, _count)
    return []


def _compare_file(job: Job, folder: Path, number: int) -> list[str]:
    return _conversion(job, folder).differences(number, _count)


def _verify(job: Job, folder: Path, workers: int) -> None:
    numbers = range(len(_conversion(job, folder).files))
    wrong = _run_all(_compare_file, job, folder, numbers, workers, "verifying")
    if wrong:
        raise UsageError(f"{folder}: tensor {wrong[0]} differs from {job.source} ({len(wrong)} such in all)")


def _run_all(task: Callable, job: Job, folder: Path, numbers: Iterable[int], workers: int, verb: str) -> list[str]:
    """Call task(job, folder, number) for every number in `workers` processes; returns what they return, joined."""
    conversion = _conversion(job, folder)
    total = sum(conversion.nbytes(name) for number in numbers for name in conversion.files[number])
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _executor(workers, counter) as executor, Progress(*columns) as progress:
        bar = progress.add_task("", total=total)
        pending = {executor.submit(task, job, folder, number) for number in numbers}
        results = []
        try:
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
                results += [name for future in done for name in future.result()]
                progress.update(bar, completed=counter.value)
        except BrokenProcessPool:
            raise UsageError(
                "a process was killed, perhaps for want of memory: run again, with fewer --workers"
            ) from None
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
    return results


def _executor(workers: int, counter) -> Executor:
    if workers == 1:
        return ThreadPoolExecutor(1, initializer=_start_worker, initargs=(counter, True))
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(counter, False))
