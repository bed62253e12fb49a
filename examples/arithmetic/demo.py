"""The whole example: data, warm-up, DGPO, picture. Starts afresh each time; `make demo` calls it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megatron_dgpo.metrics import read_metrics
from megatron_dgpo.plot import plot_run

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "arithmetic"
SAMPLES = 5


def run(title: str, *command: str) -> None:
    print(f"\n== {title}", flush=True)
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        sys.exit(status)


def main() -> None:
    start = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    run("data and an untrained model", str(HERE / "prepare.py"), "--out", str(RUNS / "data"))
    run("warm-up on written solutions", "-m", "megatron_dgpo.cli", "sft", str(HERE / "sft.yaml"))
    run("DGPO", "-m", "megatron_dgpo.cli", "train", str(HERE / "config.yaml"), *sys.argv[1:])

    folder = RUNS / "dgpo"
    rows = read_metrics(folder / "metrics" / "train.jsonl")
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    steps = rows[-1]["step"]
    picture = plot_run(folder / "metrics" / "train.jsonl", folder / "plot.png", "DGPO on three-digit sums")
    print(f"\n== {SAMPLES} responses to held-out problems after training")
    for line in (folder / "eval" / f"step_{steps:08d}.jsonl").read_text().splitlines()[:SAMPLES]:
        sample = json.loads(line)
        verdict = "right" if sample["reward"] >= 1 else "wrong"
        working = "   ".join(sample["text"].strip().splitlines())
        print(f"  {sample['question'].strip()} = {working}   ({verdict})")
    print(f"\ncheckpoint   {os.path.relpath(folder / 'checkpoints' / f'step_{steps:08d}')}")
    print(f"model        {os.path.relpath(folder / 'hf')}")
    print(f"TensorBoard  tensorboard --logdir {os.path.relpath(folder / 'tensorboard')}")
    print(f"plot         {os.path.relpath(picture)}")
    seconds = time.monotonic() - start
    print(f"demo: before={accuracies[0]:.2f} after={accuracies[-1]:.2f} steps={steps} seconds={seconds:.0f}")


if __name__ == "__main__":
    main()
