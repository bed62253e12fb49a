"""One machine, alone or a node of a SLURM job: start vLLM servers and trainer ranks, watch them, start servers that end
anew, and end all when a rank fails or a server ends too often.

Under torchrun, which starts the ranks itself, this file is not used: `servers.addresses` names the servers and
MEGATRON_DGPO_SECRET carries their secret, here as there.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_dgpo import legality, process, stop
from megatron_dgpo.cluster import Node, note_failed_node
from megatron_dgpo.config import Config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import job_ranks, own_servers
from megatron_dgpo.manifest import newest
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.guard import SECRET
from megatron_dgpo.run_lock import run_lock

_AT_ONCE = (signal.SIGINT, signal.SIGHUP)
_HOUR_S = 3600
_FULL_BYTES = 2**20
_LOOK_S = 1
# What a program that is in order is told of a GPU or a network that is not; of others a node can do nothing.
_OF_THE_NODE = re.compile(r"CUDA error|NCCL error|\bECC\b|\bXid\b")
# gloo's words, those of PyTorch's watchdog over NCCL, and ours.
_TIMED_OUT = re.compile(r"tim(ed|e)[ _]?out", re.IGNORECASE)


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


def _interrupt(number: int, _frame) -> None:
    # A second Ctrl-C must not break the clean-up that the first one started.
    for other in (*_AT_ONCE, *stop.SIGNALS):
        signal.signal(other, signal.SIG_IGN)
    raise _Interrupted(number)


def launch(arguments: list[str], config: Config, node: Node, world_size: int) -> int:
    """Run `megatron-dgpo ARGUMENTS` as this node's share of `world_size` ranks and return the exit status.

    `run.dir` is this run's until its last rank has ended. Ends within seconds of the first failure, printing the failed
    process's last lines; a server's end is one when it has been started anew `servers.max_restarts` times within an
    hour. A job that failed after a checkpoint of its own begins again `run.restarts` times: stop.FAILED_ON_ITS_WAY.
    Asked by SIGTERM or SIGUSR1, training finishes its step and saves: stop.STOPPED. SIGINT, SIGHUP, a second
    SIGTERM, and any during an evaluation end everything at once: 128 + the signal. Nothing it started outlives it, even
    when it is killed.
    """
    secret = os.environ.get(SECRET) or secrets.token_urlsafe(32)
    servers: list[process.Child] = []
    ranks: list[process.Child] = []
    lock = contextlib.ExitStack()
    # First: an interruption, which asks for it, may come from here on.
    began_with = _newest_checkpoint(config)
    _handle_signals(ranks, gently=arguments[0] != "eval")
    try:
        # Kept by the ranks, too: they may outlive this process for a moment.
        # An evaluation may run beside the training, and must not keep it from going on.
        locks = node.index == 0 and arguments[0] != "eval"
        held = (lock.enter_context(run_lock(config.run.dir)),) if locks else ()
        if not node.in_job:
            # Of a start with more ranks: in a job each start has a folder of its own.
            for stale in node.logs.glob("*.error"):
                stale.unlink(missing_ok=True)
        addresses = list(config.servers.addresses)
        if own_servers(arguments[0], config):
            servers, addresses = server.start(config, secret, node, world_size // node.count)
            if node.count > 1:
                node.publish(f"servers_{node.index}", addresses)
                addresses = _published_servers(config, node, node.count, "node")
        master = _agree_on_master(config, node)
        for local_rank in range(world_size // node.count):
            ranks.append(_start_rank(local_rank, node, world_size, master, arguments, addresses, secret, held))
        # Not before: what was started keeps the stop signals blocked.
        stop.unblock()
        failed = process.supervise(ranks, servers, (0, stop.STOPPED), reviver(config), _look_elsewhere(node))
        if failed is not None:
            _report(failed, servers, node, process.write_stacks(ranks))
            return _after_failure(config, node, began_with, max(1, failed.process.returncode or 1))
        status = max(rank.process.returncode for rank in ranks)
        if status == stop.STOPPED:
            if _newest_checkpoint(config) == began_with and node.is_second_in_vain():
                raise UsageError(
                    "the job was asked to stop before it had made a step, and so was its start before this one: give "
                    "it more --time than --signal's seconds and a step take"
                )
            if node.index == 0:
                print("\nstopped after a whole step; the same command continues the run", file=sys.stderr, flush=True)
        return status
    except _Interrupted as interrupted:
        if node.has_failed():
            # Which may have waited for one of this node's ranks.
            process.write_stacks(ranks)
            print("\nended because another node of the job has failed", file=sys.stderr, flush=True)
            return _after_failure(config, node, began_with, 128 + interrupted.number)
        name = signal.Signals(interrupted.number).name
        print(f"\nstopped by {name}; the same command continues the run", file=sys.stderr, flush=True)
        return 128 + interrupted.number
    finally:
        process.stop([*ranks, *servers])
        lock.close()


def _after_failure(config: Config, node: Node, began_with: Path | None, otherwise: int) -> int:
    """The exit status. Whatever it is, the failure counts."""
    again = node.in_job and node.failures() <= config.run.restarts and _newest_checkpoint(config) != began_with
    return stop.FAILED_ON_ITS_WAY if again else otherwise


def _look_elsewhere(node: Node) -> Callable[[], None]:
    """Raises _Interrupted when another node of the job has failed: SLURM would kill this one's processes, and their
    status would be the job's."""
    looked = time.monotonic()

    def look() -> None:
        nonlocal looked
        if time.monotonic() > looked + _LOOK_S:
            looked = time.monotonic()
            if node.has_failed():
                raise _Interrupted(signal.SIGINT)

    return look


