"""Live progress of a run: a table on a terminal, elsewhere one plain line a step."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# What is shown of a step: (metric, label, format).
_SHOWN = (
    ("rollout/reward", "reward", "{:.3f}"),
    ("rollout/accuracy", "accuracy", "{:.3f}"),
    ("eval/accuracy", "held out", "{:.3f}"),
    ("policy/loss", "loss", "{:.4f}"),
    ("policy/entropy", "entropy", "{:.3f}"),
    ("policy/deviation", "deviation", "{:.4f}"),
    ("credit/effective_share", "eff. share", "{:.3f}"),
    ("time/tokens_per_s", "tokens/s", "{:,.0f}"),
    ("time/tokens_per_s_per_gpu", "tokens/s a GPU", "{:,.0f}"),
    ("time/tflops_per_rank", "TFLOP/s a rank", "{:,.3g}"),
    ("time/mfu", "MFU", "{:.1%}"),
    ("memory/checkpoint_gib", "GiB saved", "{:.3g}"),
    ("time/step_s", "seconds", "{:.1f}"),
)
_ROWS = 8
# Steps whose mean duration tells the time left: the latest, because responses grow and shrink during a run.
_RECENT = 20


class Progress:
    """Shows the steps of `name` after the first `done` of `total`; `close` it to give the terminal back."""

    def __init__(self, name: str, done: int, total: int) -> None:
        self._name, self._done, self._total = name, done, total
        self._console = Console()
        self._start = time.monotonic()
        self._rows: list[dict] = []
        self._durations: list[float] = []
        self.phase: str | None = None
        """What the run is doing right now."""
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=2)
            self._live.start()
            # A rank that is killed could not show the cursor again.
            self._console.show_cursor(True)

    def show(self, row: dict) -> None:
        """A finished step: its number and metrics."""
        self._rows = [*self._rows, row][-_ROWS:]
        if row["step"] > self._done:
            self._durations = [*self._durations, row["time/step_s"]][-_RECENT:]
        self._done = row["step"]
        if not self._live:
            self._print([*_parts(row), self._left()])

    def amend(self, values: dict[str, float]) -> None:
        """What is known of the step that was shown last after it was."""
        self._rows = [*self._rows[:-1], self._rows[-1] | values]
        if not self._live:
            self._print(_parts(values))

    def _print(self, parts: list[str]) -> None:
        print(f"{self._name} {self._done}/{self._total}: {', '.join(parts)}", flush=True)

    def warn(self, text: str) -> None:
        self._console.print(Text(f"warning: {text}", "yellow"), soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _left(self) -> str:
        if self._done >= self._total:
            return "done"
        if not self._durations:
            return "time left unknown"
        return f"{clock((self._total - self._done) * sum(self._durations) / len(self._durations))} left"

    def _view(self) -> Group:
        present = [entry for entry in _SHOWN if any(entry[0] in row for row in self._rows)]
        table = Table("step", *(label for _, label, _ in present), box=None, header_style="bold")
        for row in self._rows:
            cells = [form.format(row[metric]) if metric in row else "" for metric, _, form in present]
            table.add_row(str(row["step"]), *cells)
        phases = Text("of which " + ", ".join(_phases(self._rows[-1])), "dim") if self._rows else Text()
        bar = Table.grid(padding=(0, 2))
        elapsed = clock(time.monotonic() - self._start)
        bar.add_row(
            f"{self._name} {self._done}/{self._total}",
            ProgressBar(self._total, self._done, width=30),
            f"{elapsed} here, {self._left()}",
            Text(f"{self.phase} …" if self.phase else "", "cyan"),
        )
        return Group(table, phases, bar) if self._rows else Group(bar)


def _parts(row: dict) -> list[str]:
    shown = [f"{label} {form.format(row[metric])}" for metric, label, form in _SHOWN if metric in row]
    return [*shown, *_phases(row)]


def _phases(row: dict) -> list[str]:
    shown = {metric for metric, _, _ in _SHOWN}
    seconds = [name for name in row if name.startswith("time/") and name.endswith("_s") and name not in shown]
    return [f"{name[5:-2]} {row[name]:.1f}" for name in seconds]


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
