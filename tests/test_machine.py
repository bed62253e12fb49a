"""Which device a run takes, what says that it should have been another, and what the user is told."""

import pytest
import torch

from megatron_dgpo import machine
from megatron_dgpo.errors import UsageError
from megatron_dgpo.machine import DEVICE, choose_device, describe


@pytest.fixture
def environment(monkeypatch):
    """Without GPUs, and without a word of them; without what choose_device sets, afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in (DEVICE, "CUDA_VISIBLE_DEVICES", *machine._SLURM):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def refusal() -> str:
    with pytest.raises(UsageError) as error:
        choose_device()
    return str(error.value)


@pytest.mark.skipif(bool(torch.version.cuda), reason="this torch is for GPUs")
def test_a_machine_without_gpus_computes_on_the_cpu(environment):
    choose_device()


@pytest.mark.parametrize("name, value", [("SLURM_JOB_GPUS", "0,1"), ("SLURM_GPUS_ON_NODE", "8")])
def test_gpus_of_a_job_that_pytorch_does_not_see(environment, name, value):
    environment.setattr(torch.version, "cuda", None)
    environment.setenv(name, value)
    message = refusal()
    assert f"SLURM gave this job some ({name}={value})" in message and "is built without CUDA" in message
    assert f"set {DEVICE}=cpu" in message
    environment.setenv(name, "0")
    choose_device()


@pytest.mark.parametrize(
    "cuda, version, expected",
    [
        # Clusters whose driver is of the year before: CUDA 13 came with 580.
        (
            "13.0",
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19",
            "driver 535.104.05 is too old",
        ),
        ("13.0", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release", "needs 580 or newer"),
        ("12.8", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue", "CUDA 12.8, which needs 525"),
        ("13.0", None, "no NVIDIA driver is loaded"),
    ],
)
def test_why_a_torch_for_gpus_sees_none(environment, tmp_path, cuda, version, expected):
    environment.setattr(torch.version, "cuda", cuda)
    environment.setattr(machine, "_DRIVER", tmp_path / "version")
    if version:
        (tmp_path / "version").write_text(f"{version}\nGCC version:  gcc version 12.3.0\n")
    message = refusal()
    assert "is built for them" in message and expected in message


def test_hidden_gpus_are_named_and_the_cpu_can_be_asked_for(environment):
    environment.setattr(torch.version, "cuda", "13.0")
    environment.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides them" in refusal()
    environment.setenv(DEVICE, "gpu")
    assert f"{DEVICE}=gpu: expected cpu" in refusal()
    environment.setenv(DEVICE, "cpu")
    choose_device()


def test_asking_for_the_cpu_hides_the_gpus_from_all_processes(environment):
    import os

    environment.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    environment.setenv(DEVICE, "cpu")
    choose_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("package", ["vllm", "transformer_engine"])
def test_software_for_gpus_says_that_there_should_be_some(environment, tmp_path, package):
    environment.setattr(torch.version, "cuda", None)
    installed = tmp_path / f"{package}-0.32.0.dist-info"
    installed.mkdir()
    environment.syspath_prepend(tmp_path)
    for version, refused in (("0.32.0", True), ("0.32.0+cpu", False)):
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        if refused:
            assert f"{package} is installed, in its build for GPUs" in refusal()
        else:
            choose_device()


def test_the_device_is_said_in_one_line(environment, tmp_path):
    assert describe(2, 1, "auto").startswith("2 ranks and 1 vLLM server on the CPU, ")
    assert describe(1, 0, "auto").startswith("1 rank on the CPU, ")
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 8)
    environment.setattr(machine, "_MODELS", tmp_path)
    assert describe(0, 2, "portable") == "2 vLLM servers on 8 × GPU, portable layers"
    (tmp_path / "0000:1b:00.0").mkdir()
    (tmp_path / "0000:1b:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:  30\n")
    line = "4 ranks and 1 vLLM server on 8 × NVIDIA H100 80GB HBM3, Transformer Engine's layers"
    assert describe(4, 1, "te") == line
