"""One machine's place in a SLURM job: who it is, where it listens, and how it finds the others.

The sbatch files start one launcher a node. Ports are found where they are used and told to the others through files in
the job's folder of logs, `run.dir/logs/JOB.RESTART`, which all nodes share as they share checkpoints. Nothing secret
is in them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_dgpo.errors import UsageError

DEVICE = "MEGATRON_DGPO_DEVICE"
"""cpu: compute on the CPU, whatever GPUs there are or should be; not set: on the GPUs, where there are any."""
JOB = "MEGATRON_DGPO_JOB"
"""JOB.RESTART, set by the sbatch files: this process is a node's launcher."""
ROLLOUT_NODES = "MEGATRON_DGPO_ROLLOUT_NODES"
"""Nodes of the job that run vLLM servers only; 0: every trainer node starts its own."""
FAILED_NODES = "MEGATRON_DGPO_FAILED_NODES"
"""A file for the names of nodes that failed, set by the sbatch files: a job that begins again avoids them."""
INTERFACE = "MEGATRON_DGPO_INTERFACE"
"""Network interface to listen on, such as ib0; default: the one through which this node reaches the job's first."""

LOOPBACK = "127.0.0.1"
_POLL_S = 0.5


@dataclass(frozen=True)
class Node:
    """`index` of the `count` nodes that run the same command; `rollout_nodes` others run servers."""

    logs: Path
    index: int = 0
    count: int = 1
    rollout_nodes: int = 0
    address: str = LOOPBACK
    in_job: bool = False

    @classmethod
    def here(cls, run_dir: Path, variables: Mapping[str, str] = os.environ) -> Node:
        """From SLURM's variables in a job of the sbatch files; otherwise this machine alone."""
        logs = run_dir / "logs"
        if JOB not in variables:
            return cls(logs)
        return cls(
            logs / variables[JOB],
            int(variables.get("SLURM_NODEID", 0)),
            int(variables.get("SLURM_STEP_NUM_NODES", 1)),
            int(variables.get(ROLLOUT_NODES, 0)),
            _own_address(variables, variables["SLURM_LAUNCH_NODE_IPADDR"]),
            in_job=True,
        )

    def environment(self) -> dict[str, str]:
        """Where this node's processes meet those of other nodes; what the user has set stays."""
        return {} if self.address == LOOPBACK else {"VLLM_HOST_IP": self.address, **_interfaces(self.address)}

    def publish(self, name: str, value) -> None:
        """Tell the other nodes."""
        self.logs.mkdir(parents=True, exist_ok=True)
        partial = self.logs / f".{name}.json"
        partial.write_text(json.dumps(value))
        partial.rename(self.logs / f"{name}.json")

    def read(self, name: str, timeout_s: float, what: str):
        """What a node has published, when it has; raises UsageError with `what` was waited for, at once where a node
        has failed."""
        file = self.logs / f"{name}.json"
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                return json.loads(file.read_text())
            if self.has_failed():
                raise UsageError(f"another node of the job has failed, while {what} was waited for")
            # Lets a network file system look again.
            with contextlib.suppress(FileNotFoundError):
                os.listdir(self.logs)
            time.sleep(_POLL_S)
        raise UsageError(f"waited {timeout_s:g} s (servers.start_timeout_s) for {what}: {file} has not appeared")

    def is_second_in_vain(self) -> bool:
        """Notes that this start of the job made no step; whether the start before it, of a requeued job, made none
        either: a third would be no better. The same on all nodes."""
        if not self.in_job:
            return False
        (self.logs / "no_step").touch()
        job, _, start = self.logs.name.rpartition(".")
        return (self.logs.with_name(f"{job}.{int(start) - 1}") / "no_step").exists()

    def failures(self) -> int:
        """Starts of this job that have failed; this one is among them from now on. The same on all nodes."""
        (self.logs / "ended_badly").touch()
        job, _, _ = self.logs.name.rpartition(".")
        return len(list(self.logs.parent.glob(f"{job}.*/ended_badly")))

    def has_failed(self) -> bool:
        """Whether some node of the job has."""
        return self.in_job and (self.logs / "failed").exists()

    @contextlib.contextmanager
    def telling_refusals(self) -> Iterator[None]:
        """Around what other nodes may wait for: a UsageError is this node's failure."""
        try:
            yield
        except UsageError:
            if self.in_job:
                with contextlib.suppress(OSError):
                    self.logs.mkdir(parents=True, exist_ok=True)
                    self.is_first_failure()
            raise

    def is_first_failure(self) -> bool:
        """True for the first caller of the whole job: its failure caused the others'."""
        try:
            if self.in_job:
                (self.logs / "failed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def note_failed_node(variables: Mapping[str, str] = os.environ) -> None:
    """This one, in a job that may begin again on others."""
    if FAILED_NODES in variables:
        with contextlib.suppress(OSError), open(variables[FAILED_NODES], "a") as file:
            file.write(f"{variables.get('SLURMD_NODENAME', socket.gethostname())}\n")


def torchrun_environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a rank that torchrun started lacks to meet those of other nodes; empty on one node.

    Left to themselves gloo takes the address that this node's name has, often 127.0.1.1, and NCCL the first interface.
    Raises UsageError where the way to MASTER_ADDR does not tell which one it must be.
    """
    if int(variables["WORLD_SIZE"]) <= int(variables.get("LOCAL_WORLD_SIZE", variables["WORLD_SIZE"])):
        return {}
    if "GLOO_SOCKET_IFNAME" in variables:
        return {"NCCL_SOCKET_IFNAME": f"={variables['GLOO_SOCKET_IFNAME']}"}
    address = _own_address(variables, variables["MASTER_ADDR"])
    if ipaddress.ip_address(address).is_loopback:
        raise UsageError(
            f"MASTER_ADDR={variables['MASTER_ADDR']} is {address} on this node, where the other nodes cannot reach it: "
            f"name the network between them, {INTERFACE}=eth0 for example"
        )
    return _interfaces(address)


def _interfaces(address: str) -> dict[str, str]:
    """Where gloo and NCCL listen: on the interface with this address. NCCL takes a name without = for a prefix."""
    name = _interface_of(address)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def _own_address(variables: Mapping[str, str], first_node: str) -> str:
    if name := variables.get(INTERFACE):
        addresses = psutil.net_if_addrs().get(name, [])
        found = [address.address for address in addresses if address.family == socket.AF_INET]
        if not found:
            raise UsageError(f"{INTERFACE}={name}: no such interface with an IPv4 address on this node")
        return found[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: asks the kernel for the route.
        try:
            probe.connect((first_node, 9))
        except OSError as error:
            raise UsageError(f"no way to the first node, {first_node}: {error.strerror or error}") from None
        return probe.getsockname()[0]


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None
