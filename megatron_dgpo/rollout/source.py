"""Where a step's responses come from: sampled by the engines, graded in worker processes, shared with a whole replica;
or recorded by another run.

The first rank of every data-parallel replica talks to engines and graders for its own prompts; the other ranks of
the replica receive what it got. Groups never straddle replicas.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections import Counter

from megatron_dgpo.config import Config
from megatron_dgpo.model.collectives import all_gathered, broadcast_from_leader
from megatron_dgpo.model.parallel import data_group, is_replica_leader, replica
from megatron_dgpo.rewards.pool import GraderPool
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.recording import file_of_step, recorded_responses, write_responses
from megatron_dgpo.rollout.response import Prompt, Response


class RolloutSource(contextlib.ExitStack):
    """Makes graded responses; a context manager, which ends the grader processes. Methods are collective."""

    def __init__(self, config: Config, engines: Engines, tokenizer) -> None:
        """engines: asked by the first rank of each replica, once they serve the policy."""
        super().__init__()
        self._config, self._engines, self._tokenizer = config, engines, tokenizer

    def sample(self, prompts: list[Prompt], step: int) -> list[Response]:
        """`group_size` responses to each prompt of this replica's share, groups consecutive, for training step `step`.

        prompts: of all replicas, whose number divides theirs. Collectives: one object broadcast over the replica.
        """
        rollout = self._config.rollout
        places = consecutive_share(len(prompts), *replica())
        size, longest = rollout.group_size, rollout.max_response_tokens
        if rollout.replay:
            return recorded_responses(rollout.replay, step, prompts, places, size)
        responses = self._collect(prompts, places, size, rollout.temperature, longest, step)
        if rollout.record and is_replica_leader():
            write_responses(file_of_step(self._config.run.dir / "rollouts", step, replica()[0]), responses)
        return responses

    def evaluate(self, prompts: list[Prompt], samples: int, temperature: float) -> list[Response]:
        """`samples` responses to every prompt, made by all replicas together and known to every rank.

        Collectives: one object broadcast over the replica and one all-gather over data-parallel ranks.
        """
        longest = self._config.rollout.max_response_tokens
        mine = self._collect(prompts, dealt_share(len(prompts), *replica()), samples, temperature, longest, -1)
        shares = all_gathered(mine, data_group(gloo=True))
        return sorted((response for share in shares for response in share), key=lambda r: r.prompt.index)

    def _collect(
        self, prompts: list[Prompt], places: range, n: int, temperature: float, max_tokens: int, step: int
    ) -> list[Response]:
        """prompts: of all replicas; places: where those of this one stand among them."""
        result: list[Response] | Exception = []
        if is_replica_leader():
            try:
                seeds = request_seeds(self._config.run.seed, step, prompts)
                mine, own_seeds = prompts[_slice(places)], seeds[_slice(places)]
                result = self._grade(self._engines.generate(mine, n, temperature, max_tokens, own_seeds, places))
            except Exception as error:
                # The others wait for this rank's answer: they must hear of the failure, not of a lost connection.
                result = error
        result = broadcast_from_leader(result)
        if isinstance(result, Exception):
            raise result
        return result

    @functools.cached_property
    def _graders(self) -> GraderPool:
        """Of the first rank of each replica."""
        return self.enter_context(GraderPool(self._config.reward))

    def _grade(self, responses: list[Response]) -> list[Response]:
        texts = self._tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
        scores = self._graders.score(
            [(text, r.prompt.answer, r.prompt.row) for r, text in zip(responses, texts, strict=True)],
            [r.prompt.index for r in responses],
        )
        return [
            dataclasses.replace(response, text=text, reward=score.reward, failure=score.failure)
            for response, text, score in zip(responses, texts, scores, strict=True)
        ]


def consecutive_share(count: int, replica: int, replicas: int) -> range:
    """Places of a replica's prompts in a step: joined in the order of replicas they are all `count`."""
    share, rest = divmod(count, replicas)
    if rest:
        raise ValueError(f"{count} prompts do not split evenly over {replicas} replicas")
    return range(replica * share, (replica + 1) * share)


def dealt_share(count: int, replica: int, replicas: int) -> range:
    """Places of a replica's problems in an evaluation, of any number."""
    return range(replica, count, replicas)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)


def request_seeds(run_seed: int, step: int, prompts: list[Prompt]) -> list[int]:
    """One for each prompt of a step; a prompt that comes again, on whatever replica, gets another one.

    prompts: of all replicas.

    Hashed: vLLM seeds a request's i-th response with seed + i, so that neighbouring seeds would share responses.
    """
    seen: Counter[int] = Counter()
    seeds = []
    for prompt in prompts:
        key = f"{run_seed} {step} {prompt.index} {seen[prompt.index]}".encode()
        seeds.append(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest()) // 2)
        seen[prompt.index] += 1
    return seeds
