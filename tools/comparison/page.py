"""A comparison as one HTML file that needs no network and no script. All text in it is escaped, whoever wrote it."""

from __future__ import annotations

from html import escape

from tools.comparison import charts
from tools.comparison.intervals import Estimate
from tools.comparison.report import ArmReport, Comparison, Difference, RunReport
from tools.html_page import note, table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto }
.warnings { background: #fff4e0; padding: .6rem 1rem .6rem 2.2rem; border-left: 4px solid #e69f00 }
.arms span { display: inline-block; margin-right: 1.6rem }
.arms i { display: inline-block; width: 1.6rem; margin-right: .5rem; vertical-align: middle }
.note { color: #555 }
"""
_NONE = "–"


def page(comparison: Comparison) -> str:
    """The whole file."""
    title = f"{comparison.metric} of {len(comparison.arms)} arms"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _warnings(comparison),
        "<h2>Values</h2>",
        _values(comparison),
        f"<h2>Differences to {escape(comparison.baseline)}</h2>",
        _differences(comparison),
        "<h2>Curves</h2>",
        _curves(comparison),
        "<h2>Settings in which arms differ</h2>",
        _settings(comparison),
        "<h2>Runs</h2>",
        _runs(comparison),
        "<h2>Credit along training</h2>",
        _credit(comparison),
        "<h2>Seconds a step</h2>",
        _seconds(comparison),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _warnings(comparison: Comparison) -> str:
    if not comparison.warnings:
        return note("Nothing to warn of: arms differ in one stage at most, and no run has stopped early.")
    return f'<ul class="warnings">{"".join(f"<li>{escape(text)}</li>" for text in comparison.warnings)}</ul>'


def _values(comparison: Comparison) -> str:
    rows = [
        [arm.name, str(len(arm.runs)), str(arm.steps[-1]), str(arm.final), str(len(arm.steps)), str(arm.mean)]
        for arm in comparison.arms
    ]
    metric = comparison.metric
    header = ["arm", "runs", "last step", f"{metric} there", "evaluated steps", f"{metric}, mean over them"]
    return table(header, rows) + note(
        "In brackets: 95 % intervals of Student's t over runs, for how much other seeds would change a mean. Steps are "
        "those that all runs of an arm have; the mean over them is the area under the curve."
    )


def _differences(comparison: Comparison) -> str:
    rows = [
        [
            d.arm,
            _test(d),
            str(d.steps[-1]),
            *(f"{d.final}", d.final_shows),
            *(f"{d.mean}", d.mean_shows),
        ]
        for d in comparison.differences
    ]
    header = ["arm", "test", "last step", "difference there", "shows", "difference of means", "shows"]
    text = "Paired: of runs with the same seed, one difference a pair. Welch: of means of independent runs. "
    text += "An interval that holds 0 shows no difference, which is not to say that there is none."
    if len(rows) > 1:
        text += f" Each of the {len(rows)} arms has its own 95 %: nothing is corrected for their number."
    return (table(header, rows) if rows else "") + note(text)


def _test(difference: Difference) -> str:
    seeds = f"seed{'s' if len(difference.seeds) > 1 else ''} {', '.join(map(str, difference.seeds))}"
    return f"paired, {seeds}" if difference.seeds else difference.test


def _curves(comparison: Comparison) -> str:
    return (
        _legend(comparison)
        + charts.of_metric(comparison)
        + note(
            "Thick: mean of an arm's runs at the steps that all have, with the 95 % interval over runs; thin: single "
            "runs. An arm's mean stands at the mean tokens and hours of its runs at that step. Tokens: rollout/tokens "
            "and rollout/tokens_wasted; hours: time/step_s, without what was repeated after a kill."
        )
    )


def _legend(comparison: Comparison) -> str:
    found = []
    for place, arm in enumerate(comparison.arms):
        colour, line = charts.style(place)
        found.append(f'<span><i style="border-top: 3px {line} {colour}"></i>{escape(arm.name)}</span>')
    return f'<p class="arms">{"".join(found)}</p>'


def _settings(comparison: Comparison) -> str:
    names = [arm.name for arm in comparison.arms]
    rows = [[s.stage, s.name, *(", ".join(s.values[name]) for name in names)] for s in comparison.settings]
    return table(["stage", "setting", *names], rows) if rows else note("None, but for run.dir and run.seed.")


def _runs(comparison: Comparison) -> str:
    rows = [_run(arm, run) for arm in comparison.arms for run in arm.runs]
    header = ["arm", "folder", "seed", "steps", "last value", "over problems", "mean value", "skipped", "not graded"]
    return table(header, rows) + note(
        "Over problems: the mean over problems of the mean over each one's responses, and its 95 % interval, for how "
        "much other problems of the kind would change it; from the run's eval file of its arm's last step. Skipped: "
        "optimizer steps; not graded: responses whose grader failed."
    )


def _run(arm: ArmReport, run: RunReport) -> list[str]:
    return [
        *(arm.name, run.folder, str(run.seed)),
        str(run.steps) if run.steps >= run.planned else f"{run.steps} of {run.planned}",
        *(_number(run.final), _estimate(run.over_problems), _number(run.mean)),
        *(_number(run.skipped_steps), _number(run.grader_failures)),
    ]


def _credit(comparison: Comparison) -> str:
    chart = charts.of_credit(comparison)
    if chart is None:
        return note("No run has credit/effective_share or credit/tau.")
    lacking = [
        f"{name}: {', '.join(arms)}"
        for name in comparison.arms[0].curves
        if (arms := [arm.name for arm in comparison.arms if not arm.curves[name]])
    ]
    return (
        _legend(comparison)
        + chart
        + (note(f"Not measured in all runs of these arms: {'; '.join(lacking)}.") if lacking else "")
    )


def _seconds(comparison: Comparison) -> str:
    phases = sorted({phase for arm in comparison.arms for phase in arm.seconds} - {"step"})
    rows = [[arm.name, *(_number(arm.seconds.get(phase)) for phase in ("step", *phases))] for arm in comparison.arms]
    return table(["arm", "whole step", *phases], rows) + note("Means over steps, then over runs.")


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"


def _estimate(value: Estimate | None) -> str:
    return _NONE if value is None else str(value)
