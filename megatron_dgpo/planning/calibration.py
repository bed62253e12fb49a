"""Measured efficiencies in place of the planner's own.

A calibration is a JSON object of any of these, by the names of the constants in step_time.py, where each is explained:

    {"GEMM": 0.61, "NETWORK": 0.70, "COLLECTIVE_S": 9e-6}
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from megatron_dgpo.errors import UsageError
from megatron_dgpo.planning import step_time

# Shares of a data sheet's rate, above 0 and at most 1.
SHARES = ("GEMM", "GROUPED_GEMM", "ATTENTION", "MEMORY", "NETWORK", "DECODE_MEMORY")
# Seconds, 0 or more.
LATENCIES = ("COLLECTIVE_S", "KERNEL_GAP_S", "STEP_S", "SYNC_S")
# Bytes/s, above 0.
RATES = ("PCIE",)
NAMES = (*SHARES, *LATENCIES, *RATES)


def built_in() -> dict[str, float]:
    return {name: getattr(step_time, name) for name in NAMES}


def read_calibration(path: Path) -> dict[str, float]:
    """All of NAMES, from the file where it has them. Raises UsageError naming the file and the entry."""
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--calibration={path}: not readable: {error}") from None
    except ValueError as error:
        raise UsageError(f"--calibration={path}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or not values:
        raise UsageError(f"--calibration={path}: expected a JSON object with any of {', '.join(NAMES)}")
    for name, value in values.items():
        if name not in NAMES:
            raise UsageError(f"--calibration={path}: {name} is not one of {', '.join(NAMES)}; remove or rename it")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_legal(name, value):
            raise UsageError(f"--calibration={path}: {name}={value!r}, expected {_expected(name)}")
    return built_in() | {name: float(value) for name, value in values.items()}


@contextlib.contextmanager
def calibrated(values: dict[str, float]) -> Iterator[None]:
    """step_time.py's formulas use `values` inside. They read constants of their module: one calibration at a time."""
    before = built_in()
    try:
        for name, value in values.items():
            setattr(step_time, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(step_time, name, value)


def _is_legal(name: str, value: float) -> bool:
    if not math.isfinite(value):
        return False
    return value >= 0 if name in LATENCIES else 0 < value <= (1 if name in SHARES else math.inf)


def _expected(name: str) -> str:
    if name in SHARES:
        return "a share of the data sheet's rate, above 0 and at most 1"
    return "seconds, 0 or more" if name in LATENCIES else "bytes a second, above 0"
