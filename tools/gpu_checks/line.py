"""What a check says: lines that passed, failed or were skipped, and the reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclasses.dataclass(frozen=True)
class Line:
    name: str
    status: str
    detail: str
    """What was compared and found, or why it was not."""
    figures: dict = dataclasses.field(default_factory=dict)
    """The same for programs; no paths, nothing secret: the report is to be published."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a check is given, beside its own arguments."""

    device: str
    """cuda or cpu. On a CPU sizes are small and everything is in float32."""
    folder: Path
    """Its own, removed afterwards."""
    ranks: int = 1
    """Processes that run it together; 1 unless it asks for more."""

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def within(name: str, errors: dict[str, float], bounds: dict[str, float], against: str) -> Line:
    """Passed if every error is at most its bound (which no NaN is)."""
    good = all(errors[what] <= bounds[what] for what in bounds)
    found = ", ".join(f"{what} {errors[what]:.1e} (at most {bounds[what]:.0e})" for what in bounds)
    return Line(name, PASSED if good else FAILED, f"differs from {against}: {found}", errors)


def write(line: Line, results: Path) -> None:
    """At once: a crash costs the lines that were not written yet."""
    with results.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(line)) + "\n")


def read(results: Path) -> list[Line]:
    if not results.exists():
        return []
    # A process that is killed while it writes leaves half a line.
    return [Line(**json.loads(text)) for text in results.read_text().splitlines(keepends=True) if text.endswith("\n")]
