"""Runs as their folders have them, and arms: runs that are to differ in their seed alone."""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgpo.config_file import load_config
from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.metrics import read_metrics
from tools.comparison.intervals import Estimate, mean_of

_SECONDS_AN_HOUR = 3600
# More steps than these are named by the first, the last and their number.
_MOST_STEPS = 8
# Of a response's row in step_N.jsonl of eval or eval/SET, for metrics that are its mean; as evaluation.py has them.
_OF_RESPONSE: dict[str, Callable[[dict], float]] = {
    "accuracy": lambda row: float(row["reward"] >= 1.0),
    "reward": lambda row: float(row["reward"]),
    "response_length": lambda row: float(len(row["token_ids"])),
}


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, Any]
    """{section.name: value}, all of them."""
    rows: dict[int, dict[str, float]]
    """{step: {metric: value}} of finite values, by increasing step."""

    @property
    def seed(self) -> int:
        return self.settings["run.seed"]

    @property
    def planned(self) -> int:
        """Steps that the run was to have."""
        return self.settings["run.steps"]

    @property
    def last(self) -> int:
        return max(self.rows)

    def series(self, metric: str) -> dict[int, float]:
        """{step: value}, where it has one."""
        return {step: row[metric] for step, row in self.rows.items() if metric in row}

    def total(self, metric: str) -> float | None:
        """Over all steps; None where no step has it."""
        values = self.series(metric).values()
        return sum(values) if values else None

    def gaps(self) -> list[tuple[int, int]]:
        """[first, last] of steps that are missing between two that are there."""
        steps = [0, *(step for step in self.rows if step)]
        return [(a + 1, b - 1) for a, b in zip(steps, steps[1:], strict=False) if b - a > 1]

    @functools.cached_property
    def tokens(self) -> dict[int, float]:
        """{step: tokens sampled until then}, those that no step trained on among them."""
        return self._sums("rollout/tokens", "rollout/tokens_wasted")

    @functools.cached_property
    def hours(self) -> dict[int, float]:
        """{step: hours of steps until then}; the evaluation of the start is not one."""
        return {step: seconds / _SECONDS_AN_HOUR for step, seconds in self._sums("time/step_s").items()}

    def _sums(self, metric: str, *others: str) -> dict[int, float]:
        """From step 1 on, until the first step without `metric`: from there on the sum is unknown."""
        sums = {0: 0.0}
        for step in range(1, self.last + 1):
            row = self.rows.get(step, {})
            if metric not in row:
                break
            sums[step] = sums[step - 1] + row[metric] + sum(row.get(name, 0.0) for name in others)
        return sums

    def over_problems(self, metric: str, step: int) -> Estimate | None:
        """Mean over problems of the mean over each one's responses; None without the file, or for another metric,
        such as a mean over sets.

        Raises UsageError where the file is none of responses.
        """
        place, _, what = metric.rpartition("/")
        file, measure = self.folder / place / f"step_{step:08d}.jsonl", _OF_RESPONSE.get(what)
        if measure is None or place.split("/")[0] != "eval" or not file.is_file():
            return None
        problems: dict[int, list[float]] = {}
        try:
            with file.open() as stream:
                for row in map(json.loads, stream):
                    problems.setdefault(row["prompt"], []).append(measure(row))
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{shown(file)}: not a file of responses; remove it, or evaluate again") from None
        return mean_of([statistics.fmean(values) for values in problems.values()]) if problems else None


@dataclass(frozen=True)
class Arm:
    name: str
    runs: list[Run]
    """By seed."""

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def doubled_seeds(self) -> list[int]:
        return [seed for seed, count in Counter(self.seeds).items() if count > 1]

    def steps(self, metric: str) -> list[int]:
        """Those at which all of its runs have the metric."""
        return sorted(set.intersection(*(set(run.series(metric)) for run in self.runs)))


def same_seeds(arm: Arm, baseline: Arm) -> list[tuple[Run, Run]]:
    """Pairs of runs; none where seeds are doubled, or so few coincide that pairs would leave no interval."""
    if arm.doubled_seeds or baseline.doubled_seeds:
        return []
    theirs = {run.seed: run for run in baseline.runs}
    pairs = [(run, theirs[run.seed]) for run in arm.runs if run.seed in theirs]
    return pairs if len(pairs) > 1 or len(pairs) == max(len(arm.runs), len(baseline.runs)) else []


def read_run(folder: Path) -> Run:
    """Raises UsageError naming the file that is missing or is not what a run writes."""
    file, config = folder / "metrics" / "train.jsonl", folder / "config.yaml"
    if not file.is_file():
        raise UsageError(f"{shown(folder)}: no metrics/train.jsonl; expected the run.dir of a training run")
    try:
        found = read_metrics(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{shown(file)}: cannot be read: {error}") from None
    rows = {}
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or row["step"] < 0:
            raise UsageError(f"{shown(file)}, line {number}: expected an object with a 'step', found {shown(row)}")
        rows[row["step"]] = {name: float(value) for name, value in row.items() if name != "step" and _finite(value)}
    if not rows:
        raise UsageError(f"{shown(file)}: no step is in it yet; leave this run out, or wait for its first")
    if not config.is_file():
        raise UsageError(
            f"{shown(config)}: no such file; put there the config, with the seed, that the run started with"
        )
    settings = load_config(config).model_dump()
    flat = {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}
    return Run(folder, flat, dict(sorted(rows.items())))


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def steps_text(steps: Iterable[int]) -> str:
    steps = list(steps)
    if len(steps) > _MOST_STEPS:
        return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
