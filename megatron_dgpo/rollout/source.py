"""Where a step's responses come from: sampled by servers and graded beside the training, or recorded by another run.

Order stays, time slips: a step trains on the next prompts in order, whatever was finished first, and what may be
sampled ahead is a matter of `rollout.max_staleness` alone.

The first rank of every data-parallel replica, its leader, talks to servers and graders for its own prompts; the other
ranks hear whether that went well, and later what they train on. Groups never straddle replicas.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from megatron_dgpo.config import Config, Rollout
from megatron_dgpo.data import PromptOrder
from megatron_dgpo.manifest import Progress
from megatron_dgpo.model.collectives import all_gathered, from_leader, from_leaders, from_rank_0
from megatron_dgpo.model.parallel import data_group, is_replica_leader, replica
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import FIRST
from megatron_dgpo.rollout.journal import Journal, forget, open_journal
from megatron_dgpo.rollout.producer import Group, Producer, Wait
from megatron_dgpo.rollout.recording import (
    file_of_step,
    recorded_groups,
    remove_beyond,
    weighed_anew,
    write_responses,
)
from megatron_dgpo.rollout.response import Key, Prompt, Response, tokens_in
from megatron_dgpo.rollout.sampler import Sampler
from megatron_dgpo.weight_sync.sync import WeightSync

T = TypeVar("T")

# Ranks hear from their leaders this often, whatever these wait for.
_NEWS_S = 15.0


class Taken(NamedTuple):
    """A step's rollouts."""

    groups: dict[int, list[Response]]
    """This replica's by position in the run's order of prompts, on its leader alone."""
    next_position: int
    """Where the next step begins."""


class Window:
    """The positions of a step: which are needed for it, may be asked for with it, and are trained on."""

    def __init__(self, start: int, rollout: Rollout) -> None:
        self._size, self._dynamic = rollout.prompts_per_step, rollout.dynamic_sampling
        self.most = int(self._size * rollout.dynamic_limit) if self._dynamic else self._size
        self.needed = range(start, start + self._size)
        self.kept: set[int] = set()
        self._uniform: set[int] = set()
        """All that are known."""

    def allowed(self, steps: int) -> range:
        """What may be asked for, for this and the following steps, `steps` in all: as many groups as they will train on
        and those that are known to be left out. So any of them is needed within these steps, unless dynamic sampling
        comes to its limit."""
        end = self.needed.start + steps * self._size
        left_out = sorted(self._uniform)
        while left_out and left_out[0] < end:
            left_out.pop(0)
            end += 1
        end = min(end, self.needed.start + steps * self.most)
        return range(self.needed.start, max(end, self.needed.stop))

    def look(self, varied: dict[int, bool]) -> bool:
        """Whether the step is complete. varied: of groups that are finished, whether their rewards differ."""
        if self._dynamic:
            # What was asked for again may differ now.
            self._uniform -= varied.keys()
            self._uniform |= {position for position, differs in varied.items() if not differs}
        if not varied.keys() >= set(self.needed):
            return False
        kept = [position for position in self.needed if position not in self._uniform]
        missing = self._size - len(kept)
        if missing and len(self.needed) < self.most:
            self.needed = range(self.needed.start, min(self.needed.stop + missing, self.needed.start + self.most))
            return False
        self.kept = set(kept + [position for position in self.needed if position in self._uniform][:missing])
        return True


