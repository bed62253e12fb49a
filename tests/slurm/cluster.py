"""A real SLURM on this host for tests: three nodes on loopback, their daemons in a temporary folder.

Debian's slurmd runs several nodes on one host (`slurmd -N NAME`); munged, slurmctld and slurmd run as the user of the
tests, and nothing outside the folder is read or written. However the tests end, the daemons do too.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from megatron_dgpo import process
from megatron_dgpo.cluster import DEVICE
from megatron_dgpo.rollout.server import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("first", "second", "third")
# `urgent` preempts `main`, whose jobs are warned a minute before. cred_expire: a requeued job waits as long.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
KillWait=5
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    """Daemons live in sbin, which a user's PATH may lack."""
    return f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"


class Slurm:
    """Start it with a short folder, for the socket in it; `close` it whatever happens."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        # Where SLURM kills a whole step at once, nobody is left to remove its temporary files.
        self.environment["TMPDIR"] = str(folder)
        # Its nodes have GPUs, as in the sbatch files, but this host has none.
        self.environment[DEVICE] = "cpu"
        self._daemons: list[process.Child] = []
        self._write_config()
        self._start("munged", "--foreground", "--force", *self._munge_files())
        self._wait(lambda: (folder / "munge.socket").exists(), "munged's socket")
        self._start("slurmctld", "-D")
        for name in NODES:
            self._start("slurmd", "-D", "-N", name, log=f"slurmd-{name}")
        self._wait(lambda: self._run("sinfo", "-h", "-o", "%D %T", check=False) == f"{len(NODES)} idle", "idle nodes")

    def _write_config(self) -> None:
        folder, host = self._folder, socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 Gres=gpu:8 State=UNKNOWN"
            for name in NODES
        ]
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        text = _CONFIG.format(host=host, port=free_port(), user=user, folder=folder, nodes="\n".join(nodes))
        (folder / "slurm.conf").write_text(text)
        # This host has none: any files stand for devices.
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-7]\n")
        for name in ("state", *NODES):
            (folder / name).mkdir()
        (folder / "munge.key").touch(mode=0o400)
        os.chmod(folder / "munge.key", 0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))

    def _munge_files(self) -> list[str]:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self._folder}/munge.{suffix}" for option, suffix in files.items()]

    def _start(self, *command: str, log: str = "") -> None:
        name = log or command[0]
        program = shutil.which(command[0], path=_path())
        log_file = self._folder / f"{name}.out"
        self._daemons.append(process.start(name, [program, *command[1:]], self.environment, log_file))

    def _wait(self, condition, what: str, limit_s: float = 30) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            ended = [daemon for daemon in self._daemons if daemon.process.poll() is not None]
            if ended or time.monotonic() > deadline:
                outputs = "\n".join(f"{daemon.name}:\n{daemon.log.read_text()[-2000:]}" for daemon in self._daemons)
                self.close()
                raise RuntimeError(f"SLURM: no {what} within {limit_s:g} s, or a daemon ended:\n{outputs}")
            time.sleep(0.2)

    def _run(self, *command: str, check: bool = True) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout.strip()

    def submit(self, *arguments: str, cwd: Path | None = None) -> str:
        """`sbatch ARGUMENTS`, with --wait for the job's end; returns the job's number."""
        command = ["sbatch", "--parsable", *arguments]
        result = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, …"""
        # The first component of a heterogeneous job speaks for all.
        line = self._run("scontrol", "show", "job", "--oneliner", number).splitlines()[0]
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def limit(self, number: str, minutes: int) -> None:
        self._run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")

    def cancel_all(self) -> None:
        self._run("scancel", "--me", check=False)
        deadline = time.monotonic() + 40
        while self._run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)

    def close(self) -> None:
        if len(self._daemons) > 2:
            self.cancel_all()
        # In reverse: munged authenticates the others' last messages.
        for daemon in reversed(self._daemons):
            process.stop([daemon])
        self._daemons.clear()
