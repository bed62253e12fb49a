"""What a comparison of arms says, as numbers and sentences: `page.py` shows it, report.json holds it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_dgpo.errors import UsageError, shown
from tools.comparison import settings, warnings
from tools.comparison.intervals import Estimate, mean_of, verdict, welch
from tools.comparison.runs import Arm, Run, same_seeds

CREDIT = ("credit/effective_share", "credit/tau")
# Of two sums of the same numbers.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Point:
    """Of a curve: a run's, or the mean of an arm's runs at a step, at their mean tokens and hours (None: unknown)."""

    step: int
    tokens: float | None
    hours: float | None
    value: Estimate


@dataclass(frozen=True)
class RunReport:
    folder: str
    seed: int
    steps: int
    planned: int
    final: float
    mean: float
    over_problems: Estimate | None
    skipped_steps: float | None
    grader_failures: float | None
    curves: dict[str, list[Point]]


@dataclass(frozen=True)
class ArmReport:
    """final: at the last of `steps`, which all of its runs have; mean: over them."""

    name: str
    steps: list[int]
    final: Estimate
    mean: Estimate
    curves: dict[str, list[Point]]
    seconds: dict[str, float]
    """{phase: seconds a step}, `step` being the whole."""
    runs: list[RunReport]


@dataclass(frozen=True)
class Difference:
    """Of an arm to the baseline, over the steps that all runs of both have."""

    arm: str
    test: str
    """paired, of the seeds that both have, or Welch."""
    seeds: list[int]
    """Of the pairs."""
    steps: list[int]
    final: Estimate
    final_shows: str
    mean: Estimate
    mean_shows: str


@dataclass(frozen=True)
class Setting:
    name: str
    stage: str
    values: dict[str, list[str]]
    """{arm: values}, several where its runs differ."""


@dataclass(frozen=True)
class Comparison:
    metric: str
    baseline: str
    warnings: list[str]
    arms: list[ArmReport]
    differences: list[Difference]
    settings: list[Setting]


def compare(arms: list[Arm], baseline: Arm, metric: str) -> Comparison:
    """Raises UsageError where an arm has no step with the metric in all of its runs."""
    for arm in arms:
        if not arm.steps(metric):
            folders = ", ".join(shown(run.folder) for run in arm.runs)
            raise UsageError(f"arm {shown(arm.name)}: no step has {metric} in all of {folders}; leave some of them out")
    reports = [_arm_report(arm, metric) for arm in arms]
    differences = [_difference(arm, baseline, metric) for arm in arms if arm is not baseline]
    return Comparison(
        metric=metric,
        baseline=baseline.name,
        warnings=[
            *settings.warnings(arms, baseline),
            *warnings.of_arms(arms, baseline, metric),
            *(text for report in reports for text in _evaluated_again(report, metric)),
        ],
        arms=reports,
        differences=[difference for difference in differences if difference],
        settings=[
            Setting(name, settings.stage_of(name), {arm.name: settings.values_of(arm, name) for arm in arms})
            for name in settings.differing(arms)
        ],
    )


def _evaluated_again(arm: ArmReport, metric: str) -> list[str]:
    """Runs whose eval file is not what their metric was made of: a later evaluation wrote over it."""
    return [
        f"{run.folder}: {metric} is {run.over_problems.mean:.4g} in its eval file of step {arm.steps[-1]}, and "
        f"{run.final:.4g} in its metrics: was it evaluated again?"
        for run in arm.runs
        if run.over_problems and not math.isclose(run.over_problems.mean, run.final, rel_tol=_ROUNDING)
    ]


def _final(run: Run, metric: str, steps: list[int]) -> float:
    return run.rows[steps[-1]][metric]


def _mean(run: Run, metric: str, steps: list[int]) -> float:
    return statistics.fmean(run.rows[step][metric] for step in steps)


def _arm_report(arm: Arm, metric: str) -> ArmReport:
    steps = arm.steps(metric)
    runs = [_run_report(run, metric, steps) for run in arm.runs]
    return ArmReport(
        name=arm.name,
        steps=steps,
        final=mean_of([run.final for run in runs]),
        mean=mean_of([run.mean for run in runs]),
        curves={name: [_point(arm.runs, name, step) for step in arm.steps(name)] for name in (metric, *CREDIT)},
        seconds=_seconds(arm),
        runs=runs,
    )


def _run_report(run: Run, metric: str, steps: list[int]) -> RunReport:
    return RunReport(
        folder=str(run.folder),
        seed=run.seed,
        steps=run.last,
        planned=run.planned,
        final=_final(run, metric, steps),
        mean=_mean(run, metric, steps),
        over_problems=run.over_problems(metric, steps[-1]),
        skipped_steps=run.total("policy/skipped_steps"),
        grader_failures=run.total("rollout/grader_failures"),
        curves={name: [_point([run], name, step) for step in run.series(name)] for name in (metric, *CREDIT)},
    )


def _point(runs: list[Run], metric: str, step: int) -> Point:
    return Point(
        step,
        _mean_if_known(run.tokens.get(step) for run in runs),
        _mean_if_known(run.hours.get(step) for run in runs),
        mean_of([run.rows[step][metric] for run in runs]),
    )


def _mean_if_known(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if len(known) == len(found) else None


def _seconds(arm: Arm) -> dict[str, float]:
    """Of each phase in a step, mean over steps, then over runs; a phase that a step does not have took no time."""
    names = {name for run in arm.runs for row in run.rows.values() for name in row if name.startswith("time/")}
    phases = sorted(name for name in names if name.endswith("_s") and not name.endswith("_per_s"))
    found = {}
    for phase in phases:
        runs = [[row.get(phase, 0.0) for step, row in run.rows.items() if step] for run in arm.runs]
        means = [statistics.fmean(values) for values in runs if values]
        if any(means):
            found[phase.removeprefix("time/").removesuffix("_s")] = statistics.fmean(means)
    return found


def _difference(arm: Arm, baseline: Arm, metric: str) -> Difference | None:
    """None where no step is in all runs of both."""
    steps = sorted(set(arm.steps(metric)) & set(baseline.steps(metric)))
    if not steps:
        return None
    pairs = same_seeds(arm, baseline)

    def estimate(measure: Callable[[Run, str, list[int]], float]) -> Estimate:
        if pairs:
            return mean_of([measure(a, metric, steps) - measure(b, metric, steps) for a, b in pairs])
        return welch(*([measure(run, metric, steps) for run in each.runs] for each in (arm, baseline)))

    final, mean = estimate(_final), estimate(_mean)
    return Difference(
        arm=arm.name,
        test="paired" if pairs else "Welch",
        seeds=[run.seed for run, _ in pairs],
        steps=steps,
        final=final,
        final_shows=verdict(final),
        mean=mean,
        mean_shows=verdict(mean),
    )
