"""What other settings of credit would have made of a run's recorded steps: no model, no engine.

    python tools/sweep_credit.py runs/arithmetic/dgpo --steps 10:40:10 --out sweep

The run needs rollout.record=true. For each step: effective share E and concentration against τ and κ, and the τ at
which E is 0.8; how alike the rules of credit are (Spearman, common part of the heaviest tenth, cosine of the directions
in which they move the logits); which tokens, positions and responses get credit; what dynamic sampling would drop.
Writes sweep.json, sweep.csv and sweep.html.

Weights with the run's own settings are compared with the recorded ones first: a step in which they differ is refused.
Not here: what the policy would have learned.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # This file is run as a script; what it uses are modules of the folder above.
    sys.path.insert(0, str(ROOT))

from megatron_dgpo.data import load_tokenizer  # noqa: E402
from megatron_dgpo.errors import UsageError  # noqa: E402
from tools.credit.measures import SHARE, measure  # noqa: E402
from tools.credit.recorded import RecordedRun, open_run, own_rule, read_step  # noqa: E402
from tools.credit.report import report  # noqa: E402

_MEASURES = ("effective_share", "max_weight", "top1_share", "top10_share")
_WIDTH = 110


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    # Tensors are small here: threads would wait for one another.
    torch.set_num_threads(1)
    try:
        found = sweep(open_run(options.run), options.steps)
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
        (options.out / "sweep.json").write_text(text + "\n", encoding="utf-8")
        write_csv(options.out / "sweep.csv", found)
        (options.out / "sweep.html").write_text(report(found), encoding="utf-8")
    except (UsageError, OSError) as error:
        print(f"sweep_credit: {error}", file=sys.stderr)
        return 2
    Console(width=_WIDTH).print(overview(found))
    print(f"sweep.json, sweep.csv, sweep.html in {options.out}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run.dir of a training run")
    parser.add_argument(
        "--steps", metavar="FIRST:LAST:EVERY", help="LAST included; or one step's number; default: all recorded"
    )
    parser.add_argument("--out", type=Path, default=Path("sweep"), metavar="DIR", help="default: sweep")
    return parser.parse_args(arguments)


def steps_of(text: str | None, recorded: list[int]) -> list[int]:
    """Numbers of the steps. Raises UsageError for other text, and where one was not recorded."""
    if text is None:
        return recorded
    parts = text.split(":")
    if len(parts) > 3 or not all(part.isdecimal() for part in parts) or parts[2:] == ["0"]:
        raise UsageError(f"--steps={text}: expected FIRST:LAST:EVERY, FIRST:LAST or a step's number, as in 10:50:10")
    first, last, every = (int(part) for part in (parts if len(parts) == 3 else [parts[0], parts[-1], "1"]))
    wanted = range(first, last + 1, every)
    missing = sorted(set(wanted) - set(recorded))
    if missing or not wanted:
        what = f"step {missing[0]} was not recorded" if missing else "holds no step"
        raise UsageError(f"--steps={text}: {what}; recorded are {len(recorded)}, from {recorded[0]} to {recorded[-1]}")
    return list(wanted)


def sweep(run: RecordedRun, steps: str | None) -> dict:
    """Everything, as sweep.json holds it."""
    numbers = steps_of(steps, run.steps())
    tokenizer = load_tokenizer(run.config.model.path)

    def text_of(token: int) -> str:
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        # A part of a character has no text of its own.
        return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text

    return {
        "run": str(run.folder),
        "own": own_rule(run.algorithm).name,
        "vocab_size": run.vocab_size,
        "algorithm": run.algorithm.model_dump(),
        "steps": [measure(read_step(run, number), text_of) for number in numbers],
    }


def write_csv(path: Path, found: dict) -> None:
    """Concentration of every rule, and at every κ and τ, a line each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "rule", "kappa", "tau", *_MEASURES])
        for step in found["steps"]:
            for name, rule in step["rules"].items():
                writer.writerow([step["step"], name, "", "", *(f"{rule[m]:.6g}" for m in _MEASURES)])
            for kappa, swept in step["kappas"].items():
                for point in swept["curve"]:
                    values = (f"{point[name]:.6g}" for name in ("tau", *_MEASURES))
                    writer.writerow([step["step"], "DGPO", kappa, *values])


def overview(found: dict) -> Table:
    """A line a step, of the run's own rule."""
    own = found["own"]
    names = ["step", "accuracy", "E", f"τ for E = {SHARE:g}", "max w", "top 1 %", "top 10 %", "E right", "E wrong"]
    table = Table(*names, "groups dropped", title=f"credit of {found['run']}: {own}", title_justify="left")
    for step in found["steps"]:
        rule, groups = step["rules"][own], step["groups"]
        dropped = len(groups["right"]) + len(groups["wrong"])
        tau = step["kappas"].get(f"{found['algorithm']['kappa']:g}", {}).get("tau_at_share")
        sides = [rule[side] and rule[side]["effective_share"] for side in ("right", "wrong")]
        values = [rule["effective_share"], tau, rule["max_weight"], rule["top1_share"], rule["top10_share"], *sides]
        shown = ["–" if value is None else f"{value:.3g}" for value in values]
        table.add_row(str(step["step"]), f"{step['accuracy']:.2f}", *shown, f"{dropped} of {groups['all']}")
    return table


if __name__ == "__main__":
    sys.exit(main())
