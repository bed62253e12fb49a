"""One grader process: `python -m megatron_dgpo.rewards.worker SOCKET PARENT GRADER`.

Imports neither torch nor anything of the trainer. Messages, over the inherited socket with this descriptor: in come
pickled (response, answer, row); out go JSON lists, because the trainer must not unpickle what a user's grader made:
["ready", ""] or ["refused", reason] once, then ["reward", number], ["error", reason] or ["not_a_number", reason] for
each item.
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
from multiprocessing.connection import Connection

from megatron_dgpo.errors import UsageError
from megatron_dgpo.rewards.grade import Grader, load_grader

_PR_SET_PDEATHSIG = 1
_LONGEST_REASON = 300


def main(descriptor: int, parent: int, name: str) -> None:
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
        _send(connection, *_grade(grader, response, answer, row))


def _grade(grader: Grader, response: str, answer: str, row: dict) -> tuple[str, float | str]:
    try:
        value = grader(response, answer, row)
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return "reward", float(value)
        return "not_a_number", f"returned {reprlib.repr(value)}, not a finite number"
    except BaseException as error:
        return "error", f"raised {type(error).__name__}: {error}"[:_LONGEST_REASON]


def _send(connection: Connection, kind: str, value: float | str = "") -> None:
    connection.send_bytes(json.dumps([kind, value]).encode())


if __name__ == "__main__":
    # What graders print belongs with the messages of the process that started this one, not in its output.
    os.dup2(2, 1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
