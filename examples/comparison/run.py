"""The comparison of README.md by one command: data and start once, then every arm of a seed, seed by seed.

    python examples/comparison/run.py                                # the study; stopped, the same command goes on
    python examples/comparison/run.py --hours 3                      # as much of it as begins within three hours
    python examples/comparison/run.py --report                       # what there is, without training
    python examples/comparison/run.py --arms grpo,dgpo --seeds 1 --steps 2 --runs runs/trial optimizer.warmup_steps=0

Finished runs are skipped; one that was interrupted goes on from its checkpoint; one that fails is told, with its log,
and the others go on. Settings behind the options hold for every arm. The report has the seeds that are finished in
every arm: report.html, comparison.json and comparison.png in RUNS/report; of the registered study also
benchmarks/comparison.json and docs/comparison.png.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    # This file is run as a script; what it uses are modules of the folders above.
    sys.path.insert(0, str(ROOT))

from examples.comparison.plan import ARMS, EXAMPLES, RUNS, SEEDS, STEPS, PlannedRun, is_registered, plan  # noqa: E402
from examples.comparison.results import report, tables, whole_seeds  # noqa: E402
from megatron_dgpo.complete_folder import complete_folder  # noqa: E402
from megatron_dgpo.errors import UsageError  # noqa: E402
from megatron_dgpo.metrics import read_metrics  # noqa: E402
from megatron_dgpo.stop import STOPPED  # noqa: E402

_SECONDS_AN_HOUR = 3600
_LAST_LINES = 5
_LOOK_S = 1.0


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    # As Ctrl-C: the run that is going on is asked to save, and ends first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: list[PlannedRun] = []
    try:
        runs = plan(options.arms, options.seeds, options.steps, options.runs.absolute(), tuple(options.overrides))
        for run in runs:
            _ = run.config  # what is wrong with the settings is told before anything starts
        if not options.report:
            prepare(options.runs.absolute(), console)
            failed = train_all(runs, options.hours, console)
        say_remaining(runs, failed, console)
        if options.report or whole_seeds(runs):
            show_report(runs, console)
    except (UsageError, OSError) as error:
        print(f"comparison: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
        return 128 + signal.SIGINT
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=_names, default=list(ARMS), metavar="A,B", help=f"default: {','.join(ARMS)}")
    parser.add_argument("--seeds", type=_seeds, default=list(SEEDS), metavar="1-5", help="or 1,3; default: 1-5")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run; default: {STEPS}")
    parser.add_argument("--hours", type=float, help="start no run after so long; default: go on to the end")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report of what there is")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="default: runs/comparison")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.name=value", help="for every arm")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _seeds(text: str) -> list[int]:
    ranges = [part.partition("-") for part in text.split(",")]
    seeds = sorted({seed for first, _, last in ranges for seed in range(int(first), int(last or first) + 1)})
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text}: no seed")
    return seeds


def prepare(root: Path, console: Console) -> None:
    """Data, the start that all runs have in common, and the reference of the arm entropy_e80."""
    start, flat, data = root / "sft" / "hf", root / "flat", root / "data"
    if not start.is_dir():
        log = root / "sft.log"
        console.print(f"data, and a start that imitates the pupil; log in {log}")
        _call(log, str(EXAMPLES / "arithmetic" / "prepare.py"), "--out", str(data))
        overrides = [f"run.dir={root / 'sft'}", f"model.path={data / 'model'}", f"data.train={data / 'train.jsonl'}"]
        overrides.append(f"sft.data={data / 'sft.jsonl'}")
        _call(log, "-m", "megatron_dgpo.cli", "sft", str(EXAMPLES / "arithmetic" / "sft.yaml"), *overrides)
    if not flat.is_dir():
        make_flat(start, flat)


def _call(log: Path, *command: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        status = subprocess.run([sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT).returncode
    if status:
        raise UsageError(f"{' '.join(command[:3])} ended with status {status}; its log is {log}:\n{_tail(log)}")


def make_flat(model: Path, target: Path) -> None:
    """The same architecture, and every distribution uniform: the last norm gives 0, and so all logits are."""
    with complete_folder(target) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True)
        weights = load_file(partial / "model.safetensors")
        weights["model.norm.weight"].zero_()
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})


def train_all(runs: list[PlannedRun], hours: float | None, console: Console) -> list[PlannedRun]:
    """Run or continue all that are not finished; returns those that failed."""
    begin = time.monotonic()
    waiting = [run for run in runs if not run.finished]
    failed = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    times = (TextColumn("steps"), TimeElapsedColumn(), TextColumn("so far,"), TimeRemainingColumn(), TextColumn("left"))
    # Steps per second over an hour: servers start anew with every run.
    with Progress(*columns, *times, console=console, speed_estimate_period=_SECONDS_AN_HOUR) as progress:
        bar = progress.add_task("", total=sum(max(0, run.steps - run.steps_saved) for run in waiting))
        done = 0
        for number, run in enumerate(waiting, len(runs) - len(waiting) + 1):
            if hours is not None and time.monotonic() - begin >= hours * _SECONDS_AN_HOUR:
                console.print(f"--hours={hours:g} are over: no further run starts")
                break
            progress.update(bar, description=f"{number} of {len(runs)}: {run.name}")
            started, from_step = time.monotonic(), run.steps_saved
            log = run.root / f"{run.name}.log"

            def look(step: int, before: int = done - from_step) -> None:
                progress.update(bar, completed=before + step)

            status = train(run, log, look)
            if status == STOPPED:
                console.print(f"{run.name} was asked to stop, and has saved")
                break
            done += run.steps - from_step
            progress.update(bar, completed=done)
            if status:
                failed.append(run)
                console.print(f"{run.name} FAILED with status {status}; its log is {log}:\n{_tail(log)}")
            else:
                console.print(_line(run, number, len(runs), time.monotonic() - started))
    return failed


def train(run: PlannedRun, log: Path, look: Callable[[int], None]) -> int:
    """Its exit status. look: is called with the number of its last step, every second."""
    command = [sys.executable, "-m", "megatron_dgpo.cli", "train", *run.arguments]
    with log.open("a") as stream:
        # Ctrl-C does not reach it there, and would end it in the middle of a step.
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while True:
                try:
                    return process.wait(_LOOK_S)
                except subprocess.TimeoutExpired:
                    look(max((row["step"] for row in _rows(run)), default=0))
        finally:
            # Where this command is ended: it finishes its step and saves. On the way here otherwise it has ended.
            process.terminate()
            process.wait()


def _rows(run: PlannedRun) -> list[dict]:
    return read_metrics(run.folder / "metrics" / "train.jsonl")


def _line(run: PlannedRun, number: int, count: int, seconds: float) -> str:
    accuracies = [row["eval/accuracy"] for row in _rows(run) if "eval/accuracy" in row]
    return f"{number} of {count}: {run.name}, accuracy {accuracies[0]:.3f} to {accuracies[-1]:.3f}, {seconds:.0f} s"


def _tail(log: Path) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def say_remaining(runs: list[PlannedRun], failed: list[PlannedRun], console: Console) -> None:
    remaining = [run.name for run in runs if not run.finished]
    if failed:
        console.print(f"failed: {', '.join(run.name for run in failed)}; the same command tries them again")
    if remaining:
        console.print(f"{len(remaining)} of {len(runs)} runs remain, from {remaining[0]} on; the same command goes on")


def show_report(runs: list[PlannedRun], console: Console) -> None:
    folder = runs[0].root / "report"
    with console.status("reading the recorded responses: some minutes for all runs"):
        found = report(runs, folder)
    for warning in found["warnings"]:
        console.print(f"warning: {warning}")
    console.print(*tables(found), sep="\n")
    console.print(f"report.html, comparison.json and comparison.png in {folder}")
    if is_registered(runs):
        shutil.copyfile(folder / "comparison.json", ROOT / "benchmarks" / "comparison.json")
        shutil.copyfile(folder / "comparison.png", ROOT / "docs" / "comparison.png")
        console.print("benchmarks/comparison.json and docs/comparison.png are these")


if __name__ == "__main__":
    sys.exit(main())