class RolloutSource(contextlib.ExitStack):
    """Makes graded responses; a context manager, which ends requests and graders. Methods are collective."""

    def __init__(
        self,
        config: Config,
        stop_token_ids: list[int],
        tokenizer,
        weight_sync: WeightSync,
        problems: Sequence[Prompt] = (),
    ) -> None:
        """weight_sync: says which servers serve, and brings lost ones back. problems: of the training steps."""
        super().__init__()
        self._config, self._stop, self._tokenizer = config, stop_token_ids, tokenizer
        self._weight_sync, self._problems = weight_sync, problems
        self._order = PromptOrder(len(problems), config.run.seed, config.data.shuffle)
        self._journal_folder = config.run.dir / "journal"
        self._known_update = 0
        self._last_taken, self._wait_share = time.monotonic(), 0.0
        self._ahead = 0.0
        self._dropped = 0
        self._left_out = 0
        self._start = 0
        """How often the run was begun; 0: there is no journal."""
        self._versions_are_own = False

    # Training steps

    def begin(self, warn: Callable[[str], None]) -> None:
        """What an interrupted run has finished is not sampled again; says where it is of no use any more.

        Collectives: one object broadcast over all ranks.
        """
        if self._config.rollout.replay:
            return
        folder = self._journal_folder
        self._start, changed = from_rank_0(lambda: open_journal(folder, self._config, self._problems))
        if changed:
            warn(f"{folder}: what was sampled before is not used, as {', '.join(changed)} changed since")

    def take(self, progress: Progress) -> Taken:
        """The groups of the step after `progress`: the next in order, and with rollout.dynamic_sampling the next whose
        rewards are not all equal.

        When every server is lost, waits for one and gives it the policy's weights, which are those of `progress`.
        Collectives: every quarter of a minute of waiting, and every time that groups had to take the places of others,
        one object all-gather over the leaders and one object broadcast over the replica; those of weight updates.
        """
        if folder := self._config.rollout.replay:
            return self._recorded(progress, folder)
        begin, step = time.monotonic(), progress.step + 1
        # What was allowed when the last step began, and is there now: at 1 the servers had nothing to do.
        self._ahead = self._finished_ahead() if is_replica_leader() else 0.0
        oldest = max(0, step - 1 - self._config.rollout.max_staleness)
        window = Window(progress.prompts, self._config.rollout)
        while not window.look(self._known(window, progress, oldest)):
            pass
        end = time.monotonic()
        self._wait_share, self._last_taken = (end - begin) / (end - self._last_taken), end
        self._dropped = len(window.needed) - len(window.kept)
        if not self._versions_are_own and any(from_leaders(lambda: self._is_fresh(window.needed))):
            # Of weights that no run had before: from now on the journal's are of others.
            self._versions_are_own = True
            from_leader(lambda: self._producer.versions_are_own_from(step, replica()[0] == 0))
        return Taken(_on_leader(lambda: self._taken(window, step), {}), window.needed.stop)

    def proceed(self, progress: Progress) -> None:
        """Begin with what may be sampled now, before the next `take`. Collectives: one object broadcast over the
        replica."""
        if not self._config.rollout.replay and self._config.rollout.max_staleness:
            window = Window(progress.prompts, self._config.rollout)
            allowed = self._groups(window.allowed(self._steps_ahead(progress)))
            from_leader(lambda: self._allow(allowed, progress))

    def forget(self, progress: Progress) -> None:
        """Of all checkpoints that are kept this is the oldest. Collectives: none."""
        if is_replica_leader() and replica()[0] == 0 and not self._config.rollout.replay:
            forget(self._journal_folder, progress.prompts)

    def metrics(self) -> dict[str, float]:
        """Of the last `take`: how long the trainer waited, and what became of requests since the one before.

        Collectives: one object all-gather over the leaders and one object broadcast over the replica.
        """
        if self._config.rollout.replay:
            return {}
        shares = from_leaders(lambda: (self._producer.counted() + Counter(wasted=self._left_out), self._ahead))
        counts: Counter[str] = sum((counted for counted, _ in shares), Counter())
        ahead = sum(found for _, found in shares) / len(shares)
        rollout = self._config.rollout
        return {
            "rollout/wait_share": self._wait_share,
            "rollout/requests_lost": float(counts["lost"]),
            "rollout/responses_refused": float(counts["refused"]),
            "rollout/tokens_wasted": float(counts["wasted"]),
            **({"rollout/finished_ahead": ahead} if rollout.max_staleness else {}),
            **({"rollout/groups_dropped": float(self._dropped)} if rollout.dynamic_sampling else {}),
        }

    # Evaluations

    def evaluate(self, prompts: Sequence[Prompt], progress: Progress) -> list[Response]:
        """`eval.samples` responses to every prompt, made by all replicas together, in the order of the prompts.

        Empty but on the replicas' leaders. Collectives: as `take`, and one more all-gather and broadcast.
        """
        seed, settings = self._config.run.seed, self._config.eval
        own: dict[Key, Group] = {
            ("eval", progress.step, place): Group(
                prompts[place],
                request_seed(seed, f"eval {prompts[place].index}"),
                settings.samples,
                settings.temperature,
                FIRST,
                settings.top_p,
            )
            for place in self._own(range(len(prompts)))
        }
        self._wait_for(own, list(own), progress)

        def everyones() -> list[Response]:
            shares = all_gathered({key: self._producer.take([key]) for key in own}, data_group())
            groups = {key: group for share in shares for key, group in share.items()}
            return [r for place in range(len(prompts)) for r in groups["eval", progress.step, place]]

        return _on_leader(everyones, [])

    # What they share

    def _wait_for(self, allowed: Mapping[Key, Group], needed: Sequence[Key], progress: Progress) -> None:
        def look() -> Wait:
            self._allow(allowed, progress)
            return self._producer.wait(needed, _NEWS_S)

        while (states := set(from_leaders(look))) != {Wait.DONE}:
            if Wait.STARVED in states:
                self._weight_sync.push(progress.weight_version)

    def _allow(self, allowed: Mapping[Key, Group], progress: Progress) -> None:
        if self._known_update != (known := self._weight_sync.updates):
            self._producer.serve(self._weight_sync.members, progress.weight_version)
            self._known_update = known
        self._producer.allow(allowed)

    def _groups(self, positions: range) -> dict[Key, Group]:
        """This replica's."""
        rollout = self._config.rollout
        return {
            position: Group(
                self._prompt_at(position),
                request_seed(self._config.run.seed, str(position)),
                rollout.group_size,
                rollout.temperature,
            )
            for position in self._own(positions)
        }

    def _prompt_at(self, position: int) -> Prompt:
        return self._problems[self._order.row(position)]

    def _steps_ahead(self, progress: Progress) -> int:
        """Steps after `progress` whose groups may be sampled by its weights."""
        return min(1 + self._config.rollout.max_staleness, self._config.run.steps - progress.step)

    def _own(self, positions: range) -> range:
        return dealt_share(positions, *replica())

    def _is_fresh(self, positions: range) -> bool:
        return not all(self._producer.recalled(position) for position in self._own(positions))

    def _finished_ahead(self) -> float:
        allowed = self._producer.allowed()
        return self._producer.finished_ahead() / allowed if allowed else 0.0

    def _known(self, window: Window, progress: Progress, oldest: int) -> dict[int, bool]:
        """{position: whether rewards differ} of all replicas' finished groups, when those that are needed are there."""
        allowed = self._groups(window.allowed(self._steps_ahead(progress)))
        needed = self._own(window.needed)
        self._wait_for(allowed, needed, progress)
        shares = from_leaders(lambda: self._looked_at(allowed, needed, oldest, progress.step))
        return {position: varied for share in shares for position, varied in share.items()}

    def _looked_at(self, allowed: Mapping[Key, Group], needed: Sequence[int], first: int, last: int) -> dict[int, bool]:
        """{position: whether rewards differ} of this replica's finished groups, less those that are needed now and were
        not sampled by weights of the versions `first` to `last`: these are asked for again."""
        found = {key: group for key in allowed if (group := self._producer.finished(key)) and isinstance(key, int)}
        stale = [key for key in needed if not all(response.is_of(first, last) for response in found[key])]
        self._producer.drop(stale)
        return {
            key: len({response.reward for response in group}) > 1 for key, group in found.items() if key not in stale
        }

    def _taken(self, window: Window, step: int) -> dict[int, list[Response]]:
        groups = {position: self._producer.take([position]) for position in self._own(window.needed)}
        self._left_out = tokens_in(
            r for position, group in groups.items() if position not in window.kept for r in group
        )
        groups = {position: group for position, group in groups.items() if position in window.kept}
        if self._config.rollout.record:
            positions = [key for key, group in groups.items() for _ in group]
            file = file_of_step(self._config.run.dir / "rollouts", step, replica()[0])
            if replica()[0] == 0:
                # Of an earlier start with more replicas.
                remove_beyond(file.parent, step, replica()[1])
            write_responses(file, [response for group in groups.values() for response in group], positions)
        return groups

    def _recorded(self, progress: Progress, folder: Path) -> Taken:
        rollout, start = self._config.rollout, progress.prompts
        expected = None if rollout.dynamic_sampling else range(start, start + rollout.prompts_per_step)
        step, size = progress.step + 1, rollout.group_size

        def found() -> dict[int, list[Response]]:
            groups, weights = (
                recorded_groups(folder, step, self._prompt_at, size, expected),
                self._config.reward.weights,
            )
            return {position: [weighed_anew(r, weights) for r in group] for position, group in groups.items()}

        groups = from_leader(found)
        next_position = max(groups) + 1
        own = self._own(range(start, next_position)) if is_replica_leader() else ()
        return Taken({position: groups[position] for position in own if position in groups}, next_position)

    @functools.cached_property
    def _producer(self) -> Producer:
        """Of the first rank of each replica."""
        number, replicas = replica()
        updates = self._weight_sync
        sampler = Sampler(self._config, server.secret(), self._stop, replicas, lambda: updates.under_way, number)
        journal = Journal(self._journal_folder, number, self._start) if self._start else None
        return self.enter_context(Producer(self._config, sampler, self._tokenizer, journal))


def _on_leader(function: Callable[[], T], elsewhere: T) -> T:
    """The leader's result there alone; the others, which would wait for it in vain, raise what it raises."""
    found: list[T] = []
    from_leader(lambda: found.extend([function()]))
    return found[0] if found else elsewhere


def dealt_share(positions: range, replica: int, replicas: int) -> range:
    """A replica's among consecutive positions, of any number: those that are its own modulo the number of replicas."""
    return range(positions.start + (replica - positions.start) % replicas, positions.stop, replicas)


def request_seed(run_seed: int, what: str) -> int:
    """Of a group's first response; another for each group of a run, whoever asks for it.

    Hashed: the i-th response has the seed + i, so that neighbouring seeds would share responses.
    """
    return int.from_bytes(hashlib.blake2b(f"{run_seed} {what}".encode(), digest_size=4).digest()) // 2
