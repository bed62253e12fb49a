"""What a plan is for: GPUs by name or from a file, a cluster of them, and how much of their rates is reached."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from megatron_dgpo.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual server of eight. Bandwidths are bytes/s of one GPU in one direction."""

    name: str
    memory_bytes: float
    """What PyTorch reports as the device's total memory."""
    flops: float
    """Dense bfloat16, per second."""
    memory_bandwidth: float
    node_bandwidth: float
    """To the other GPUs of the machine (NVLink)."""
    network_bandwidth: float
    """To other machines."""


@dataclass(frozen=True)
class Efficiencies:
    """What large operations reach on a cluster, the same for every model, GPU and layout. Names without a unit are
    shares of a data sheet's rate; `_s` is seconds, `_bandwidth` bytes/s."""

    gemm: float = 0.65
    """Of Gpu.flops: bfloat16 matrix products inside a model (cuBLAS alone: 0.7 of an H100's, 0.8 of an A100's)."""
    grouped_gemm: float = 0.30
    """Of Gpu.flops: experts' products, with fewer rows each, uneven between experts."""
    attention: float = 0.45
    """Of Gpu.flops: FlashAttention-2 and cuDNN, causal, forward and backward."""
    memory: float = 0.80
    """Of Gpu.memory_bandwidth: element-wise kernels, optimizer."""
    network: float = 0.75
    """Of Gpu.node_bandwidth and Gpu.network_bandwidth: NCCL rings over NVLink and InfiniBand."""
    decode_memory: float = 0.65
    """Of Gpu.memory_bandwidth: vLLM's decode kernels, small products and paged attention."""
    collective_s: float = 12e-6
    """Latency of one small all-reduce on a machine."""
    kernel_gap_s: float = 25e-6
    """Launches and gaps of one decoder layer in a CUDA graph."""
    decode_step_s: float = 2e-3
    """vLLM's scheduler, sampler and detokeniser for one token of all sequences."""
    pcie_bandwidth: float = 50e9
    """From pinned host memory, generation 5 × 16."""
    sync_s: float = 0.5
    """Pause, cache reset, resume and checks around a weight update."""
    request_s: float = 1.5e-3
    """Of rank 0, to tell one server where a bucket of gathered weights is on every rank's GPU (512 ranks, on a CPU)."""


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs."""

    gpu: Gpu
    gpus_per_node: int
    efficiencies: Efficiencies = Efficiencies()

    def bandwidth(self, reach: int) -> float:
        """Of one GPU in a collective over `reach` consecutive ranks: the machine's, or the network's beyond one."""
        raw = self.gpu.node_bandwidth if reach <= self.gpus_per_node else self.gpu.network_bandwidth
        return raw * self.efficiencies.network


_GIB = 2**30
# Data sheets: NVIDIA A100 80GB SXM (2021), H100 SXM5 (2023), H200 SXM (2024), HGX B200 (2025); FLOP/s without sparsity;
# NVLink 3, 4 and 5 at half of the bidirectional figure. Network: one NIC a GPU of 200 Gb/s in a DGX A100, of 400 Gb/s
# in DGX H100, H200 and B200.
GPUS = {
    "a100": Gpu("A100-80GB", 79.1 * _GIB, 312e12, 2.039e12, 300e9, 25e9),
    "h100": Gpu("H100-80GB", 79.1 * _GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200-141GB", 139.8 * _GIB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu("B200-180GB", 178.3 * _GIB, 2250e12, 7.7e12, 900e9, 50e9),
}
_OTHERS = {"pcie", "nvl", "mig"}


def known_gpu(device: str) -> Gpu | None:
    """By PyTorch's name of it, such as "NVIDIA H100 80GB HBM3". PCIe cards and slices of a GPU have other rates.

    >>> known_gpu("NVIDIA A100-SXM4-80GB").name, known_gpu("NVIDIA H100 NVL"), known_gpu("NVIDIA GH200 480GB")
    ('A100-80GB', None, None)
    """
    words = set(re.split(r"\W+", device.lower()))
    return next((gpu for name, gpu in GPUS.items() if name in words and not words & _OTHERS), None)


def read_gpu(text: str) -> Gpu:
    """A name of GPUS, or a YAML or JSON file with the fields of Gpu. Raises UsageError naming the file and field."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    path = Path(text)
    if not path.is_file():
        raise UsageError(f"--gpu={text}: neither one of {', '.join(GPUS)} nor a file")
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable as YAML: {error}") from None
    names = [field.name for field in fields(Gpu)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise UsageError(f"{path}: expected exactly the fields {', '.join(names)}; found {found}")
    numbers = {}
    for name in names[1:]:
        try:
            numbers[name] = float(values[name])
        except (TypeError, ValueError):
            numbers[name] = 0.0
        if not 0 < numbers[name] < float("inf"):
            raise UsageError(f"{path}: {name}={values[name]!r}, expected a positive number")
    return Gpu(str(values["name"]), **numbers)


def read_calibration(path: Path) -> Efficiencies:
    """A JSON object of measured fields of Efficiencies, for example {"gemm": 0.61, "collective_s": 9e-6}; the others
    keep their defaults. Raises UsageError naming the file and the entry."""
    source, names = f"--calibration={path}", ", ".join(field.name for field in fields(Efficiencies))
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: not readable: {error}") from None
    except ValueError as error:
        raise UsageError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or not values:
        raise UsageError(f"{source}: expected a JSON object with any of {names}")
    for name, value in values.items():
        if name not in Efficiencies.__dataclass_fields__:
            raise UsageError(f"{source}: {name} is not one of {names}; remove or rename it")
        if expected := _expected(name, value):
            raise UsageError(f"{source}: {name}={value!r}, expected {expected}")
    return Efficiencies(**{name: float(value) for name, value in values.items()})


def _expected(name: str, value: object) -> str | None:
    """What a field of Efficiencies may be, where `value` is something else; None: it is that."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if name.endswith("_s"):
        return None if 0 <= number < math.inf else "seconds, 0 or more"
    if name.endswith("_bandwidth"):
        return None if 0 < number < math.inf else "bytes a second, above 0"
    return None if 0 < number <= 1 else "a share of the data sheet's rate, above 0 and at most 1"
