"""`megatron-dgpo launch`: the sbatch file for a config and a number of nodes, complete in itself.

It is one of `slurm/`'s with other sizes, `slurm/job.sh` in place of the line that reads it, and the command line at its
top. Needs neither a GPU nor PyTorch: login nodes have neither.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_dgpo import legality
from megatron_dgpo.cluster import DEVICE
from megatron_dgpo.config import Config
from megatron_dgpo.config_file import is_file_of_settings
from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import ServerLayout, job_ranks, own_servers

_ROOT = Path(__file__).parents[1]
_SOURCE = "source slurm/job.sh\n"
_PREFIX = "#SBATCH --"


@dataclass(frozen=True)
class Size:
    """nodes: that train. rollout_nodes: that run vLLM servers; 0: each trainer node runs its own.

    gpus: of a node; None: none, where the job computes on CPUs. rollout_gpus: of a rollout node; None: the same.
    """

    nodes: int
    rollout_nodes: int = 0
    gpus: int | None = None
    rollout_gpus: int | None = None


def write(config: Config, file: Path, overrides: list[str], size: Size, time: str | None, options: list[str]) -> str:
    """The text of the sbatch file; raises UsageError for sizes that the config's layout does not fill.

    options: further ones of sbatch, such as --partition=h100; they win over the file's own.
    """
    _check(config, size)
    shared = size.rollout_nodes == 0
    text = (_ROOT / "slurm" / ("shared.sbatch" if shared else "separate.sbatch")).read_text()
    header, body = text.split(_SOURCE)
    mixed = size.rollout_gpus not in (None, size.gpus)
    settings: dict[str, int | str | None] = {
        "nodes": size.nodes if shared or mixed else size.nodes + size.rollout_nodes
    }
    settings |= {"time": time} if time else {}
    settings |= {"gpus-per-node": size.gpus}
    settings |= dict(option.removeprefix("--").partition("=")[::2] for option in options)
    lines = _directives(header, settings)
    if mixed:
        # A component takes nothing over from the one before it.
        lines += ["#SBATCH hetjob", *_directives(header, settings | _component(size))]
    files = [str(Path(text).resolve()) if is_file_of_settings(text) else text for text in overrides]
    command = shlex.join([str(file.resolve()), *files])
    device = "" if size.gpus else f"export {DEVICE}=cpu\n"
    python = f"[[ -n ${{CONTAINER:-}} ]] || PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}\n"
    split = "" if shared or mixed else f"ROLLOUT_NODES={size.rollout_nodes}\n"
    script = (_ROOT / "slurm" / "job.sh").read_text()
    return "\n".join(["#!/usr/bin/env bash", *lines, "", f"set -- {command}", device + python + split + script + body])


def submit(text: str) -> str:
    """Give it to sbatch, from this directory; returns the job's number."""
    if shutil.which("sbatch") is None:
        raise UsageError("sbatch is not on this machine: use --dry-run and submit what it prints on a login node")
    result = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
    if result.returncode:
        raise UsageError(f"sbatch refused: {result.stderr.strip()}")
    return result.stdout.strip()


def _component(size: Size) -> dict:
    """Where rollout nodes differ from trainer nodes."""
    return {"nodes": size.rollout_nodes, "gpus-per-node": size.rollout_gpus}


def _directives(header: str, settings: dict) -> list[str]:
    """The file's own, with `settings` over them."""
    own = (line.removeprefix(_PREFIX) for line in header.splitlines() if line.startswith(_PREFIX))
    merged = dict(option.partition("=")[::2] for option in own) | settings
    given = {name: value for name, value in merged.items() if value is not None}
    return [f"{_PREFIX}{name}" + (f"={value}" if value != "" else "") for name, value in given.items()]


def _check(config: Config, size: Size) -> None:
    if size.gpus is None and os.environ.get(DEVICE) != "cpu":
        raise UsageError(f"--gpus-per-node is missing: without it SLURM gives the job none; {DEVICE}=cpu needs none")
    legality.check(legality.of_sleep(config.servers.sleep, size.rollout_nodes))
    gpus = size.nodes * (size.gpus or 0)
    ranks = job_ranks(config, gpus, size.rollout_nodes)
    legality.check(legality.of_nodes(ranks, size.nodes, f"--nodes={size.nodes}"))
    if gpus:
        legality.check(legality.of_trainer_nodes(config.parallel, gpus))
    per_node = size.rollout_gpus or size.gpus
    if size.rollout_nodes and per_node:
        legality.check(legality.of_rollout_node(ServerLayout.from_config(config.servers), per_node))
    elif size.gpus:
        workers = ServerLayout.from_config(config.servers, own_servers("train", config)).num_workers
        legality.check(legality.of_gpus(ranks // size.nodes, workers, size.gpus, config.servers.sleep))
