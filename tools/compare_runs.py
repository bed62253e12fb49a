"""Compare training runs: arms of one run a seed each, with intervals, and what else differs between them.

    python tools/compare_runs.py 'grpo=runs/grpo_*' 'dgpo=runs/dgpo_*'                   # the first is the baseline
    python tools/compare_runs.py 'a=runs/a/seed_*' 'b=runs/b/seed_*' 'c=runs/c/seed_*' --baseline b --out comparison
    python tools/compare_runs.py 'k1=runs/k1_*' 'k4=runs/k4_*' --metric rollout/accuracy

A glob stands for run folders (run.dir); quote it, so that the shell leaves it alone. Writes report.html, one file that
needs no network, and report.json with the same numbers. Read from each run: metrics/train.jsonl, config.yaml, and the
eval file of its last common evaluation. Seeds make the intervals: five an arm show more than two.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import glob
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # This file is run as a script; what it uses are modules of the folder above.
    sys.path.insert(0, str(ROOT))

from megatron_dgpo.errors import UsageError, shown  # noqa: E402
from tools.comparison.page import page  # noqa: E402
from tools.comparison.report import Comparison, compare  # noqa: E402
from tools.comparison.runs import Arm, read_run  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        arms = _read_arms(options.arms)
        _check_metric(arms, options.metric)
        comparison = compare(arms, _baseline(arms, options.baseline), options.metric)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.html").write_text(page(comparison), encoding="utf-8")
        text = json.dumps(dataclasses.asdict(comparison), indent=1, allow_nan=False)
        (options.out / "report.json").write_text(text + "\n")
    except (UsageError, OSError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    _show(comparison, Console())
    print(options.out / "report.html")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="NAME=GLOB", help="an arm and its run folders, one a seed")
    parser.add_argument("--baseline", metavar="NAME", help="arm that the others are compared with; default: the first")
    parser.add_argument("--metric", default="eval/accuracy", help="of metrics/train.jsonl; default: eval/accuracy")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="default: here")
    return parser.parse_args(arguments)


def _read_arms(arguments: list[str]) -> list[Arm]:
    """Raises UsageError for arms that are not two or more, of different names and runs."""
    patterns: dict[str, str] = {}
    for argument in arguments:
        name, separator, pattern = argument.partition("=")
        if not (name and separator and pattern):
            raise UsageError(f"{shown(argument)}: expected NAME=GLOB, for example 'dgpo=runs/dgpo_*'")
        if name in patterns:
            raise UsageError(f"arm {shown(name)} is given twice: give each its own name, and one glob for all its runs")
        patterns[name] = pattern
    if len(patterns) == 1:
        raise UsageError(f"one arm, {shown(*patterns)}: give two or more, each as NAME=GLOB")
    folders = {name: _folders(name, pattern) for name, pattern in patterns.items()}
    arm_of: dict[Path, str] = {}
    for name, folder in ((name, folder) for name, found in folders.items() for folder in found):
        if other := arm_of.get(folder.resolve()):
            raise UsageError(f"{shown(folder)} of arm {shown(name)} is in arm {shown(other)}, too: narrow the globs")
        arm_of[folder.resolve()] = name
    return [
        Arm(name, sorted(map(read_run, found), key=lambda run: (run.seed, run.folder)))
        for name, found in folders.items()
    ]


def _folders(name: str, pattern: str) -> list[Path]:
    found = [path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if path.is_dir()]
    if not found:
        raise UsageError(f"arm {shown(name)}: no folder matches {shown(pattern)}; expected run folders (run.dir)")
    return found


def _check_metric(arms: list[Arm], metric: str) -> None:
    for run in (run for arm in arms for run in arm.runs):
        names = sorted({name for row in run.rows.values() for name in row})
        if metric not in names:
            near = difflib.get_close_matches(metric[:100], names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names) or 'no finite value'}"
            raise UsageError(f"--metric={metric}: not in {shown(run.folder)}; {hint}")


def _baseline(arms: list[Arm], name: str | None) -> Arm:
    found = [arm for arm in arms if name in (None, arm.name)]
    if not found:
        names = ", ".join(shown(arm.name) for arm in arms)
        raise UsageError(f"--baseline={shown(name)}: no such arm; expected one of {names}")
    return found[0]


def _show(comparison: Comparison, console: Console) -> None:
    """The warnings, and the tables of values and differences. As Text: names are not rich's markup."""
    for text in comparison.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), text))
    values = Table("arm", "runs", "last value", "mean", title=Text(f"{comparison.metric} [95 % interval]"))
    for arm in comparison.arms:
        values.add_row(*map(Text, (arm.name, str(len(arm.runs)), str(arm.final), str(arm.mean))))
    title = Text(f"difference to {comparison.baseline}")
    differences = Table("arm", "test", "last value", "shows", "mean", "shows", title=title)
    for d in comparison.differences:
        differences.add_row(*map(Text, (d.arm, d.test, str(d.final), d.final_shows, str(d.mean), d.mean_shows)))
    console.print(values, differences)


if __name__ == "__main__":
    sys.exit(main())
