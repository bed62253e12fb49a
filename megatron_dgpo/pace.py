"""When a run saves, and whether there is time for another step: the same answer on every rank."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_dgpo import stop
from megatron_dgpo.config import Checkpoint

JOB_END = "MEGATRON_DGPO_JOB_END"
"""When the job's time is over, in seconds since 1970; set by slurm/job.sh."""

# Steps grow with their responses, and ranks and servers end within a minute.
_LONGER, _ENDING_S = 1.25, 60


class Pace:
    """Made where the first step begins. Its methods are collective over all ranks, with one all-reduce each."""

    def __init__(self, settings: Checkpoint, variables: Mapping[str, str] = os.environ) -> None:
        self._settings = settings
        end = float(variables.get(JOB_END) or math.inf)
        # One that is over already is none: a clock is wrong, or a limit was raised.
        self._end = end if end > time.time() else math.inf
        self._looked = self._saved = time.monotonic()
        self._longest_s = 0.0
        """From one look to the next, evaluations and checkpoints included."""

    def stopped(self) -> bool:
        """Before the first step: whether the run was asked to stop."""
        return _any_rank(stop.pending())[0]

    def after_step(self, step: int, last: bool = False, writing_s: float = 0.0) -> tuple[bool, bool]:
        """(whether the run stops before its end, by a signal or for lack of time; whether it saves, as it does then and
        at its end). last: the step ends the run. writing_s: what a checkpoint takes that is written beside the steps;
        at a run's end one may be under way, and the last one follows."""
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._looked)
        late = time.time() + _LONGER * self._longest_s + 2 * writing_s + _ENDING_S > self._end
        minutes = self._settings.every_minutes
        due = minutes is not None and now - self._saved >= 60 * minutes
        stops, due = _any_rank(stop.pending() or late, due)
        saves = stops or due or step % self._settings.every == 0
        self._looked = now
        self._saved = now if saves else self._saved
        return stops and not last, saves or last


def _any_rank(*mine: bool) -> list[bool]:
    """Whether any rank says so, of each. On the host, so over gloo: on the device all ranks would keep an NCCL
    communicator, with its buffers, for this."""
    flags = torch.tensor(mine, dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