def _newest_checkpoint(config: Config) -> Path | None:
    return newest(config.run.dir / "checkpoints")


def _handle_signals(ranks: list[process.Child], gently: bool) -> None:
    """gently: pass the stop signals on to the ranks. They stay blocked as yet."""

    def ask(number: int, _frame) -> None:
        if number == signal.SIGTERM:
            signal.signal(number, _interrupt)
        print(f"\n{signal.Signals(number).name}: stopping when the running step is saved", file=sys.stderr, flush=True)
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGUSR1)

    stop.block()
    for number in _AT_ONCE:
        signal.signal(number, _interrupt)
    for number in stop.SIGNALS:
        signal.signal(number, ask if gently else _interrupt)


def _agree_on_master(config: Config, node: Node) -> tuple[str, int]:
    """Where rank 0 gathers the others: a port that is free on the first node."""
    if node.index:
        return tuple(node.read("master", config.servers.start_timeout_s, "the first trainer node"))
    master = node.address, server.free_port(node.address)
    if node.count > 1:
        node.publish("master", master)
    return master


def _start_rank(
    local_rank: int,
    node: Node,
    world_size: int,
    master: tuple[str, int],
    arguments: list[str],
    addresses: list[str],
    secret: str,
    held: tuple[int, ...] = (),
) -> process.Child:
    local_size = world_size // node.count
    rank = node.index * local_size + local_rank
    environment = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // local_size)),
        # Servers that compute on the same cores would wait for threads that spin.
        "OMP_WAIT_POLICY": "passive",
        **(_nccl_environment(node) if torch.cuda.is_available() else {}),
        **node.environment(),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
        server.ADDRESSES: ",".join(addresses),
        SECRET: secret,
    }
    command = [sys.executable, "-m", "megatron_dgpo.cli", *arguments]
    log = node.logs / f"rank_{rank}.log"
    environment["TORCHELASTIC_ERROR_FILE"] = str(process.error_file(log))
    return process.start(f"rank {rank}", command, environment, log, show_output=rank == 0, kept=held)


