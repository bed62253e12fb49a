"""What sampling ahead does to a step's time and to the lengths that are trained on.

    python tools/bench_rollouts.py --json benchmarks/rollouts_cpu.json

A run on two vLLM servers for every staleness, one after the other, of a tiny model whose responses end at random, so
that their lengths vary tenfold and more. On one machine ranks and servers share the cores, where nothing could be
gained: so the update is slowed by sleep, to about the time that sampling takes, and the cores are the servers' then.
What to expect: at 0 a step takes the sum of both, above at best the larger of them. The lengths of steps are compared
by their means, with the standard error of groups; a bound that was kept by throwing late responses away would shorten
them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from megatron_dgpo import process
from megatron_dgpo.cluster import Node
from megatron_dgpo.config_file import load_config
from megatron_dgpo.metrics import read_metrics
from megatron_dgpo.rollout import guard, server
from tools.tiny_models import make_tiny_model

SETTINGS = {
    "optimizer": {"lr": 1e-5},
    "rollout": {
        "prompts_per_step": 4,
        "group_size": 8,
        "context_tokens": 192,
        "max_response_tokens": 160,
        "record": True,
    },
    "servers": {"count": 2, "max_concurrent": 16},
    "reward": {"grader": "exact", "workers": 1},
    "checkpoint": {"every": 1000},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sleep", type=float, default=None, help="seconds of an update; default: as sampling takes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        _train(options.rank, options.sleep)
        return
    results, sleep_s = {}, options.sleep
    with tempfile.TemporaryDirectory() as folder:
        if sleep_s is None:
            sleep_s = round(_run(Path(folder), "alone", 0, options.steps, 0.0)["rollout_s"], 1)
        for staleness in options.staleness:
            results[staleness] = _run(Path(folder), f"s{staleness}", staleness, options.steps, sleep_s)
    _show(results, sleep_s)
    if options.json:
        content = {"cores": len(os.sched_getaffinity(0)), "steps": options.steps, "update_sleeps_s": sleep_s}
        options.json.write_text(json.dumps(content | {"by_staleness": results}, indent=1) + "\n")


def _run(folder: Path, name: str, staleness: int, steps: int, sleep_s: float) -> dict[str, float]:
    """Seconds a step of the second half, in which servers are warm, and lengths of all."""
    run_dir, problems = folder / name, folder / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(64)))
    settings = {section: dict(values) for section, values in SETTINGS.items()}
    settings["rollout"]["max_staleness"] = staleness
    settings |= {"run": {"dir": str(run_dir), "steps": steps}, "data": {"train": str(problems)}}
    settings["model"] = {"path": str(make_tiny_model(folder / "model", "qwen2")), "dtype": "float32"}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    secret = secrets.token_urlsafe(16)
    servers, addresses = server.start(load_config(config), secret, Node(run_dir / "logs"))
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    ranks |= {"MASTER_PORT": str(server.free_port()), server.ADDRESSES: ",".join(addresses), guard.SECRET: secret}
    try:
        command = [sys.executable, __file__, "--rank", str(config), "--sleep", str(sleep_s)]
        subprocess.run(command, env=os.environ | ranks, check=True)
    finally:
        process.stop(servers)
    rows = read_metrics(run_dir / "metrics" / "train.jsonl")
    late = [row for row in rows if row["step"] > steps / 2]
    groups: dict[int, list[int]] = {}
    for file in (run_dir / "rollouts").glob("step_*"):
        for row in map(json.loads, file.read_text().splitlines()):
            groups.setdefault(row["position"], []).append(len(row["token_ids"]))
    means = [statistics.mean(lengths) for lengths in groups.values()]
    lengths = [length for group in groups.values() for length in group]
    return {
        "step_s": statistics.mean(row["time/step_s"] for row in late),
        "rollout_s": statistics.mean(row["time/rollout_s"] for row in late),
        "staleness": statistics.mean(row["rollout/staleness_mean"] for row in late),
        "length": statistics.mean(means),
        "length_standard_error": statistics.stdev(means) / len(means) ** 0.5,
        "length_10th": sorted(lengths)[len(lengths) // 10],
        "length_90th": sorted(lengths)[len(lengths) * 9 // 10],
    }


def _train(config: Path, sleep_s: float) -> None:
    """The one rank."""
    from megatron_dgpo import trainer

    update = trainer.update

    def slowly(*arguments):
        time.sleep(sleep_s)
        return update(*arguments)

    trainer.update = slowly
    trainer.train(load_config(config))


def _show(results: dict[int, dict[str, float]], sleep_s: float) -> None:
    names = "staleness", "s/step", "of staleness 0", "waited s", "mean lag", "mean length"
    table = Table(*names, title=f"{sleep_s} s more")
    first = results[min(results)]["step_s"]
    for staleness, found in results.items():
        length = f"{found['length']:.1f} ± {found['length_standard_error']:.1f}"
        length += f" ({found['length_10th']} to {found['length_90th']})"
        ratio = f"{found['step_s'] / first:.2f}"
        cells = f"{found['step_s']:.2f}", ratio, f"{found['rollout_s']:.2f}", f"{found['staleness']:.2f}", length
        table.add_row(str(staleness), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
