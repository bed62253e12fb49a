"""What would be started where: commands, environments and GPUs of every recipe on nodes of 8 GPUs, without one."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from megatron_dgpo import cli, launcher, process, stop
from megatron_dgpo.cluster import INTERFACE, JOB, ROLLOUT_NODES, Node
from megatron_dgpo.config_file import load_config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import Layout
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.guard import SECRET
from megatron_dgpo.weight_sync import BACKEND
from tests.layouts import make_config

ROOT = Path(__file__).parents[1]
RECIPES = ("qwen2.5-7b", "qwen2.5-32b", "qwen2.5-72b", "qwen3-30b-a3b", "qwen3-235b-a22b")
GPUS = 8


class Started:
    """Every process of a job, by node, and which GPUs each would use."""

    def __init__(self, monkeypatch) -> None:
        self.node, self.status = "", 0
        self.processes: list[SimpleNamespace] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)
        monkeypatch.setattr(process, "start", self._start)
        monkeypatch.setattr(process, "supervise", lambda *_, **__: None)
        monkeypatch.setattr(process, "stop", lambda _: None)
        monkeypatch.setattr(launcher, "_report", lambda *_: None)
        # Ports of addresses that this machine has not, and signals that are pytest's.
        monkeypatch.setattr(server, "free_port", lambda host: 20000 + len(self.processes))
        monkeypatch.setattr(launcher, "_handle_signals", lambda *_, **__: None)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(launcher.stop, "block", lambda: None)
        monkeypatch.setattr(launcher.stop, "unblock", lambda: None)
        monkeypatch.setattr(psutil, "net_if_addrs", self._interfaces)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv(SECRET, "a-secret")

    def _start(self, name, command, env, log, show_output=False, kept=()):
        self.processes.append(SimpleNamespace(name=name, command=command, env=env, log=log, node=self.node))
        return process.Child(name, SimpleNamespace(returncode=self.status, poll=lambda: 0), log, command, env)

    def _interfaces(self):
        entry = SimpleNamespace(family=socket.AF_INET, address=self.node)
        return {"lo": [SimpleNamespace(family=socket.AF_INET, address="127.0.0.1")], "ib0": [entry]}

    def job(self, config, nodes: int, rollout_nodes: int) -> None:
        """As slurm/separate.sbatch does: the two steps, a launcher a node."""
        for index in range(rollout_nodes):
            launcher.serve_node(config, self._node(config, index, rollout_nodes, nodes + index, rollout_nodes))
        for index in range(nodes):
            node = self._node(config, index, nodes, index, rollout_nodes)
            found = launcher.find_servers(config, node)
            size = launcher.trainer_size(found, node)
            assert launcher.launch(["train", "config.yaml"], found, node, size) == 0

    def shared_job(self, config, nodes: int) -> None:
        """As slurm/shared.sbatch does: one step, whose nodes all run servers, too."""
        others = {index: [f"http://10.0.0.{index + 1}:1"] for index in range(nodes)}
        for index in range(nodes):
            node = self._node(config, index, nodes, index, 0)
            for other in others.keys() - {index}:
                # They start at the same time as this one.
                node.publish(f"servers_{other}", others[other])
            found = launcher.find_servers(config, node)
            assert launcher.launch(["train", "config.yaml"], found, node, launcher.trainer_size(found, node)) == 0

    def _node(self, config, index: int, count: int, place: int, rollout_nodes: int) -> Node:
        self.node = f"10.0.0.{place + 1}"
        variables = {JOB: "7.0", "SLURM_NODEID": str(index), "SLURM_STEP_NUM_NODES": str(count), INTERFACE: "ib0"}
        variables["SLURM_LAUNCH_NODE_IPADDR"] = "10.0.0.1"
        return Node.here(config.run.dir, variables | {ROLLOUT_NODES: str(rollout_nodes)})

    def machine(self, config) -> None:
        """One machine without SLURM."""
        node = Node.here(config.run.dir, {})
        assert launcher.launch(["train", "config.yaml"], config, node, launcher.trainer_size(config, node)) == 0

    @property
    def ranks(self) -> list[SimpleNamespace]:
        return [p for p in self.processes if p.name.startswith("rank")]

    @property
    def servers(self) -> list[SimpleNamespace]:
        return [p for p in self.processes if p.name.startswith("vLLM")]

    def gpus_of(self, child) -> list[str]:
        visible = child.env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS)))).split(",")
        return [visible[int(child.env["LOCAL_RANK"])]] if child in self.ranks else visible

    def uses(self) -> Counter:
        """How many processes use each (node, GPU)."""
        return Counter((p.node, gpu) for p in self.processes for gpu in self.gpus_of(p))


@pytest.fixture
def started(monkeypatch):
    return Started(monkeypatch)


def recipe(name: str, tmp_path: Path, *overrides: str):
    """Its settings, and the trainer and rollout nodes that its README launches it on."""
    text = (ROOT / "examples" / name / "README.md").read_text()
    [line] = re.findall(r"^ +megatron-dgpo (launch .*)$", text, re.MULTILINE)
    options = cli._parse(shlex.split(line, comments=True))
    config = load_config(ROOT / options.config, [f"run.dir={tmp_path}", *overrides])
    return config, options.nodes, options.rollout_nodes


def test_a_job_that_is_stopped_before_its_first_step_is_requeued_once(started, tmp_path):
    config = load_config(ROOT / "examples" / "arithmetic" / "config.yaml", [f"run.dir={tmp_path}"])
    started.status, started.node = stop.STOPPED, "10.0.0.1"

    def status_of_start(number: int) -> int:
        variables = {JOB: f"7.{number}", INTERFACE: "ib0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
        node = Node.here(tmp_path, variables)
        # Real ranks have their logs there.
        node.logs.mkdir(parents=True)
        return launcher.launch(["sft", "config.yaml"], config, node, 1)

    assert status_of_start(0) == stop.STOPPED
    with pytest.raises(UsageError, match="asked to stop before it had made a step, and so was its start before this"):
        status_of_start(1)
    # The one before it made steps.
    assert status_of_start(3) == stop.STOPPED


def test_a_job_that_failed_after_a_checkpoint_begins_again_so_many_times(started, tmp_path, monkeypatch):
    overrides = [f"run.dir={tmp_path}", "run.restarts=1"]
    config = load_config(ROOT / "examples" / "arithmetic" / "config.yaml", overrides)
    started.node = "10.0.0.1"
    steps = iter(range(1, 100))

    def status_of_start(number: int, made_step: bool = True) -> int:
        def fails(ranks, *_):
            if made_step:
                folder = tmp_path / "checkpoints" / f"step_{next(steps):08d}"
                folder.mkdir(parents=True)
                progress = {"step": 1, "prompts": 1, "weight_version": 1}
                (folder / "manifest.json").write_text(
                    json.dumps({"progress": progress, "architecture": {}, "files": {}})
                )
            return ranks[0]

        monkeypatch.setattr(process, "supervise", fails)
        monkeypatch.setattr(launcher, "_report", lambda *_: node.is_first_failure())
        started.status = 1
        variables = {JOB: f"7.{number}", INTERFACE: "ib0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
        node = Node.here(tmp_path, variables)
        node.logs.mkdir(parents=True)
        return launcher.launch(["sft", "config.yaml"], config, node, 1)

    assert status_of_start(0, made_step=False) == 1
    (tmp_path / "logs" / "7.0" / "ended_badly").unlink()
    assert status_of_start(1) == stop.FAILED_ON_ITS_WAY
    assert status_of_start(2) == 1


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_node_ends_when_another_has_failed(started, tmp_path, monkeypatch, capsys, restarts):
    overrides = [f"run.dir={tmp_path}", f"run.restarts={restarts}"]
    config = load_config(ROOT / "examples" / "arithmetic" / "config.yaml", overrides)
    started.node = "10.0.0.1"
    variables = {JOB: "7.0", INTERFACE: "ib0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    node = Node.here(tmp_path, variables)
    node.logs.mkdir(parents=True)
    newest = iter([None, "a checkpoint"])
    monkeypatch.setattr(launcher, "_newest_checkpoint", lambda _: next(newest))

    def supervise(ranks, servers, good, revived, look):
        look()
        (node.logs / "failed").touch()
        while True:
            look()
            time.sleep(0.1)

    monkeypatch.setattr(process, "supervise", supervise)
    status = launcher.launch(["sft", "config.yaml"], config, node, 1)
    assert status == (stop.FAILED_ON_ITS_WAY if restarts else 128 + signal.SIGINT)
    assert "another node of the job has failed" in capsys.readouterr().err


def test_an_interruption_while_the_folder_is_waited_for(started, tmp_path, monkeypatch, capsys):
    config = load_config(ROOT / "examples" / "arithmetic" / "config.yaml", [f"run.dir={tmp_path}"])
    started.node = "10.0.0.1"
    variables = {JOB: "7.0", INTERFACE: "ib0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    node = Node.here(tmp_path, variables)
    node.logs.mkdir(parents=True)

    def interrupted(_):
        (node.logs / "failed").touch()
        raise launcher._Interrupted(signal.SIGINT)

    monkeypatch.setattr(launcher, "run_lock", interrupted)
    assert launcher.launch(["sft", "config.yaml"], config, node, 1) == 128 + signal.SIGINT
    assert "another node of the job has failed" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_every_gpu_has_one_process(started, tmp_path, name):
    config, nodes, rollout_nodes = recipe(name, tmp_path)
    started.job(config, nodes, rollout_nodes) if rollout_nodes else started.machine(config)
    assert set(started.uses().values()) == {1}
    assert len(started.uses()) == GPUS * (nodes + rollout_nodes)
    assert len(started.servers) == config.servers.count * max(1, rollout_nodes)
    assert all(len(started.gpus_of(s)) == config.servers.tensor for s in started.servers)
    if rollout_nodes:
        trainers, rollouts = {r.node for r in started.ranks}, {s.node for s in started.servers}
        assert len(trainers) == nodes and len(rollouts) == rollout_nodes and not trainers & rollouts


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_know_their_place_and_the_servers(started, tmp_path, name):
    config, nodes, rollout_nodes = recipe(name, tmp_path)
    started.job(config, nodes, rollout_nodes) if rollout_nodes else started.machine(config)
    world = Layout.from_config(config.parallel).world_size
    places = [(int(r.env["RANK"]), int(r.env["LOCAL_RANK"])) for r in started.ranks]
    assert sorted(places) == [(rank, rank % (world // nodes)) for rank in range(world)]
    assert {r.env["WORLD_SIZE"] for r in started.ranks} == {str(world)}
    assert {r.env["LOCAL_WORLD_SIZE"] for r in started.ranks} == {str(world // nodes)}
    masters = {(r.env["MASTER_ADDR"], r.env["MASTER_PORT"]) for r in started.ranks}
    [(master, _)] = masters
    assert master == ("10.0.0.1" if rollout_nodes else "127.0.0.1")
    listening = [s.command[s.command.index("--host") + 1 : s.command.index("--port") + 2] for s in started.servers]
    expected = {f"http://{host}:{port}" for host, _, port in listening}
    assert len(expected) == len(started.servers)
    assert {frozenset(r.env[server.ADDRESSES].split(",")) for r in started.ranks} == {frozenset(expected)}
    for child in started.processes:
        network = {
            "VLLM_HOST_IP": child.node,
            "GLOO_SOCKET_IFNAME": "ib0",
            # NCCL would take ib0 for ib01, too.
            "NCCL_SOCKET_IFNAME": "=ib0",
        }
        assert all(child.env.get(key) == (value if rollout_nodes else None) for key, value in network.items())


@pytest.mark.parametrize("name", RECIPES)
def test_servers_are_started_as_training_expects(started, tmp_path, name):
    config, nodes, rollout_nodes = recipe(name, tmp_path)
    started.job(config, nodes, rollout_nodes) if rollout_nodes else started.machine(config)
    assert {child.env[SECRET] for child in started.processes} == {"a-secret"}
    assert not any("a-secret" in part for child in started.processes for part in child.command)
    assert [s.name for s in started.servers] == [f"vLLM server {i}" for i in range(len(started.servers))]
    assert len({s.log for s in started.processes}) == len(started.processes)
    for child in started.servers:
        options = dict(zip(child.command, child.command[1:], strict=False))
        assert options["--tensor-parallel-size"] == str(config.servers.tensor)
        assert options["--max-model-len"] == str(config.rollout.context_tokens)
        assert options["--max-num-seqs"] == str(config.servers.max_concurrent)
        assert options["--gpu-memory-utilization"] == str(config.servers.gpu_memory_fraction)
        assert options["--dtype"] == "bfloat16"
        # Terabytes would be read at the start of 235B's, to be overwritten by the first push.
        assert options["--load-format"] == "dummy"
        assert json.loads(options["--weight-transfer-config"]) == {"backend": BACKEND}
        assert "--enforce-eager" not in child.command and "--enable-sleep-mode" not in child.command
        assert child.env["VLLM_SERVER_DEV_MODE"] == "1" and "VLLM_ALLOW_INSECURE_SERIALIZATION" not in child.env
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(child.env)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_servers_that_sleep_share_the_ranks_gpus(started, tmp_path, tensor):
    """All of theirs: vLLM's `ipc` finds a worker's weights by the GPU that both are on."""
    overrides = ("weight_sync.transport=auto", "servers.sleep=true", f"servers.tensor={tensor}")
    config, _, _ = recipe("qwen2.5-7b", tmp_path, *overrides, f"servers.count={4 // tensor}")
    started.machine(config)
    assert started.uses() == {("", str(gpu)): 2 for gpu in range(4)}
    for child in started.servers:
        options = dict(zip(child.command, child.command[1:], strict=False))
        assert json.loads(options["--weight-transfer-config"]) == {"backend": "ipc"}
        assert "--enable-sleep-mode" in child.command and child.env["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_nodes_share_their_gpus_between_ranks_and_servers(started, tmp_path):
    """Three machines; a rank is told all of their servers."""
    overrides = ("weight_sync.transport=auto", "servers.sleep=true", "servers.tensor=4", "servers.count=2")
    config, _, _ = recipe("qwen2.5-7b", tmp_path, *overrides, "parallel.data=null", "parallel.tensor=2")
    started.shared_job(config, 3)
    assert started.uses() == {(f"10.0.0.{node}", str(gpu)): 2 for node in (1, 2, 3) for gpu in range(GPUS)}
    assert sorted(int(rank.env["RANK"]) for rank in started.ranks) == list(range(3 * GPUS))
    assert [server.name for server in started.servers] == [f"vLLM server {i}" for i in range(6)]
    for child in started.servers:
        options = dict(zip(child.command, child.command[1:], strict=False))
        assert options["--host"] == child.node == child.env["VLLM_HOST_IP"] and "--enable-sleep-mode" in child.command
    for rank in started.ranks:
        hosts = [address.split(":")[1].strip("/") for address in rank.env[server.ADDRESSES].split(",")]
        own = [host for host in hosts if host == rank.node]
        assert sorted(set(hosts)) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"] and len(own) == 2


def test_servers_of_several_nodes_have_the_gpus_behind_their_ranks(started, tmp_path):
    config, _, _ = recipe("qwen2.5-7b", tmp_path, "parallel.tensor=2", "parallel.data=2", "servers.tensor=4")
    started.shared_job(config, 2)
    assert started.uses() == {(f"10.0.0.{node}", str(gpu)): 1 for node in (1, 2) for gpu in range(6)}
    assert [started.gpus_of(child) for child in started.servers] == [["2", "3", "4", "5"]] * 2


def test_gpus_that_slurm_gave_are_the_ones_used(started, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3,2,1,0")
    started.machine(recipe("qwen2.5-7b", tmp_path)[0])
    assert [started.gpus_of(child) for child in started.ranks] == [["7"], ["6"], ["5"], ["4"]]
    assert [started.gpus_of(child) for child in started.servers] == [["3", "2", "1", "0"]]


def test_more_servers_than_gpus_are_named(started, tmp_path):
    config, _, _ = recipe("qwen2.5-32b", tmp_path, "servers.count=2")
    with pytest.raises(UsageError, match="server 1 with servers.tensor=8 .* this machine has 8"):
        started.job(config, 8, 8)


# Servers that end

# In place of vLLM: has a child in its group, as a server has an engine, says so, and waits for its end.
_SERVER = """
import os, socket, subprocess, sys, time
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("engine", subprocess.Popen(["sleep", "1000"]).pid, flush=True)
time.sleep(1000)
"""
_BROKEN = "raise RuntimeError('no such model')"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Launch with such servers, and for a rank a process that waits until the file `done` is there."""
    monkeypatch.setattr(launcher, "_handle_signals", lambda *_, **__: None)
    monkeypatch.setattr(launcher.stop, "unblock", lambda: None)
    rank = [
        sys.executable,
        "-c",
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'done')!r}): time.sleep(0.1)",
    ]
    monkeypatch.setattr(
        launcher, "_start_rank", lambda *_: process.start("rank 0", rank, dict(os.environ), tmp_path / "rank_0.log")
    )

    def launch(script, **servers):
        monkeypatch.setattr(server, "command", lambda _, port, host: [sys.executable, "-c", script, host, str(port)])
        config = make_config("unused", run={"dir": tmp_path}, servers=servers)
        return launcher.launch(["train", "config.yaml"], config, Node(tmp_path), 1)

    return launch


