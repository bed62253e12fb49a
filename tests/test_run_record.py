"""What a run writes down of each of its starts."""

import json
import re
import subprocess
import sys

import pytest
import torch

from megatron_dgpo import machine, run_record
from megatron_dgpo.layout import Layout
from megatron_dgpo.rollout.guard import SECRET
from megatron_dgpo.run_record import record_start


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with one commit, as the package's."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text("a = 1\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    monkeypatch.setattr(run_record, "_CHECKOUT", folder)
    return folder


def commit_of(folder):
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()


def test_each_start_has_a_line(tmp_path, monkeypatch, checkout):
    monkeypatch.setattr(sys, "argv", ["cli.py", "train", "config.yaml", "optimizer.lr=1e-5"])
    monkeypatch.setenv(SECRET, "do-not-tell")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.chdir(tmp_path)
    hosts = {"node1": machine.hardware(), "node2": {"device": "NVIDIA H100", "count": 8}}
    record_start(tmp_path / "run", Layout(tensor=2, data=3), hosts, 0)
    monkeypatch.delenv("SLURM_JOB_ID")
    (checkout / "code.py").write_text("a = 2\n")
    record_start(tmp_path / "run", Layout(), hosts, 20)
    text = (tmp_path / "run" / "starts.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["time"])
    assert first["command"] == ["train", "config.yaml", "optimizer.lr=1e-5"] and first["folder"] == str(tmp_path)
    assert (first["ranks"], first["layout"]["tensor"], first["layout"]["data"]) == (6, 2, 3)
    assert first["hosts"] == hosts and first["job"] == "123" and "job" not in second
    assert (first["steps_done"], second["steps_done"]) == (0, 20)
    assert first["commit"] == commit_of(checkout) and second["commit"] == f"{commit_of(checkout)}-dirty"
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"].keys() >= {"megatron-dgpo", "megatron-core", "transformers"}
    assert "do-not-tell" not in text


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch, checkout):
    (checkout / "site-packages").mkdir()
    for folder, path in ((checkout / "site-packages", None), (checkout, str(tmp_path))):
        # Installed somewhere below another project's checkout; or a machine without git.
        monkeypatch.setattr(run_record, "_CHECKOUT", folder)
        if path:
            monkeypatch.setenv("PATH", path)
        record_start(tmp_path / "run", Layout(), {}, 0)
    assert all("commit" not in json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").open())


def test_a_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_CPU", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 7B13\nprocessor\t: 1\n")
    assert machine.hardware()["device"] == "AMD EPYC 7B13" and machine.hardware()["count"] > 0
    # Not on Arm.
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert machine.hardware()["device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert machine.hardware() == {"device": "NVIDIA H100", "count": 8}
