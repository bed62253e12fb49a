"""What the study found: the measures of README.md, arm by arm and seed by seed, and differences over pairs of runs."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter
from rich.table import Table

from examples.arithmetic.carries import carries
from examples.comparison.plan import ARMS, EXAMPLES, SEEDS, PlannedRun
from megatron_dgpo.config_file import load_config, plain_settings
from megatron_dgpo.data import load_tokenizer
from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.json_file import replace_text
from megatron_dgpo.manifest import newest, read_manifest
from tools.comparison.charts import style
from tools.comparison.intervals import Estimate, mean_of, verdict
from tools.comparison.page import page
from tools.comparison.report import compare
from tools.comparison.runs import Arm, Run, read_run
from tools.credit.recorded import open_run, read_step
from tools.credit.text import marked, text_of, token_texts
from tools.inspect_credit import on_pivots

METRIC = "eval/accuracy"
PRIMARY = "mean_accuracy"
MEASURES = (PRIMARY, "final_accuracy", "carries_lift")
# What arms are compared with: the whole methods, and the credit alone.
BASELINES = ("grpo", "uniform")
# Of a run's own, by design: entropy_e80 has its own reference.
_OWN = ("run.seed", "model.reference")
# Steps between those whose recorded responses are read for the credit on carries: a second each. The last is always.
_CREDIT_EVERY = 10


def whole_seeds(runs: list[PlannedRun]) -> list[int]:
    """Those that are finished in every arm."""
    return [seed for seed in sorted({run.seed for run in runs}) if all(r.finished for r in runs if r.seed == seed)]


def report(runs: list[PlannedRun], folder: Path) -> dict:
    """Write report.html (of tools/compare_runs.py), comparison.json and comparison.png; returns what the JSON holds.

    Raises UsageError where no seed is finished in every arm, or runs are not pairs.
    """
    seeds = whole_seeds(runs)
    if not seeds:
        lacking = [run.name for run in runs if not run.finished]
        raise UsageError(f"no seed is finished in every arm, so there are no pairs: {', '.join(lacking)} are to be run")
    chosen = [run for run in runs if run.seed in seeds]
    check_pairs(chosen)
    names = list(dict.fromkeys(run.arm for run in chosen))
    arms = [Arm(name, [read_run(run.folder) for run in chosen if run.arm == name]) for name in names]
    baselines = [name for name in BASELINES if name in names] or names[:1]
    comparison = compare(arms, next(arm for arm in arms if arm.name == baselines[0]), METRIC)
    by_arm = {arm.name: [_run(run) for run in arm.runs] for arm in arms}
    start = _starts(chosen[-1].folder)[-1]
    commits = sorted({row.get("commit", "unknown") for run in chosen for row in _starts(run.folder)})
    found = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": start["hosts"],
        "versions": start["versions"],
        "commits": commits,
        "steps": chosen[0].steps,
        "seeds": seeds,
        "seeds_registered": list(SEEDS),
        "unfinished": [run.name for run in runs if not run.finished],
        "overrides": list(chosen[0].overrides),
        "warnings": [*_of_commits(commits), *comparison.warnings],
        "arms": {
            name: {"settings": str(ARMS[name].relative_to(EXAMPLES))}
            | {measure: _estimate([run[measure] for run in own]) for measure in MEASURES}
            | {"runs": own}
            for name, own in by_arm.items()
        },
        "differences": {
            baseline: {name: _differences(own, by_arm[baseline]) for name, own in by_arm.items() if name != baseline}
            for baseline in baselines
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page(comparison), encoding="utf-8")
    replace_text(folder / "comparison.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    draw(found, folder / "comparison.png")
    return found


# Pairs


def check_pairs(runs: list[PlannedRun]) -> None:
    """Raise UsageError unless the runs have the settings of the plan, one start, and the same problems in one order.

    The order is of run.seed, the problems' file and how steps take from it, which dynamic sampling does not change.
    """
    for run in runs:
        planned, had = (_flat(plain_settings(config)) for config in (run.config, load_config(_config(run))))
        for setting, value in planned.items():
            if had[setting] != value:
                raise UsageError(
                    f"{run.folder} was trained with {setting}={shown(had[setting], plain=True)}, and the study says "
                    f"{shown(value, plain=True)}: remove the folder and run it again, or put the setting back"
                )
    first = runs[0]
    origins, problems = _origins(first), _held_out(first)
    for run in runs[1:]:
        theirs = _origins(run)
        different = [
            f"{name} is {origins.get(name)} there and {theirs.get(name)} here (of files the checksum)"
            for name in origins | theirs
            if origins.get(name) != theirs.get(name)
        ]
        if problems != _held_out(run):
            different.append("they were evaluated on different problems")
        if different:
            raise UsageError(
                f"{first.folder} and {run.folder} are no pair: {'; '.join(different)}; remove the one that was made "
                "with other files than are there now, and run it again"
            )


def _config(run: PlannedRun) -> Path:
    return run.folder / "config.yaml"


def _flat(settings: dict[str, dict]) -> dict:
    return {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}


def _origins(run: PlannedRun) -> dict[str, str]:
    """Fingerprints of start and data, and what else orders prompts, as its checkpoint has them."""
    checkpoint = newest(run.folder / "checkpoints")
    manifest = (checkpoint and read_manifest(checkpoint)) or {}
    return {
        setting: fixed[0]
        for setting, (_, *fixed) in manifest.get("origins", {}).items()
        if fixed and setting not in _OWN
    }


def _held_out(run: PlannedRun) -> list[tuple[str, str]]:
    """Questions and answers of its first evaluation."""
    file = run.folder / "eval" / f"step_{0:08d}.jsonl"
    return [(row["question"], row["answer"]) for row in map(json.loads, file.read_text().splitlines())]


# Measures


def _run(run: Run) -> dict:
    accuracy = run.series(METRIC)
    steps = sorted({*range(_CREDIT_EVERY, run.last + 1, _CREDIT_EVERY), run.last})
    on_carries = credit_on_carries(run.folder, steps)
    lifts = [found["lift"] for found in on_carries.values() if found]
    return {
        "seed": run.seed,
        "accuracy": accuracy,
        PRIMARY: statistics.fmean(accuracy.values()),
        "final_accuracy": accuracy[run.last],
        "carries_lift": statistics.fmean(lifts) if lifts else None,
        "carries": on_carries,
        "tokens": {step: run.tokens.get(step) for step in accuracy},
        "hours": run.hours.get(run.last),
        "commits": [row.get("commit", "unknown") for row in _starts(run.folder)],
    }


def credit_on_carries(folder: Path, steps: Sequence[int]) -> dict[int, dict | None]:
    """{step: {credit: the carries' share of all weight, lift: how many times their share of tokens}} as recorded, of
    the responses that the step trained on; None for a step without a carry."""
    recorded = open_run(folder)
    tokenizer = load_tokenizer(recorded.config.model.path)
    found = {}
    for number in steps:
        step = read_step(recorded, number)
        texts = [token_texts(tokenizer, response.token_ids) for response in step.responses]
        marks = [marked(text, carries(text_of(text))) for text in texts]
        found[number] = on_pivots(step.split(step.tokens["credit"]), marks)
    return found


def _starts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def _of_commits(commits: list[str]) -> list[str]:
    found = [f"runs are of {len(commits)} commits: {', '.join(commits)}"] if len(commits) > 1 else []
    dirty = [commit for commit in commits if not commit.isalnum()]
    return found + [f"{commit}: files differed from the commit's" for commit in dirty]


def _estimate(values: Sequence[float | None]) -> dict | None:
    """Over seeds; None unless all of them have the measure."""
    known = [value for value in values if value is not None]
    return dataclasses.asdict(mean_of(known)) if len(known) == len(values) else None


def _differences(runs: list[dict], baseline: list[dict]) -> dict:
    """{measure: mean over seeds of the difference to the baseline's run of the seed, interval, and what it shows}."""
    found = {}
    for measure in MEASURES:
        pairs = [(run[measure], other[measure]) for run, other in zip(runs, baseline, strict=True)]
        own = _estimate([None if None in pair else pair[0] - pair[1] for pair in pairs])
        found[measure] = own and own | {"shows": verdict(Estimate(**own))}
    return found


# Shown


def tables(found: dict) -> list[Table]:
    values = Table("arm", *_titles(), title=f"seeds {', '.join(map(str, found['seeds']))}: mean [95 % interval]")
    for name, arm in found["arms"].items():
        values.add_row(name, *(_text(arm[measure]) for measure in MEASURES))
    shown_tables = [values]
    for baseline, differences in ((name, own) for name, own in found["differences"].items() if own):
        table = Table("arm", *_titles(), title=f"less {baseline}'s of the same seed")
        for name, difference in differences.items():
            table.add_row(name, *(_text(difference[measure]) for measure in MEASURES))
        shown_tables.append(table)
    return shown_tables


def _titles() -> list[str]:
    return [measure.replace("_", " ") for measure in MEASURES]


def _text(value: dict | None) -> str:
    if value is None:
        return "–"
    interval = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{interval}" + (f"\n{value['shows']}" if "shows" in value else "")


def draw(found: dict, picture: Path) -> None:
    """Held-out accuracy against steps and tokens, means over seeds, and what the primary measure is above or below the
    first baseline's."""
    figure = Figure(figsize=(14, 4.5), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    by_step, by_tokens, forest = figure.subplots(1, 3)
    baseline, differences = next(iter(found["differences"].items()))
    styles = {name: style(place) for place, name in enumerate(found["arms"])}
    for name, arm in found["arms"].items():
        colour, line = styles[name]
        steps = list(arm["runs"][0]["accuracy"])
        means = _over_runs(arm, "accuracy", steps)
        for axis, places in ((by_step, steps), (by_tokens, _over_runs(arm, "tokens", steps))):
            axis.plot(places, means, color=colour, linestyle=line, linewidth=1.5, label=name)
    rows = list(differences.items())[::-1]
    for place, (name, difference) in enumerate(rows):
        value, (colour, _) = difference[PRIMARY], styles[name]
        if value["low"] is not None:
            forest.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=2)
        forest.plot(value["mean"], place, "o", color=colour)
    forest.axvline(0, color="#444444", linewidth=0.8)
    forest.set_yticks(range(len(rows)), [name for name, _ in rows])
    forest.set_title(f"mean accuracy less {baseline}'s, 95 % intervals", fontsize=10, loc="left")
    seeds = ", ".join(map(str, found["seeds"]))
    by_step.set_title(f"held-out accuracy, mean of seeds {seeds}, against steps", fontsize=10, loc="left")
    by_tokens.set_title("against tokens sampled", fontsize=10, loc="left")
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_step.legend(fontsize=8, frameon=False)
    for axis in (by_step, by_tokens, forest):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


def _over_runs(arm: dict, name: str, steps: list[int]) -> list[float]:
    """Means; not a number where a run does not know it."""
    values = [[run[name][step] for run in arm["runs"]] for step in steps]
    return [math.nan if None in own else statistics.fmean(own) for own in values]
