"""One grader process: `python -m megatron_dgpo.rewards.worker SOCKET PARENT GRADER [NAME ...]`.

Imports neither torch nor anything of the trainer. Messages, over the inherited socket with this descriptor: in come
pickled (response, answer, row); out go JSON lists, because the trainer must not unpickle what a user's grader made:
["ready", ""] or ["refused", reason] once, then ["reward", number], ["error", reason] or ["not_a_number", reason] for
each item. With NAMEs the grader returns a number for each of them, and the reward is {NAME: number} in their order.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import numbers
import os
import reprlib
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from megatron_dgpo.errors import UsageError
from megatron_dgpo.rewards.grade import Grader, load_grader

_PR_SET_PDEATHSIG = 1
_LONGEST_REASON = 300


Reward = float | dict[str, float]


def main(descriptor: int, parent: int, name: str, rewards: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It died before the line above.
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    # A grader that eats the machine's memory goes before the trainer does.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    # math-verify warns that its own time limits are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    connection = Connection(descriptor)
    try:
        grader = load_grader(name)
    except UsageError as error:
        _send(connection, "refused", str(error))
        return
    _send(connection, "ready")
    while True:
        try:
            response, answer, row = connection.recv()
        except EOFError:
            return
        _send(connection, *_grade(grader, rewards, response, answer, row))


def _grade(grader: Grader, names: Sequence[str], response: str, answer: str, row: dict) -> tuple[str, Reward | str]:
    try:
        value: Any = grader(response, answer, row)
        if not names and _is_finite(value):
            return "reward", float(value)
        if names and isinstance(value, dict) and value.keys() == set(names) and all(map(_is_finite, value.values())):
            return "reward", {name: float(value[name]) for name in names}
        expected = f"a finite number for each of {', '.join(names)} (reward.weights)" if names else "a finite number"
        hint = "; several need reward.weights" if isinstance(value, dict) and not names else ""
        return "not_a_number", f"returned {reprlib.repr(value)}, not {expected}{hint}"
    except BaseException as error:
        return "error", f"raised {type(error).__name__}: {error}"[:_LONGEST_REASON]


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _send(connection: Connection, kind: str, value: Reward | str = "") -> None:
    connection.send_bytes(json.dumps([kind, value]).encode())


if __name__ == "__main__":
    # What graders print belongs with the messages of the process that started this one, not in its output.
    os.dup2(2, 1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
