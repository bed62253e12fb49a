"""When a run saves and stops: the same on every rank, whichever of them has a reason."""

import signal
import threading
import time

import pytest

from megatron_dgpo import pace
from megatron_dgpo.config import Checkpoint
from megatron_dgpo.pace import JOB_END, Pace
from tests.ranks import run_ranks


def decisions(settings: dict, ends_in_s: float | None, seconds: list[float]):
    """(stops, saves) after steps of so many seconds by rank 1's clock; its job ends after `ends_in_s`."""
    import torch.distributed as dist

    clock = [1000.0]
    pace.time.monotonic = lambda: clock[0]
    pace.time.time = lambda: clock[0]
    mine = dist.get_rank() == 1
    variables = {JOB_END: str(clock[0] + ends_in_s)} if mine and ends_in_s else {JOB_END: ""}
    found = Pace(Checkpoint(**settings), variables)
    told = [(found.stopped(), False)]
    for step, duration in enumerate(seconds, 1):
        clock[0] += duration if mine else 1
        told.append(found.after_step(step))
    return told


@pytest.mark.parametrize(
    ("settings", "ends_in_s", "seconds", "expected"),
    [
        ({"every": 2}, None, [9, 9, 9, 9], [(0, 0), (0, 1), (0, 0), (0, 1)]),
        # 90 seconds since the first step, and since the checkpoint that they brought.
        ({"every": 100, "every_minutes": 1.5}, None, [40, 40, 40, 40, 50], [(0, 0), (0, 0), (0, 1), (0, 0), (0, 1)]),
        # Another step, which may take a quarter longer, and a minute for the end: 400 - 200 is more than 185, 400 - 260
        # is not.
        ({"every": 100}, 400, [100, 100, 60], [(0, 0), (0, 0), (1, 1)]),
        # The longest step counts, here with an evaluation.
        ({"every": 100}, 400, [240, 10], [(1, 1), (1, 1)]),
        # What is over at the start is no end.
        ({"every": 2}, -1, [9, 9], [(0, 0), (0, 1)]),
    ],
    ids=["steps", "minutes", "no-time-for-another", "longest", "over-before"],
)
def test_pace(settings, ends_in_s, seconds, expected):
    for told in run_ranks(decisions, 2, settings, ends_in_s, seconds):
        assert told == [(False, False), *((bool(stops), bool(saves)) for stops, saves in expected)]


def asked_on_rank_1():
    import torch.distributed as dist

    from megatron_dgpo import stop

    stop.block()
    found = Pace(Checkpoint())
    before = found.stopped()
    if dist.get_rank() == 1:
        # To this thread: PyTorch's, of the fork server, do not block it.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        while not stop.pending():
            time.sleep(0.01)
    return before, found.stopped(), found.after_step(1), found.after_step(2, last=True)


def test_a_signal_to_one_rank_stops_all():
    """But for a run that is at its end, which it saves without being asked."""
    assert run_ranks(asked_on_rank_1, 2) == [(False, True, (True, True), (False, True))] * 2
