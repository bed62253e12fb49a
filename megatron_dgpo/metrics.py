"""What a run reports: TensorBoard, a JSONL file with the same numbers, and live progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

# What the progress display shows of a step: (metric, label, format).
_SHOWN = (
    ("rollout/reward", "reward", "{:.3f}"),
    ("rollout/accuracy", "accuracy", "{:.3f}"),
    ("eval/accuracy", "eval accuracy", "{:.3f}"),
    ("policy/loss", "loss", "{:.4f}"),
    ("policy/entropy", "entropy", "{:.3f}"),
    ("policy/hellinger2", "H²", "{:.4f}"),
    ("credit/effective_share", "effective share", "{:.3f}"),
    ("time/tokens_per_s", "tokens/s", "{:,.0f}"),
)
_ROWS = 8


class MetricsLog:
    """Collects a step's phases and metrics; with `visible` (rank 0) writes and shows them. A context manager.

    Files: run_dir/metrics/{name}.jsonl and TensorBoard's event files in run_dir/tensorboard.
    """

    def __init__(self, run_dir: Path, name: str, visible: bool) -> None:
        self._file = run_dir / "metrics" / f"{name}.jsonl"
        self._events = run_dir / "tensorboard" / name
        self._name, self._visible = name, visible
        self._phases: dict[str, float] = {}
        self._step_start = time.monotonic()
        self._writer: SummaryWriter | None = None
        self._display: _Display | None = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        if self._writer:
            self._writer.close()
        if self._display:
            self._display.close()

    def start(self, done: int, total: int) -> None:
        """Begin after step `done` of `total`: later rows of an interrupted run are dropped, its steps will come again."""
        if not self._visible:
            return
        kept = [row for row in read_metrics(self._file) if row["step"] <= done] if done else []
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._writer = SummaryWriter(self._events, purge_step=done + 1 if done else 0)
        self._display = _Display(self._name, done, total)
        self._step_start = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds spent inside are added to this step's `time/{name}_s`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - start

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Report a step with its phases' seconds; metrics are named phase/what."""
        seconds = time.monotonic() - self._step_start
        times = {f"time/{name}_s": value for name, value in self._phases.items()} | {"time/step_s": seconds}
        if "rollout/tokens" in metrics:
            times["time/tokens_per_s"] = metrics["rollout/tokens"] / seconds
        self._phases, self._step_start = {}, time.monotonic()
        if not self._writer:
            return
        row = {"step": step, **metrics, **times}
        with self._file.open("a") as stream:
            # JSON has no NaN: a metric without a value is left out of its row.
            stream.write(json.dumps({k: v for k, v in row.items() if math.isfinite(v)}) + "\n")
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._display.show(row)

    def warn(self, text: str) -> None:
        """Tell the user at once."""
        if self._display:
            self._display.warn(text)


class _Display:
    """A live table on a terminal; elsewhere a line a step."""

    def __init__(self, name: str, done: int, total: int) -> None:
        self._console = Console()
        self._rows: list[dict] = []
        self._total = total
        self._start, self._first = time.monotonic(), done
        self._progress = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=self._console,
        )  # fmt: skip
        self._task = self._progress.add_task(name, total=total, completed=done)
        self._live = (
            Live(self._view(), console=self._console, refresh_per_second=2) if self._console.is_terminal else None
        )
        if self._live:
            self._live.start()

    def show(self, row: dict) -> None:
        self._rows = [*self._rows, row][-_ROWS:]
        self._progress.update(self._task, completed=row["step"])
        if self._live:
            self._live.update(self._view())
            return
        shown = [f"{label} {form.format(row[metric])}" for metric, label, form in _SHOWN if metric in row]
        done = row["step"] - self._first
        left = (time.monotonic() - self._start) / done * (self._total - row["step"]) if done else 0.0
        shown += [_phases(row), f"left {left:.0f} s"]
        print(f"step {row['step']}/{self._total}  " + "  ".join(shown), flush=True)

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]warning:[/yellow] {text}", soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _view(self) -> Group:
        present = [entry for entry in _SHOWN if any(entry[0] in row for row in self._rows)]
        table = Table("step", *(label for _, label, _ in present), "seconds by phase", box=None)
        for row in self._rows:
            cells = [form.format(row[metric]) if metric in row else "" for metric, _, form in present]
            table.add_row(str(row["step"]), *cells, _phases(row))
        return Group(table, self._progress)


def _phases(row: dict) -> str:
    phases = {k[5:-2]: v for k, v in row.items() if k.startswith("time/") and k.endswith("_s") and "per_s" not in k}
    return " ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())


def read_metrics(file: Path) -> list[dict]:
    """The rows of a metrics file; a last line that was cut off by a kill is left out."""
    rows = []
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k draws without replacement is correct (unbiased; arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
