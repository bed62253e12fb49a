"""Runs on each replica's leader, in a thread: sampling and grading of groups, beside whatever the trainer does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from megatron_dgpo.config import Config
from megatron_dgpo.rewards.grading import GraderThread
from megatron_dgpo.rollout.journal import Journal
from megatron_dgpo.rollout.response import Key, Prompt, Response, tokens_in
from megatron_dgpo.rollout.sampler import Sampler

# The thread does nothing that takes longer than a moment.
_PROMPT_S = 60


class Group(NamedTuple):
    """What is asked together: some responses to one prompt."""

    prompt: Prompt
    seed: int
    """Of the first response; the next one's is one more."""
    size: int
    temperature: float
    priority: int = 0
    """Lower ones are sent first."""
    top_p: float = 1.0


class Wait(Enum):
    """How waiting for groups has ended."""

    DONE = "all are there"
    STARVED = "no server serves"
    ONGOING = "some are under way"


class Producer:
    """Keeps admitted groups in flight and what is finished until it is taken; a context manager, which ends the rest.

    The journal keeps those of positions.
    """

    def __init__(self, config: Config, sampler: Sampler, tokenizer, journal: Journal | None) -> None:
        """Raises UsageError where the graders cannot be used."""
        self._sampler, self._tokenizer, self._journal = sampler, tokenizer, journal
        self._finished: dict[Key, list[Response]] = {}
        self._admitted: set[Key] = set()
        self._recalled: set[Key] = set()
        self._dropped: set[Key] = set()
        """Not to be recalled."""
        self._wasted = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._graders = GraderThread(config.reward)
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, *failure) -> None:
        with contextlib.suppress(RuntimeError):
            # Unless it has failed.
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        self._graders.__exit__(*failure)

    # The trainer's side

    def serve(self, addresses: list[str], version: int) -> None:
        """These servers, and no others, have the weights of this version."""
        self._raise_failure()
        asyncio.run_coroutine_threadsafe(self._admit_servers(addresses, version), self._loop).result(_PROMPT_S)

    def allow(self, groups: Mapping[Key, Group]) -> None:
        """Begin with those that are new, less those that the journal has of an earlier start."""
        self._raise_failure()
        fresh = {key: group for key, group in groups.items() if key not in self._admitted}
        self._admitted |= fresh.keys()
        if self._journal:
            size = max((group.size for group in fresh.values()), default=0)
            prompts = {key: group.prompt for key, group in fresh.items() if key not in self._dropped}
            known = self._journal.read(prompts, size)
            self._recalled |= known.keys()
            with self._changed:
                self._finished |= known
            fresh = {key: group for key, group in fresh.items() if key not in known}
        if fresh:
            self._loop.call_soon_threadsafe(self._begin, fresh)

    def recalled(self, key: Key) -> bool:
        """Whether the journal had it."""
        return key in self._recalled

    def versions_are_own_from(self, version: int, first: bool) -> None:
        """`Journal.versions_are_own_from`; groups that are now of other weights are asked for when they are allowed
        again."""
        if self._journal:
            self._journal.versions_are_own_from(version, first)
        with self._changed:
            found = {key: self._finished[key] for key in self._recalled & self._finished.keys()}
        self.drop(key for key, group in found.items() if max(response.newest for response in group) >= version)

    def wait(self, keys: Iterable[Key], limit_s: float) -> Wait:
        """Until all are finished, or until nobody is there who could, for `limit_s` at the most.

        Raises what sampling or grading has raised.
        """
        missing, deadline = set(keys), time.monotonic() + limit_s
        with self._changed:
            while True:
                self._raise_failure()
                missing -= self._finished.keys()
                if not missing:
                    return Wait.DONE
                if not self._sampler.serving:
                    return Wait.STARVED
                if time.monotonic() > deadline:
                    return Wait.ONGOING
                # Servers are lost without a word.
                self._changed.wait(0.5)

    def take(self, keys: Iterable[Key]) -> list[Response]:
        """Finished groups, in this order; they are not kept here."""
        with self._changed:
            self._admitted -= set(keys)
            self._recalled -= set(keys)
            self._dropped -= set(keys)
            return [response for key in keys for response in self._finished.pop(key)]

    def drop(self, keys: Iterable[Key]) -> None:
        """Finished groups that nobody may have: they can be asked for again."""
        with self._changed:
            for key in keys:
                self._wasted += tokens_in(self._finished.pop(key))
                self._admitted.discard(key)
                self._recalled.discard(key)
                self._dropped.add(key)

    def finished(self, key: Key) -> list[Response] | None:
        return self._finished.get(key)

    def finished_ahead(self) -> int:
        """Groups that nobody has taken yet."""
        return len(self._finished)

    def allowed(self) -> int:
        """Groups that nobody has taken yet, finished or not."""
        return len(self._admitted)

    def counted(self) -> Counter[str]:
        """The sampler's counts since the last call; with the tokens of dropped groups among the wasted ones."""
        counts, self._sampler.counts = self._sampler.counts, Counter()
        wasted, self._wasted = self._wasted, 0
        return counts + Counter(wasted=wasted)

    # The thread's

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._produce())
        except BaseException as error:
            self._fail(error)
        finally:
            self._loop.close()

    async def _produce(self) -> None:
        async with self._sampler:
            ends = [self._loop.create_task(self._closing.wait()), self._loop.create_task(self._sampler.watch())]
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in [*ends, *self._tasks]:
                task.cancel()
            await asyncio.gather(*ends, *self._tasks, return_exceptions=True)
            # The watch ends by an error alone.
            done.pop().result()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _fail(self, error: BaseException) -> None:
        """Whatever went wrong, the trainer hears of it: it must neither wait for ever nor train on less."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    async def _admit_servers(self, addresses: list[str], version: int) -> None:
        self._sampler.admit(addresses, version)

    def _begin(self, groups: dict[Key, Group]) -> None:
        for key, group in groups.items():
            task = self._loop.create_task(self._finish(key, group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _finish(self, key: Key, group: Group) -> None:
        try:
            async with asyncio.TaskGroup() as together:
                asked = [
                    together.create_task(
                        self._sampler.sample(
                            group.prompt, group.seed + i, group.temperature, group.priority, group.top_p
                        )
                    )
                    for i in range(group.size)
                ]
            responses = await self._graded([task.result() for task in asked])
            if self._journal and isinstance(key, int):
                await asyncio.to_thread(self._journal.append, key, responses)
            with self._changed:
                self._finished[key] = responses
                self._changed.notify_all()
        except Exception as error:
            self._fail(error)

    async def _graded(self, responses: list[Response]) -> list[Response]:
        texts = self._tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
        items = [(text, r.prompt.answer, r.prompt.row) for r, text in zip(responses, texts, strict=True)]
        scores = await asyncio.wrap_future(self._graders.submit(items, [r.prompt.index for r in responses]))
        return [
            dataclasses.replace(
                response, text=text, reward=score.reward, failure=score.failure, components=score.components
            )
            for response, text, score in zip(responses, texts, scores, strict=True)
        ]
