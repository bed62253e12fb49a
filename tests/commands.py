"""`megatron-dgpo` in test ranks: what its launcher starts, without a second of imports for each process."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_dgpo.config_file import load_config
from megatron_dgpo.layout import Layout
from megatron_dgpo.rollout import server
from tests.ranks import run_ranks


def run_on_ranks(
    command: str,
    config: Path,
    *overrides: str,
    options: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    timeout_s: float = 240,
) -> Path:
    """`megatron-dgpo COMMAND CONFIG ...` on as many ranks as the config asks for, after its checks.

    Their output goes to the run's logs; returns rank 0's. options: the command's own. environment: where the servers
    are, their secret, and the like.
    """
    settings = load_config(config, list(overrides))
    world_size = Layout.from_config(settings.parallel).world_size
    arguments = [command, str(config), *options, *overrides]
    variables = {server.ADDRESSES: "", **(environment or {})}
    logs = settings.run.dir / "logs"
    run_ranks(_run, world_size, arguments, variables, logs, timeout_s=timeout_s, joined=False)
    return logs / "rank_0.log"


def _run(arguments: list[str], environment: dict[str, str], logs: Path) -> None:
    from megatron_dgpo.cli import main

    os.environ.update(environment)
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"rank_{os.environ['RANK']}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    assert main(arguments) == 0
