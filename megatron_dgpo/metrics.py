"""What a run reports: a JSONL file, TensorBoard and W&B with the same numbers; `progress.py` shows them."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from torch.utils.tensorboard import SummaryWriter

from megatron_dgpo.json_file import replace_text
from megatron_dgpo.progress import Progress, clock
from megatron_dgpo.throughput import Throughput
from megatron_dgpo.trace import named_range
from megatron_dgpo.wandb_run import WandbRun


class MetricsLog:
    """Collects a step's phases and metrics; with `visible` (rank 0) writes and shows them. A context manager.

    Files: run_dir/metrics/{name}.jsonl, a JSON object a step with null for what is not finite, and TensorBoard's in
    run_dir/tensorboard/{name}.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        visible: bool,
        throughput: Throughput | None = None,
        wandb: WandbRun | None = None,
    ) -> None:
        self._file = run_dir / "metrics" / f"{name}.jsonl"
        self._events = run_dir / "tensorboard" / name
        self._name, self._visible = name, visible
        self._throughput = throughput or Throughput(ranks=1)
        self._wandb = wandb
        self._phases: dict[str, float] = {}
        self._step_start = time.monotonic()
        self._writer: SummaryWriter | None = None
        self._progress: Progress | None = None
        self._row: dict = {}
        """Of the step that was written last."""

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, error, *_) -> None:
        if self._writer:
            self._writer.close()
        if self._progress:
            self._progress.close()
        if self._wandb:
            self._wandb.close(failed=error is not None)

    def start(self, done: int, total: int) -> None:
        """Begin after step `done` of `total`.

        What an interrupted run wrote about later steps goes, from both files: those steps will come again.
        """
        if not self._visible:
            return
        # With no step done, step 0, the evaluation of the start, comes again too.
        first = done + 1 if done else 0
        kept = [row for row in read_metrics(self._file) if row["step"] < first]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._file, "".join(json.dumps(row) + "\n" for row in kept))
        self._writer = SummaryWriter(self._events, purge_step=first)
        self._progress = Progress(self._name, done, total)
        if self._wandb and (problem := self._wandb.start()):
            self.warn(problem)
        self._step_start = time.monotonic()

    @contextlib.contextmanager
    def startup(self, what: str) -> Iterator[None]:
        """What is done or waited for inside belongs to no step; it is told when it begins."""
        if self._visible:
            seconds = time.time() - psutil.Process().create_time()
            print(f"{self._name}: {what} ({clock(seconds)} since the start)", flush=True)
        yield
        self._step_start = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds spent inside are added to this step's `time/{name}_s`."""
        start = time.monotonic()
        if self._progress:
            self._progress.phase = name
        try:
            with named_range(name):
                yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - start
            if self._progress:
                self._progress.phase = None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Report a step with its phases' seconds; metrics are named phase/what. Steps must increase."""
        seconds = time.monotonic() - self._step_start
        times = {f"time/{name}_s": value for name, value in self._phases.items()} | {"time/step_s": seconds}
        times |= self._throughput.rates(metrics | times)
        self._phases, self._step_start = {}, time.monotonic()
        if not (self._writer and self._progress):
            return
        values = {name: float(value) for name, value in (metrics | times).items()}
        # JSON has no NaN and no infinity; null keeps their place.
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        with self._file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        self._row = row
        self._draw(step, values)
        self._progress.show({"step": step, **values})

    def saved(self, metrics: dict[str, float]) -> None:
        """A checkpoint, with its `metrics` and whatever else was a phase since the last `write`, is of that step,
        beside its `time/step_s`."""
        phases, self._phases, self._step_start = self._phases, {}, time.monotonic()
        if not self._progress:
            return
        names = {f"time/{name}_s": seconds for name, seconds in phases.items()}
        values = metrics | {name: (self._row.get(name) or 0.0) + seconds for name, seconds in names.items()}
        before = self._file.read_text().splitlines(keepends=True)[:-1]
        self._row |= values
        replace_text(self._file, "".join(before) + json.dumps(self._row) + "\n")
        self._draw(self._row["step"], values)
        self._progress.amend(values)

    def _draw(self, step: int, values: dict[str, float]) -> None:
        assert self._writer
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        if self._wandb and (problem := self._wandb.log(step, values)):
            self.warn(problem)

    def warn(self, text: str) -> None:
        """Tell the user at once."""
        if self._progress:
            self._progress.warn(text)


def read_metrics(file: Path) -> list[dict]:
    """The rows of a metrics file; a last line that was cut off by a kill is left out. No file: no rows."""
    rows = []
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k ≤ `samples` responses to a problem, drawn without replacement, is correct, when
    `correct` of them are: the unbiased estimate of pass@k (arXiv 2107.03374, eq. 1).
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def accuracy_interval(samples: int, correct: Sequence[int]) -> tuple[float, float]:
    """95 % interval of avg@k for other problems of the kind; correct: how many of each problem's `samples` are.

    Wilson's (1927) for as many independent answers as the problems are worth: p(1 - p) over the variance of the mean of
    the problems' shares, since responses to one problem are not independent, and, unlike Student's t or a bootstrap
    over problems, it stays within [0, 1] and has a width where all problems are alike. That number is the problems'
    where they are all alike, and at most the responses'.
    """
    shares, problems = [count / samples for count in correct], len(correct)
    mean = statistics.fmean(shares)
    variance = statistics.variance(shares) / problems if problems > 1 else 0.0
    worth = min(mean * (1 - mean) / variance, problems * samples) if variance else problems
    z = statistics.NormalDist().inv_cdf(0.975)
    centre = mean + z**2 / (2 * worth)
    half = z * math.sqrt(mean * (1 - mean) / worth + (z / (2 * worth)) ** 2)
    scale = 1 + z**2 / worth
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
