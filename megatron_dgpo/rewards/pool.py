"""Grading in worker processes: a grader that hangs, crashes or errs costs its sample, never the run."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from megatron_dgpo.config import Reward
from megatron_dgpo.errors import UsageError
from megatron_dgpo.rewards.grade import check_grader_name

# From starting Python to a loaded grader; math-verify takes half a second, a user's module may load a model.
_START_LIMIT_S = 120
_MAX_FAILED_STARTS = 3
_LOGGED_FAILURES = 5
# A worker is no rank of a process group, and what it runs has no business with the servers.
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "MEGATRON_DGPO_")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """A reward; `failure` says why the grader gave none (the reward is then 0), as "kind: reason".

    Kinds: timeout, crash, error (it raised), not_a_number (anything but a finite number).
    """

    reward: float
    failure: str | None = None

    @property
    def failure_kind(self) -> str | None:
        return self.failure.partition(":")[0] if self.failure else None


def check_grader(config: Reward) -> None:
    """Load `reward.grader` in a process of its own and end it. Raises UsageError when that does not work."""
    GraderPool(config.model_copy(update={"workers": 1})).close()


class GraderPool:
    """`reward.workers` processes that run `reward.grader`; a context manager, for one thread.

    The processes end with the thread that made them, even by `kill -9`, and ignore Ctrl-C. They see neither the
    trainer's sockets nor its process group, and each is replaced when its grader hangs or crashes.
    Raises UsageError when the grader's name is wrong, or it cannot be imported, or misjudges a known pair.
    """

    def __init__(self, config: Reward) -> None:
        check_grader_name(config.grader)
        self._config = config
        self._failed_starts = 0
        self.failures: Counter[str] = Counter()
        """Samples without a reward so far, by kind."""
        self._workers: list[_Worker] = []
        try:
            for _ in range(config.workers):
                self._workers.append(_Worker(config.grader))
            while not all(worker.ready for worker in self._workers):
                self._wait()
                if self._failed_starts:
                    raise UsageError(self._start_failure)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def score(self, items: Sequence[tuple[str, str, dict]], prompt_indices: Sequence[int] | None = None) -> list[Score]:
        """A Score for every (response, answer, row), in order; one grading takes `reward.timeout_s` at the most.

        prompt_indices: what failures are logged under; by default the place in `items`.
        Raises RuntimeError when the graders, which started before, cannot be started any more.
        """
        scores: list[Score | None] = [None] * len(items)
        waiting = deque(range(len(items)))
        try:
            while waiting or any(worker.item is not None for worker in self._workers):
                for worker in self._workers:
                    if waiting and worker.idle:
                        if worker.give(items[waiting[0]], self._config.timeout_s):
                            worker.item = waiting.popleft()
                        else:
                            self._replace(worker)
                for item, score in self._wait():
                    scores[item] = score
                if self._failed_starts >= _MAX_FAILED_STARTS:
                    raise RuntimeError(self._start_failure)
        except BaseException:
            # Answers that nobody waited for would be taken for the next call's.
            self.close()
            raise
        self._report(scores, range(len(items)) if prompt_indices is None else prompt_indices)
        return scores

    def _wait(self) -> list[tuple[int, Score]]:
        """Wait until a worker says something or is too late; returns the (item, score) pairs that this brought."""
        involved = [worker for worker in self._workers if not worker.idle]
        patience = min(worker.deadline for worker in involved) - time.monotonic()
        spoke = wait([worker.connection for worker in involved], max(0.0, patience))
        now = time.monotonic()
        scored = []
        for worker in involved:
            if worker.connection in spoke:
                kind, value = worker.hear()
            elif now >= worker.deadline:
                limit_s = self._config.timeout_s if worker.ready else _START_LIMIT_S
                kind, value = "timeout", f"took longer than {limit_s:g} s" + " (reward.timeout_s)" * worker.ready
            else:
                continue
            if kind == "ready":
                worker.ready, self._failed_starts = True, 0
                continue
            if worker.item is not None:
                score = Score(value) if kind == "reward" else Score(0.0, f"{kind}: {value}")
                scored.append((worker.item, score))
                worker.item = None
            else:
                self._failed_starts += 1
                self._start_failure = (
                    value if kind == "refused" else f"reward.grader={self._config.grader}: its process {value}"
                )
            if kind in ("timeout", "crash", "refused"):
                self._replace(worker)
        return scored

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._config.grader)

    def _report(self, scores: Sequence[Score], indices: Sequence[int]) -> None:
        failed = [(index, score) for index, score in zip(indices, scores, strict=True) if score.failure]
        self.failures.update(score.failure_kind for _, score in failed)
        for index, score in failed[:_LOGGED_FAILURES]:
            logger.warning("prompt %s: reward 0, grader %s", index, score.failure)
        if len(failed) > _LOGGED_FAILURES:
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(s.failure_kind for _, s in failed).items())
            logger.warning("%d of %d responses got reward 0 without being graded: %s", len(failed), len(scores), kinds)


class _Worker:
    """A grader process in a session of its own, what it works on and until when."""

    def __init__(self, grader: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
            arguments = [str(theirs.fileno()), str(os.getpid()), grader]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_dgpo.rewards.worker", *arguments],
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + _START_LIMIT_S

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    def give(self, item: tuple[str, str, dict], limit_s: float) -> bool:
        """Hand over an item; False when the process has ended since its last one."""
        self.deadline = time.monotonic() + limit_s
        try:
            self.connection.send(item)
        except OSError:
            return False
        return True

    def hear(self) -> tuple[str, float | str]:
        try:
            kind, value = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            self.kill()
            status = self._process.returncode
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            return "crash", f"ended ({how})"
        return kind, value

    def kill(self) -> None:
        """End the process and whatever its grader started; may be called again."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.connection.close()