def _nccl_environment(node: Node) -> dict[str, str]:
    return {
        # One queue: a layer's collective starts before the product that it runs beside takes all of the GPU.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # PyTorch's flight recorder: the last collectives of each rank, written when one passes its limit.
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(node.logs / "nccl_trace_rank_"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def reviver(config: Config) -> Callable[[process.Child], bool]:
    """Starts a server that has ended anew, on its old address, unless it has been `servers.max_restarts` times within
    an hour; tells the user, and whether it did. Any exit status is an end: a server whose engine died has 0.
    """
    # One that sleeps would find its GPUs' memory taken by the trainer, and not start.
    most = 0 if config.servers.sleep else config.servers.max_restarts
    restarts: dict[str, list[float]] = defaultdict(list)

    def revived(server: process.Child) -> bool:
        now, ending = time.monotonic(), server.ending()
        recent = [at for at in restarts[server.name] if now - at < _HOUR_S]
        if len(recent) >= most:
            return False
        process.restart(server)
        restarts[server.name] = [*recent, now]
        print(
            f"\n{server.name} ended ({ending}) and is started anew, {len(recent) + 1} of {most} times an hour "
            f"(servers.max_restarts); its whole output: {server.log}",
            file=sys.stderr,
            flush=True,
        )
        return True

    return revived


def _report(
    failed: process.Child, servers: list[process.Child], node: Node, running: Sequence[process.Child] = ()
) -> None:
    """Show the first failure, and the servers that ended beside it: a rank often fails because its server did.

    Of a job's nodes only the first to fail shows its output, and is noted as one to avoid; what follows elsewhere is
    named. running: ranks whose stacks were written; if the one that failed waited too long, it was for those of them
    that told no error.
    """
    time.sleep(1)
    told = [file.stat().st_mtime for file in node.logs.glob(f"*{failed.error_file.suffix}")]
    first = failed.silent_since <= min(told, default=math.inf)
    in_full = not node.in_job or (first and node.is_first_failure())
    ended = [server for server in servers if server is not failed and server.process.poll() is not None]
    for child in [failed, *ended]:
        shown = f"\n{child.failure()}\n\n" if in_full else "after the job's first failure, "
        print(
            f"{shown}{child.name} ended ({child.ending()}); its whole output: {child.log}", file=sys.stderr, flush=True
        )
    if _TIMED_OUT.search(failed.first_error() or ""):
        for rank in (rank for rank in running if not rank.error_file.exists()):
            state = "which a signal has stopped" if rank.stopped else f"whose stacks are at the end of {rank.log}"
            print(f"{failed.name} waited for {rank.name}, {state}", file=sys.stderr, flush=True)
    elif in_full and ((failed.process.returncode or 0) < 0 or _OF_THE_NODE.search(failed.first_error() or "")):
        note_failed_node()
    total, _, free = shutil.disk_usage(node.logs)
    if total and free < _FULL_BYTES:
        # Then the logs do not tell.
        print(f"no space left on the disk of {node.logs}", file=sys.stderr, flush=True)


def trainer_size(config: Config, node: Node) -> int:
    """Ranks of all trainer nodes; raises UsageError where they cannot share them evenly."""
    size = job_ranks(config, torch.cuda.device_count() * node.count if node.in_job else 0, node.rollout_nodes)
    legality.check(legality.of_nodes(size, node.count, f"{node.count} nodes"))
    return size


def find_servers(config: Config, node: Node) -> Config:
    """With the addresses of the servers that the job's rollout nodes have started, if it has any."""
    if not node.rollout_nodes:
        return config
    legality.check(legality.of_sleep(config.servers.sleep, node.rollout_nodes))
    addresses = _published_servers(config, node, node.rollout_nodes, "rollout node")
    return config.model_copy(update={"servers": config.servers.model_copy(update={"addresses": tuple(addresses)})})


def _published_servers(config: Config, node: Node, nodes: int, kind: str) -> list[str]:
    """Addresses of those that the `nodes` nodes of this kind have started, node by node."""
    addresses: list[str] = []
    for index in range(nodes):
        what = f"the vLLM servers of {kind} {index}"
        addresses += node.read(f"servers_{index}", config.servers.start_timeout_s, what)
    return addresses


def serve(config: Config, host: str, port: int) -> int:
    """Become one vLLM server, as training expects it, for `servers.addresses` of another command."""
    server.secret()
    stop.unblock()
    # Whoever starts several divides the machine.
    config = config.model_copy(update={"servers": config.servers.model_copy(update={"count": 1})})
    command = server.command(config, port, host)
    os.execve(command[0], command, {**os.environ, **server.environment(config, 0, ranks=0)})


def serve_node(config: Config, node: Node) -> int:
    """Run `servers.count` servers on this rollout node of a job until SIGINT; ends all when one ends for good."""
    for number in _AT_ONCE:
        signal.signal(number, _interrupt)
    # The stop signals are not for servers, which the trainer needs until its last step is done.
    stop.block()
    servers: list[process.Child] = []
    try:
        servers, addresses = server.start(config, server.secret(), node)
        node.publish(f"servers_{node.index}", addresses)
        if failed := process.supervise([], servers, revived=reviver(config)):
            _report(failed, servers, node)
        return 1
    except _Interrupted:
        return 0
    finally:
        process.stop(servers)


def is_rank() -> bool:
    """True in a process that torchrun or this launcher started as one of the trainer's ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
