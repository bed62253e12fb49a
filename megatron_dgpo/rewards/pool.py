"""Grading in worker processes: a grader that hangs, crashes or errs costs its sample, never the run."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from megatron_dgpo.config import Reward
from megatron_dgpo.errors import UsageError
from megatron_dgpo.rewards.answer import expected_answer
from megatron_dgpo.rewards.grade import GRADERS, check_grader_name, weighted_sum

# From starting Python to a loaded grader; math-verify takes half a second, a user's module may load a model.
_START_LIMIT_S = 120
_MAX_FAILED_STARTS = 3
_LOGGED_FAILURES = 5
# Of a worker that computes, time is what the processor spent on it; on a machine with as many times more work than
# processors its limit is this long at the most.
_SLOWEST_MACHINE = 20
# A worker is no rank of a process group, and what it runs has no business with the servers.
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "MEGATRON_DGPO_")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """A reward; `failure` says why the grader gave none (the reward is then 0), as "kind: reason".

    Kinds: timeout, crash, error (it raised), not_a_number (anything but a finite number, or one for each of
    reward.weights).
    """

    reward: float
    failure: str | None = None
    components: dict[str, float] = field(default_factory=dict)
    """Several rewards in the order of reward.weights, of which `reward` is the weighted sum; all 0 after a failure."""

    @property
    def failure_kind(self) -> str | None:
        return self.failure.partition(":")[0] if self.failure else None


@dataclass(eq=False)
class Job:
    """Gradings that belong together."""

    items: Sequence[tuple[str, str, dict]]
    """(response, answer, row)"""
    scores: list[Score | None]
    """None: not yet."""
    waiting: deque[int]
    """Places of those that no worker has begun."""
    timeouts: int = 0

    def __post_init__(self) -> None:
        self.missing = len(self.items)
        """Without a score."""


class GraderPool:
    """`reward.workers` processes that run `reward.grader`; a context manager, for one thread.

    The processes end with the thread that made them, even by `kill -9`, and ignore Ctrl-C. They see neither the
    trainer's sockets nor its process group, and each is replaced when its grader hangs or crashes.
    Raises UsageError when the grader's name is wrong, or it cannot be imported, or misjudges a known pair.
    """

    def __init__(self, config: Reward) -> None:
        check_grader_name(config.grader, config.weights)
        self._config = config
        self._failed_starts = 0
        self.failures: Counter[str] = Counter()
        """Samples without a reward so far, by kind."""
        self._jobs: list[Job] = []
        self._workers: list[_Worker] = []
        try:
            for _ in range(config.workers):
                self._workers.append(_Worker(config))
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
        """A Score for every (response, answer, row), in order.

        One grading takes `reward.timeout_s` at the most, of the processor's time while it computes and of the clock's
        while it waits, so that right answers are not lost to a busy machine.
        prompt_indices: what failures are logged under; by default the place in `items`.
        Raises RuntimeError when the graders, which started before, cannot be started any more.
        """
        scores = self._grade(items)
        self.report(scores, range(len(items)) if prompt_indices is None else prompt_indices)
        return scores

    def unusable(self, answers: Sequence[str]) -> dict[int, str]:
        """{place: reason} of the data's answers that a built-in grader cannot work with: no response could be right.

        Each distinct one is graded once, as the answer of a response. What graders of the user's own take is theirs.
        """
        if self._config.grader not in GRADERS:
            return {}
        places = {expected_answer(answer): place for place, answer in reversed(list(enumerate(answers)))}
        scores = self._grade([(rf"\boxed{{{text}}}", answers[place], {}) for text, place in places.items()])
        return {
            place: score.failure or f"the answer {answers[place][-80:]!r} cannot be given in a \\boxed{{}}"
            for place, score in sorted(zip(places.values(), scores, strict=True), key=lambda pair: pair[0])
            if score.reward != 1
        }

    def _grade(self, items: Sequence[tuple[str, str, dict]]) -> list[Score]:
        job = self.add(items)
        while job.missing:
            self.proceed()
        return cast(list[Score], job.scores)

    def add(self, items: Sequence[tuple[str, str, dict]]) -> Job:
        """Grade these (response, answer, row) with the following calls of `proceed`, beside what is there already."""
        job = Job(items, [None] * len(items), deque(range(len(items))))
        self._jobs.append(job)
        return job

    def proceed(self, also: Connection | None = None) -> None:
        """Give idle workers something to do and wait until one of them says something, is too late, or has nothing to
        do; or until `also` can be read.

        Raises RuntimeError as `score` does.
        """
        try:
            self._jobs = [job for job in self._jobs if job.missing]
            for worker in self._workers:
                waiting = [job for job in self._jobs if job.waiting]
                if waiting and worker.idle:
                    # Those with graders that hang come after all others, whom they would hold up.
                    job = min(waiting, key=lambda job: job.timeouts)
                    if worker.give(job.items[job.waiting[0]], self._config.timeout_s):
                        worker.item = job, job.waiting.popleft()
                    else:
                        self._replace(worker)
            for job, place, score in self._wait(also):
                job.scores[place] = score
                job.missing -= 1
                job.timeouts += score.failure_kind == "timeout"
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise RuntimeError(self._start_failure)
        except BaseException:
            # Answers that nobody waited for would be taken for the next call's.
            self.close()
            raise

    def _wait(self, also: Connection | None = None) -> list[tuple[Job, int, Score]]:
        """Wait until a worker says something or is too late; returns what was scored: (job, place in it, score)."""
        involved = [worker for worker in self._workers if not worker.idle]
        if not involved and not also:
            return []
        patience = min(worker.deadline for worker in involved) - time.monotonic() if involved else None
        heard: list = [worker.connection for worker in involved]
        spoke = wait([*heard, also] if also else heard, None if patience is None else max(0.0, patience))
        now = time.monotonic()
        scored = []
        for worker in involved:
            if worker.connection in spoke:
                kind, value = worker.hear()
            elif now >= worker.deadline:
                if worker.postpone(self._config.timeout_s):
                    continue
                limit_s = self._config.timeout_s if worker.ready else _START_LIMIT_S
                kind, value = "timeout", f"took longer than {limit_s:g} s" + " (reward.timeout_s)" * worker.ready
            else:
                continue
            if kind == "ready":
                worker.ready, self._failed_starts = True, 0
                continue
            if worker.item is not None:
                scored.append((*worker.item, self._score(kind, value)))
                worker.item = None
            else:
                self._failed_starts += 1
                self._start_failure = (
                    value if kind == "refused" else f"reward.grader={self._config.grader}: its process {value}"
                )
            if kind in ("timeout", "crash", "refused"):
                self._replace(worker)
        return scored

    def _score(self, kind: str, value: Any) -> Score:
        weights = self._config.weights
        if kind != "reward":
            return Score(0.0, f"{kind}: {value}", dict.fromkeys(weights, 0.0))
        if not weights:
            return Score(float(value))
        total = weighted_sum(value, weights)
        if not math.isfinite(total):
            return self._score("not_a_number", f"returned {value}, whose weighted sum is {total}")
        return Score(total, None, value)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._config)

    def report(self, scores: Sequence[Score], indices: Sequence[int]) -> None:
        """Count and log those without a reward. indices: of their prompts."""
        failed = [(index, score) for index, score in zip(indices, scores, strict=True) if score.failure]
        self.failures.update(score.failure_kind or "" for _, score in failed)
        for index, score in failed[:_LOGGED_FAILURES]:
            logger.warning("prompt %s: reward 0, grader %s", index, score.failure)
        if len(failed) > _LOGGED_FAILURES:
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(s.failure_kind for _, s in failed).items())
            logger.warning("%d of %d responses got reward 0 without being graded: %s", len(failed), len(scores), kinds)


class _Worker:
    """A grader process in a session of its own, what it works on and until when."""

    def __init__(self, config: Reward) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
            arguments = [str(theirs.fileno()), str(os.getpid()), config.grader, *config.weights]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_dgpo.rewards.worker", *arguments],
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.ready = False
        self.item: tuple[Job, int] | None = None
        self._given = time.monotonic()
        self._processor_s = 0.0
        """Processor time of the process when the item was given."""
        self.deadline = self._given + _START_LIMIT_S

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    def give(self, item: tuple[str, str, dict], limit_s: float) -> bool:
        """Hand over an item; False when the process has ended since its last one."""
        self._given, self._processor_s = time.monotonic(), self._processor()[1]
        self.deadline = self._given + limit_s
        try:
            self.connection.send(item)
        except OSError:
            return False
        return True

    def postpone(self, limit_s: float) -> bool:
        """At the deadline: give a process that computes the rest of its limit; False when there is none."""
        if self.item is None or time.monotonic() >= self._given + _SLOWEST_MACHINE * limit_s:
            return False
        computing, processor_s = self._processor()
        rest_s = limit_s - (processor_s - self._processor_s)
        if computing and rest_s > 0:
            # Clock ticks are 10 ms.
            self.deadline = time.monotonic() + max(rest_s, 0.01)
        return computing and rest_s > 0

    def _processor(self) -> tuple[bool, float]:
        """Whether the process computes or waits for a processor, and the processor time of all it did, in seconds."""
        try:
            with open(f"/proc/{self._process.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return False, 0.0
        # proc(5), from the third field on: state, and user and system time as the 14th and 15th.
        return fields[0] == "R", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def hear(self) -> tuple[str, Any]:
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
