"""Being asked to stop: training finishes its step, saves, and exits with a status that says "continue me".

The signals stay blocked in the ranks and in all that they and the servers start, and are looked for between steps.
Handlers would not do: SLURM signals every process of a job step, and those without one (graders, checkpoint writers,
vLLM's workers), or with one of their own, would end in the middle of the step that is to be finished.
"""

from __future__ import annotations

import signal
from multiprocessing import resource_tracker

SIGNALS = frozenset({signal.SIGUSR1, signal.SIGTERM})
"""SIGUSR1: the time limit is near. SIGTERM: preemption, or a user's `kill`."""

STOPPED = 75
"""Exit status of training that was asked to stop and has saved (EX_TEMPFAIL of sysexits.h: try again later)."""

FAILED_ON_ITS_WAY = 76
"""Exit status of a job's training that failed and may begin again, from its last checkpoint."""


def block() -> None:
    """Keep the signals pending in this process and in whatever it starts from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # Python's resource tracker unblocks SIGTERM when it is started, once in a tree of processes.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def keep_blocked() -> None:
    """Where whoever started this process has blocked the signals."""
    if signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        block()


def unblock() -> None:
    """What is pending arrives now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def pending() -> bool:
    """Whether this process was asked to stop."""
    return bool(SIGNALS & signal.sigpending())