def lines(log: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 30
    while not log.exists() or len(found := log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{log} has not got {count} lines within 30 s"
        time.sleep(0.05)
    return found


def test_a_server_that_ends_is_started_anew_where_it_was(small, tmp_path, capfd):
    """Killed alone, and by itself with status 0; what it leaves behind is killed, and at the end nothing is left."""
    log, commands = tmp_path / "vllm_0.log", []

    def kill_twice():
        for count in (1, 2):
            [*_, last] = lines(log, count)
            engine = psutil.Process(int(last.split()[1]))
            commands.append((engine.parent().cmdline(), engine.parent().environ()))
            engine.parent().kill()
            engine.wait(timeout=20)
        lines(log, 3)
        (tmp_path / "done").touch()

    killer = threading.Thread(target=kill_twice)
    killer.start()
    assert small(_SERVER) == 0
    killer.join()
    first, second = commands
    # The same port and secret.
    assert first == second
    said = capfd.readouterr().err
    assert "vLLM server 0 ended (SIGKILL) and is started anew, 1 of 3 times an hour" in said
    assert f"2 of 3 times an hour (servers.max_restarts); its whole output: {log}" in said
    # Killed; on a busy machine the kernel takes its time.
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(lines(log, 3)[2].split()[1])).wait(timeout=20)


@pytest.mark.parametrize("most", [2, 0])
@pytest.mark.parametrize("script", [_BROKEN, "pass"])
def test_a_server_that_ends_at_once_ends_the_run(small, tmp_path, capfd, most, script):
    """After as many restarts as are allowed, with its error; whatever its exit status."""
    assert small(script, max_restarts=most) == 1
    said = capfd.readouterr().err
    assert said.count("is started anew") == most
    status = int(script == _BROKEN)
    assert f"vLLM server 0 ended (exit status {status}); its whole output: {tmp_path / 'vllm_0.log'}" in said
    assert ("vLLM server 0, first error: RuntimeError: no such model" in said) == bool(status)


def test_a_rollout_node_starts_its_servers_anew(small, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launcher.stop, "block", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Node, "publish", lambda *_: None)
    monkeypatch.setenv(SECRET, "a-secret")
    monkeypatch.setattr(server, "command", lambda _, port, host: [sys.executable, "-c", _BROKEN])
    config = make_config("unused", run={"dir": tmp_path}, servers={"count": 2, "max_restarts": 1})
    assert launcher.serve_node(config, Node(tmp_path, 1, 2, 2, in_job=True)) == 1
    said = capfd.readouterr().err
    assert said.count("is started anew, 1 of 1") >= 1 and "first error: RuntimeError: no such model" in said


def test_restarts_are_counted_by_the_hour(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(process, "restart", lambda _: None)
    config = make_config("unused", servers={"max_restarts": 2})
    children = [process.Child(name, SimpleNamespace(returncode=0), tmp_path, [], {}) for name in "ab"]
    revived = launcher.reviver(config)
    assert [revived(children[0]) for _ in range(3)] == [True, True, False]
    assert revived(children[1])
    now[0] = 3601
    assert revived(children[0])
    asleep = make_config("unused", servers={"sleep": True})
    assert not launcher.reviver(asleep)(children[0])


# Ranks

_TWO_RANKS = """
import os, time
import torch.distributed as dist
from megatron_dgpo.session import world
from tests.layouts import make_config
try:
    with world(make_config("unused")):
        if os.environ["RANK"] == "{culprit}":
            raise FloatingPointError("the culprit's")
        dist.barrier()
finally:
    # Ends, and writes its log, long after the other one.
    time.sleep(3 * (os.environ["RANK"] == "{culprit}"))
"""


def two_ranks(folder: Path, program: str) -> list[process.Child]:
    """Real ones, each of which runs the program."""
    port = server.free_port("127.0.0.1")
    rendezvous = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for number in range(2):
        log = folder / "logs" / f"rank_{number}.log"
        variables = {
            "PYTHONPATH": str(ROOT),
            "RANK": str(number),
            "TORCHELASTIC_ERROR_FILE": str(process.error_file(log)),
        }
        command = [sys.executable, "-c", program]
        ranks.append(process.start(f"rank {number}", command, os.environ | rendezvous | variables, log))
    return ranks


def test_ranks_meet_where_the_launcher_says_and_nowhere_else(tmp_path):
    program = """
import os, psutil
import torch.distributed as dist
from megatron_dgpo.session import world
from tests.layouts import make_config
with world(make_config("unused")):
    dist.barrier()
    if os.environ["RANK"] == "0":
        own = psutil.Process().net_connections("tcp")
        print(*{c.laddr.ip for c in own if c.status == "LISTEN" and c.laddr.port == int(os.environ["MASTER_PORT"])})
    dist.barrier()
"""
    ranks = two_ranks(tmp_path, program)
    try:
        assert process.supervise(ranks, []) is None
        assert ranks[0].log.read_text().splitlines()[-1] == "127.0.0.1"
    finally:
        process.stop(ranks)


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_culprit_is_named_though_it_ends_after_its_victim(tmp_path, capfd, culprit):
    ranks = two_ranks(tmp_path, _TWO_RANKS.format(culprit=culprit))
    try:
        failed = process.supervise(ranks, [])
        assert failed is ranks[culprit]
        launcher._report(failed, [], Node(tmp_path))
    finally:
        process.stop(ranks)
    said = capfd.readouterr().err
    assert f"rank {culprit}, first error: FloatingPointError: the culprit's" in said
    assert f"rank {culprit} ended (exit status 1)" in said and f"rank {1 - culprit}" not in said.split("Traceback")[0]
    # So did the other one, of its broken connection.
    assert "Error" in json.loads(ranks[1 - culprit].error_file.read_text())["message"]["message"]


_ONE_LATE = """
import os
import time
import torch.distributed as dist
from megatron_dgpo.process import stacks_on_request
from megatron_dgpo.session import world
from tests.layouts import make_config

def somewhere():
    while True:
        time.sleep(1)

stacks_on_request()
limits = {"run": {"collective_timeout_s": 3}, "servers": {"start_timeout_s": 1}, "weight_sync": {"timeout_s": 1}}
limits["checkpoint"] = {"timeout_s": 1}
with world(make_config("unused", **limits)):
    dist.barrier()
    print("met", flush=True)
    if os.environ["RANK"] == "1":
        somewhere()
    dist.barrier()
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["hangs", "is-stopped"])
def test_whoever_was_waited_for_is_named(tmp_path, capfd, stopped):
    ranks = two_ranks(tmp_path, _ONE_LATE)
    try:
        if stopped:
            while "met" not in ranks[1].log.read_text():
                assert ranks[1].process.poll() is None, ranks[1].log.read_text()
                time.sleep(0.1)
            ranks[1].process.send_signal(signal.SIGSTOP)
        failed = process.supervise(ranks, [])
        assert failed is ranks[0]
        launcher._report(failed, [], Node(tmp_path), process.write_stacks(ranks))
    finally:
        process.stop(ranks)
    said = capfd.readouterr().err
    assert "Timed out waiting 4000ms" in said
    if stopped:
        assert "rank 0 waited for rank 1, which a signal has stopped" in said
    else:
        assert f"rank 0 waited for rank 1, whose stacks are at the end of {ranks[1].log}" in said
        assert "in somewhere" in ranks[1].log.read_text()


def test_a_full_disk_is_told(tmp_path):
    """Of a folder, here a memory of 4 MiB, that takes neither the log nor the error."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], capture_output=True).returncode:
        pytest.skip("NO SMALL DISK HERE: tmpfs cannot be mounted")
    try:
        log = small / "logs" / "rank_0.log"
        fill = f"open('{small}/rest', 'wb').write(bytes(2**23))"
        child = process.start("rank 0", [sys.executable, "-c", fill], dict(os.environ), log)
        try:
            failed = process.supervise([child], [])
            with contextlib.redirect_stderr(io.StringIO()) as said:
                launcher._report(failed, [], Node(small / "logs"))
        finally:
            process.stop([child])
    finally:
        subprocess.run(["umount", small], check=True)
    assert f"no space left on the disk of {small / 'logs'}" in said.getvalue()
