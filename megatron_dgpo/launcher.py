"""One machine: start vLLM servers and trainer ranks, watch them, and end all of them when any one fails.

Under torchrun or SLURM, which start the ranks themselves, this file is not used: `rollout.addresses` names the
servers and MEGATRON_DGPO_SECRET carries their secret, here as there.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from pathlib import Path

import torch

from megatron_dgpo import process
from megatron_dgpo.config import Config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.rollout import server

SECRET = "MEGATRON_DGPO_SECRET"
ADDRESSES = "MEGATRON_DGPO_ADDRESSES"


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


def _interrupt(number: int, _frame) -> None:
    # A second Ctrl-C must not break the clean-up that the first one started.
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise _Interrupted(number)


def launch(arguments: list[str], config: Config, needs_servers: bool) -> int:
    """Run `megatron-dgpo ARGUMENTS` as `tensor × pipeline × data` ranks and return the exit status.

    Ends within seconds of the first failure, printing the failed process's last lines; on SIGINT, SIGTERM or SIGHUP
    ends everything and returns 128 + the signal. Nothing it started outlives it, even when it is killed.
    """
    world_size = config.parallel.tensor * config.parallel.pipeline * (config.parallel.data or 1)
    logs = config.run.dir / "logs"
    secret = os.environ.get(SECRET) or secrets.token_urlsafe(32)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    servers: list[process.Child] = []
    ranks: list[process.Child] = []
    try:
        if needs_servers and not config.rollout.addresses:
            servers, addresses = _start_servers(config, secret, logs)
        else:
            addresses = list(config.rollout.addresses)
        for rank in range(world_size):
            ranks.append(_start_rank(rank, world_size, arguments, addresses, secret, logs))
        failed = process.supervise(ranks, servers)
    except _Interrupted as interrupted:
        print(f"\nstopped by {signal.Signals(interrupted.number).name}; the same command continues the run", flush=True)
        return 128 + interrupted.number
    finally:
        process.stop([*ranks, *servers])
    if failed is None:
        return 0
    status = failed.process.returncode
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    print(f"\n{failed.last_lines()}\n\n{failed.name} ended ({how}); all of the above is in {failed.log}", file=sys.stderr)
    return status if status > 0 else 1


def _start_servers(config: Config, secret: str, logs: Path) -> tuple[list[process.Child], list[str]]:
    ports = [free_port() for _ in range(config.rollout.servers)]
    children = []
    for index, port in enumerate(ports):
        environment = {**os.environ, **server.environment(config, index), SECRET: secret}
        children.append(
            process.start(f"vLLM server {index}", server.command(config, port), environment, logs / f"vllm_{index}.log")
        )
    return children, [f"http://127.0.0.1:{port}" for port in ports]


def _start_rank(
    rank: int, world_size: int, arguments: list[str], addresses: list[str], secret: str, logs: Path
) -> process.Child:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _master_port(),
        ADDRESSES: ",".join(addresses),
        SECRET: secret,
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world_size)))
    command = [sys.executable, "-m", "megatron_dgpo.cli", *arguments]
    return process.start(f"rank {rank}", command, environment, logs / f"rank_{rank}.log", show_output=rank == 0)


_chosen_port: str | None = None


def _master_port() -> str:
    global _chosen_port
    _chosen_port = _chosen_port or str(free_port())
    return _chosen_port


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_rank() -> bool:
    """True in a process that torchrun, SLURM or this launcher started as one of the trainer's ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def server_addresses(config: Config) -> list[str]:
    """What this rank talks to: the launcher's servers, or the ones named in the settings."""
    found = [a for a in os.environ.get(ADDRESSES, "").split(",") if a] or list(config.rollout.addresses)
    if not found:
        raise UsageError("rollout.addresses is empty: ranks started by torchrun or SLURM need running vLLM servers")
    return found


def server_secret() -> str:
    secret = os.environ.get(SECRET, "")
    if not secret:
        raise UsageError(f"{SECRET} is not set: it must hold the secret that the servers of rollout.addresses expect")
    return secret


def check_devices(config: Config) -> None:
    """On GPUs: the ranks and servers of this machine need a GPU each."""
    count = torch.cuda.device_count()
    ranks = config.parallel.tensor * config.parallel.pipeline * (config.parallel.data or 1)
    if count and ranks > count:
        raise UsageError(f"parallel.tensor × pipeline × data = {ranks} ranks, but this machine has {count} GPUs")
