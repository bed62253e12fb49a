"""GPUs by name, or from a file of the same fields."""

from __future__ import annotations

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
