"""What is missing from runs, and what a comparison leaves out for it: named, never averaged away."""

from __future__ import annotations

from tools.comparison.runs import Arm, Run, same_seeds, steps_text


def of_arms(arms: list[Arm], baseline: Arm, metric: str) -> list[str]:
    found = []
    for arm in arms:
        found += [*_of_seeds(arm), *_left_out(arm, metric)]
        found += [f"{run.folder}: {text}" for run in arm.runs for text in _of_run(run)]
        if arm is not baseline:
            found += _of_difference(arm, baseline, metric)
    return found


def _of_seeds(arm: Arm) -> list[str]:
    if len(arm.runs) == 1:
        return [f"{arm.name}: one seed, so no interval: what another seed would give is not known"]
    if arm.doubled_seeds:
        seeds = ", ".join(map(str, arm.doubled_seeds))
        return [f"{arm.name}: several runs have seed {seeds}: intervals take them for independent, none are paired"]
    return []


def _left_out(arm: Arm, metric: str) -> list[str]:
    every = sorted(set().union(*(run.series(metric) for run in arm.runs)))
    lacking = {run.folder: [step for step in every if step not in run.series(metric)] for run in arm.runs}
    return [
        f"{arm.name}: {steps_text(steps)} left out of its means, as {folder} has no {metric} there"
        for folder, steps in lacking.items()
        if steps
    ]


def _of_run(run: Run) -> list[str]:
    found = []
    if run.last < run.planned:
        found.append(f"ends at step {run.last} of {run.planned}: killed, stopped, or still running")
    if run.gaps():
        gaps = ", ".join(f"{first} to {last}" if first < last else str(first) for first, last in run.gaps())
        found.append(f"no metrics of step {gaps}")
    for name, sums in (("tokens", run.tokens), ("hours", run.hours)):
        if max(sums) < run.last:
            found.append(f"its {name} are unknown from step {max(sums) + 1} on")
    if skipped := run.total("policy/skipped_steps"):
        found.append(f"{skipped:g} optimizer steps skipped (loss or gradient not finite)")
    if failures := run.total("rollout/grader_failures"):
        found.append(f"{failures:g} gradings failed, and gave reward 0")
    return found


def _of_difference(arm: Arm, baseline: Arm, metric: str) -> list[str]:
    own, theirs = arm.steps(metric), baseline.steps(metric)
    common = [step for step in own if step in theirs]
    names = f"{arm.name} and {baseline.name}"
    found = []
    if not common:
        return [f"{names} have no step of {metric} in common: no difference is given"]
    if own != theirs:
        found.append(f"{names} are measured at different steps: their difference is over {steps_text(common)}")
    paired = {run.seed for run, _ in same_seeds(arm, baseline)}
    alone = sorted({*arm.seeds, *baseline.seeds} - paired)
    if paired and alone:
        seeds = ", ".join(map(str, alone))
        found.append(f"{names}: only one of them has seed {seeds}, which their difference leaves out")
    return found
