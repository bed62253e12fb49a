"""Grading beside sampling: a thread of its own for the grader processes."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from multiprocessing import Pipe
from typing import cast

from megatron_dgpo.config import Reward
from megatron_dgpo.rewards.pool import GraderPool, Job, Score


class GraderThread:
    """Grades what any thread submits, each in its own time; a context manager, which ends the graders.

    The grader processes end with the thread that made them, which is this one. Raises as GraderPool does.
    """

    def __init__(self, config: Reward) -> None:
        self._config = config
        self._submitted: deque[tuple[Sequence[tuple[str, str, dict]], Sequence[int], Future]] = deque()
        self._hears, self._wakes = Pipe(duplex=False)
        self._closed = False
        self._failure: BaseException | None = None
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="graders", daemon=True)
        self._thread.start()
        started.result()

    def __enter__(self) -> GraderThread:
        return self

    def __exit__(self, *_) -> None:
        self._closed = True
        self._wakes.send_bytes(b"")
        self._thread.join()

    def submit(self, items: Sequence[tuple[str, str, dict]], prompt_indices: Sequence[int]) -> Future[list[Score]]:
        """`GraderPool.score` of these, when it is there. Its exception where graders cannot be started any more."""
        future: Future[list[Score]] = Future()
        self._submitted.append((items, prompt_indices, future))
        self._wakes.send_bytes(b"")
        if self._failure:
            # Nobody looks for it any more, or somebody has just done so.
            with contextlib.suppress(InvalidStateError):
                future.set_exception(self._failure)
        return future

    def _run(self, started: Future[None]) -> None:
        under_way: list[tuple[Job, Sequence[int], Future]] = []
        try:
            with GraderPool(self._config) as pool:
                started.set_result(None)
                while not self._closed:
                    while self._hears.poll():
                        self._hears.recv_bytes()
                    while self._submitted:
                        items, indices, future = self._submitted.popleft()
                        under_way.append((pool.add(items), indices, future))
                    for job, indices, future in under_way:
                        if not job.missing:
                            scores = cast(list[Score], job.scores)
                            pool.report(scores, indices)
                            future.set_result(scores)
                    under_way = [entry for entry in under_way if entry[0].missing]
                    pool.proceed(self._hears)
        except BaseException as error:
            self._failure = error
            for future in [started, *(entry[-1] for entry in [*under_way, *self._submitted])]:
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(error)
