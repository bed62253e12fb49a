"""One machine: start vLLM servers and trainer ranks, watch them, and end all of them when any one fails.

Under torchrun or SLURM, which start the ranks themselves, this file is not used: `rollout.addresses` names the
servers and MEGATRON_DGPO_SECRET carries their secret, here as there.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from pathlib import Path

from megatron_dgpo import process
from megatron_dgpo.config import Config
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.guard import SECRET

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


def _interrupt(number: int, _frame) -> None:
    # A second Ctrl-C must not break the clean-up that the first one started.
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise _Interrupted(number)


def launch(arguments: list[str], config: Config, world_size: int, needs_servers: bool) -> int:
    """Run `megatron-dgpo ARGUMENTS` as `world_size` ranks of this machine and return the exit status.

    Ends within seconds of the first failure, printing the failed process's last lines; on SIGINT, SIGTERM or SIGHUP
    ends everything and returns 128 + the signal. Nothing it started outlives it, even when it is killed.
    """
    logs = config.run.dir / "logs"
    secret = os.environ.get(SECRET) or secrets.token_urlsafe(32)
    servers: list[process.Child] = []
    ranks: list[process.Child] = []
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        addresses = list(config.rollout.addresses)
        if needs_servers and not addresses:
            servers, addresses = server.start(config, secret, logs)
        port = server.free_port()
        for rank in range(world_size):
            ranks.append(_start_rank(rank, world_size, port, arguments, addresses, secret, logs))
        failed = process.supervise(ranks, servers)
        if failed is None:
            return 0
        _report(failed, servers)
        return failed.process.returncode if failed.process.returncode > 0 else 1
    except _Interrupted as interrupted:
        name = signal.Signals(interrupted.number).name
        print(f"\nstopped by {name}; the same command continues the run", file=sys.stderr, flush=True)
        return 128 + interrupted.number
    finally:
        process.stop([*ranks, *servers])


def _start_rank(
    rank: int, world_size: int, port: int, arguments: list[str], addresses: list[str], secret: str, logs: Path
) -> process.Child:
    environment = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // world_size)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        server.ADDRESSES: ",".join(addresses),
        SECRET: secret,
    }
    command = [sys.executable, "-m", "megatron_dgpo.cli", *arguments]
    return process.start(f"rank {rank}", command, environment, logs / f"rank_{rank}.log", show_output=rank == 0)


def _report(failed: process.Child, servers: list[process.Child]) -> None:
    """Show the first failure, and the servers that ended beside it: a rank often fails because its server did."""
    time.sleep(1)
    for child in {id(c): c for c in [failed, *servers] if c.process.poll() is not None}.values():
        status = child.process.returncode
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        print(f"\n{child.failure()}\n\n{child.name} ended ({how}); its whole output: {child.log}", file=sys.stderr)


def serve(config: Config, host: str, port: int) -> int:
    """Become one vLLM server, as training expects it, for `rollout.addresses` of another command."""
    server.secret()
    command = server.command(config, port, host)
    os.execve(command[0], command, {**os.environ, **server.environment(config, 0)})


def is_rank() -> bool:
    """True in a process that torchrun, SLURM's srun or this launcher started as one of the trainer's ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
