"""A node's place in a job, from SLURM's variables and a folder that nodes share."""

import re
import socket
import threading
from types import SimpleNamespace

import psutil
import pytest

from megatron_dgpo.cluster import INTERFACE, JOB, ROLLOUT_NODES, Node, torchrun_environment
from megatron_dgpo.errors import UsageError

VARIABLES = {JOB: "7.1", "SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "4", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}


def test_outside_a_job(tmp_path):
    node = Node.here(tmp_path, {"SLURM_NODEID": "2", "SLURM_JOB_ID": "7"})
    assert node == Node(tmp_path / "logs") and node.address == "127.0.0.1"


def test_in_a_job(tmp_path):
    node = Node.here(tmp_path, VARIABLES | {ROLLOUT_NODES: "3"})
    assert (node.index, node.count, node.rollout_nodes) == (2, 4, 3)
    assert node.logs == tmp_path / "logs" / "7.1" and node.address == "127.0.0.1"


def test_address_of_a_named_interface(tmp_path):
    assert Node.here(tmp_path, VARIABLES | {INTERFACE: "lo"}).address == "127.0.0.1"
    with pytest.raises(UsageError, match=f"{INTERFACE}=ib7"):
        Node.here(tmp_path, VARIABLES | {INTERFACE: "ib7"})


@pytest.fixture
def ib0(monkeypatch):
    entry = SimpleNamespace(family=socket.AF_INET, address="10.9.8.7")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [], "ib0": [entry]})
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def test_gloo_and_nccl_meet_on_the_same_interface(tmp_path, ib0):
    assert Node(tmp_path, address="10.9.8.7").environment() == {
        "VLLM_HOST_IP": "10.9.8.7",
        "GLOO_SOCKET_IFNAME": "ib0",
        # Without = it would mean ib01, too.
        "NCCL_SOCKET_IFNAME": "=ib0",
    }
    assert Node(tmp_path).environment() == {}


def test_ranks_of_torchrun_find_the_interface_or_say_what_they_need(ib0):
    world = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}
    assert torchrun_environment(world | {"LOCAL_WORLD_SIZE": "16"}) == {}
    assert torchrun_environment({"WORLD_SIZE": "2"}) == {}
    found = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}
    assert torchrun_environment(world | {INTERFACE: "ib0"}) == found
    # What the user has set for gloo holds for NCCL.
    assert torchrun_environment(world | {"GLOO_SOCKET_IFNAME": "eth1"}) == {"NCCL_SOCKET_IFNAME": "=eth1"}
    # A node whose name is its loopback address, as Debian writes /etc/hosts.
    with pytest.raises(UsageError, match=f"MASTER_ADDR=127.0.0.1 is 127.0.0.1 on this node.*{INTERFACE}="):
        torchrun_environment(world)
    with pytest.raises(UsageError, match="no way to the first node, no-such-host.invalid"):
        torchrun_environment(world | {"MASTER_ADDR": "no-such-host.invalid"})


def test_what_one_node_publishes_others_read(tmp_path):
    ours, theirs = (Node(tmp_path / "logs", index, 2) for index in (0, 1))
    timer = threading.Timer(1, ours.publish, ("master", ["10.0.0.1", 1234]))
    timer.start()
    assert theirs.read("master", 30, "the first node") == ["10.0.0.1", 1234]
    timer.join()


def test_waiting_has_an_end(tmp_path):
    expected = re.escape(f"waited 0.5 s (servers.start_timeout_s) for the servers: {tmp_path / 'logs' / 's.json'}")
    with pytest.raises(UsageError, match=expected):
        Node(tmp_path / "logs").read("s", 0.5, "the servers")


def test_a_node_that_is_refused_is_not_waited_for(tmp_path):
    ours, theirs = (Node.here(tmp_path, VARIABLES | {"SLURM_NODEID": str(index)}) for index in (0, 1))
    with pytest.raises(UsageError, match="no such model"), ours.telling_refusals():
        raise UsageError("no such model")
    with pytest.raises(UsageError, match="another node of the job has failed, while the servers of node 0 was waited"):
        theirs.read("servers_0", 600, "the servers of node 0")
    assert not theirs.is_first_failure()


def test_only_one_failure_is_the_first(tmp_path):
    nodes = [Node.here(tmp_path, VARIABLES | {"SLURM_NODEID": str(i)}) for i in range(3)]
    nodes[0].logs.mkdir(parents=True)
    assert [node.is_first_failure() for node in nodes] == [True, False, False]
    # One machine alone reports every time.
    assert [Node(tmp_path / "logs").is_first_failure() for _ in range(2)] == [True, True]
