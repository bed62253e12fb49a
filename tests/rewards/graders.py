"""Graders as a careless user writes them: (response, answer, row) -> whatever."""

import ctypes
import os
import subprocess
import sys
import time

import numpy


def by_response(response, answer, row):
    """Does what the response says."""
    return BEHAVIOURS[response](answer, row)


def _sleep_in_c(answer, row):
    # Holds the interpreter lock: no thread or signal handler of this process could end it.
    ctypes.PyDLL(None).sleep(60)


def _leave_a_child(answer, row):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(answer, "w") as file:
        file.write(str(child.pid))
    time.sleep(60)


def _slow(answer, row):
    time.sleep(0.3)
    return 1.0


def _starve(answer, row):
    # Compute for `answer` seconds on the processor `row` names, which other processes want too.
    os.sched_setaffinity(0, [row["processor"]])
    start = time.process_time()
    while time.process_time() - start < float(answer):
        pass
    return 1.0


def _print_much(answer, row):
    print("x" * 100_000)
    return 1.0


class _Rude:
    def __repr__(self):
        raise RuntimeError("no name")


BEHAVIOURS = {
    "good": lambda answer, row: row["reward"],
    "hang": lambda answer, row: time.sleep(60),
    "hang in C": _sleep_in_c,
    "leave a child": _leave_a_child,
    "slow": _slow,
    "starve": _starve,
    "exit": lambda answer, row: os._exit(0),
    "sys.exit": lambda answer, row: sys.exit(3),
    "segfault": lambda answer, row: ctypes.string_at(0),
    "raise": lambda answer, row: 1 / 0,
    "none": lambda answer, row: None,
    "text": lambda answer, row: "1.0",
    "nan": lambda answer, row: float("nan"),
    "inf": lambda answer, row: float("inf"),
    "complex": lambda answer, row: 1j,
    "rude": lambda answer, row: _Rude(),
    "bool": lambda answer, row: True,
    "several": lambda answer, row: {"right": 1.0, "brief": 0.5},
    "numpy": lambda answer, row: numpy.float32(0.5),
    "print": _print_much,
}


def several(response, answer, row):
    """Rewards called right and brief, unless the response asks for something else."""
    if response == "good":
        return {"brief": 1 / len(answer), "right": numpy.float32(row["right"])}
    return {
        "one number": 1.0,
        "one missing": {"right": 1.0},
        "one too many": {"right": 1.0, "brief": 0.5, "polite": 1.0},
        "other name": {"right": 1.0, "brif": 0.5},
        "nan": {"right": 1.0, "brief": float("nan")},
        "none": {"right": 1.0, "brief": None},
        "a list": [1.0, 0.5],
        "number for a name": {1: 1.0, "brief": 0.5},
        "beyond float64": {"right": 1.5e308, "brief": 1.5e308},
        "rude": {"right": 1.0, "brief": _Rude()},
    }[response]


def environment(response, answer, row):
    """1 when this process knows nothing of the trainer: no torch, no rank, no secret, no socket but its own."""
    sockets = [fd for fd in os.listdir("/proc/self/fd") if _is_socket(fd)]
    clean = "torch" not in sys.modules and not {"RANK", "MASTER_ADDR", "MEGATRON_DGPO_SECRET"} & set(os.environ)
    return float(clean and len(sockets) == 1)


def _is_socket(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False


def process_id(response, answer, row):
    return os.getpid()


NOT_A_FUNCTION = 3
