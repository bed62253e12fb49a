"""Scored responses: sampled by the engines, graded in worker processes, shared with a whole replica.

The first rank of every data-parallel replica talks to engines and graders for its own prompts; the other ranks of
the replica receive what it got. Groups never straddle replicas.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron.core import parallel_state

from megatron_dgpo.config import Config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.model.collectives import all_gathered, broadcast_from_leader
from megatron_dgpo.rewards.pool import GraderPool
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.sample import Prompt, Sample


@dataclass(frozen=True)
class Scored:
    """A sample with its reward; `failure` says why a grader gave none (the reward is then 0)."""

    sample: Sample
    reward: float
    failure: str | None = None

    @property
    def correct(self) -> bool:
        return self.reward >= 1.0


class Experience:
    """Makes scored samples; use as a context manager, which ends the grader processes."""

    def __init__(self, config: Config, engines: Engines | None, tokenizer) -> None:
        """engines: on the first rank of each replica, unless rollouts are replayed; None elsewhere."""
        self._config = config
        self.engines = engines
        self._tokenizer = tokenizer
        self._graders = GraderPool(config.reward) if engines is not None else None
        self._folder = config.run.dir / "rollouts"

    def __enter__(self) -> Experience:
        return self

    def __exit__(self, *_) -> None:
        if self._graders:
            self._graders.close()

    def sample(self, prompts: list[Prompt], step: int) -> list[Scored]:
        """`group_size` responses to each prompt of this replica's share, groups consecutive, for training step `step`.

        prompts: of all replicas, whose number divides theirs. Collectives: one object broadcast over the replica.
        """
        rollout, replica = self._config.rollout, _replica()
        places = consecutive_share(len(prompts), *replica)
        if rollout.replay:
            return self._replay(prompts, places, step)
        size, longest = rollout.group_size, rollout.max_response_tokens
        scored = self._collect(prompts, places, size, rollout.temperature, longest, step)
        if rollout.record and self._graders:
            write_samples(self._file(step, replica[0]), scored)
        return scored

    def evaluate(self, prompts: list[Prompt], samples: int, temperature: float) -> list[Scored]:
        """`samples` responses to every prompt, made by all replicas together and known to every rank.

        Collectives: one object broadcast over the replica and one all-gather over data-parallel ranks.
        """
        replica, longest = _replica(), self._config.rollout.max_response_tokens
        mine = self._collect(prompts, dealt_share(len(prompts), *replica), samples, temperature, longest, -1)
        shares = all_gathered(mine, parallel_state.get_data_parallel_group_gloo())
        return sorted((scored for share in shares for scored in share), key=lambda s: s.sample.prompt.index)

    def _collect(
        self, prompts: list[Prompt], places: range, n: int, temperature: float, max_tokens: int, step: int
    ) -> list[Scored]:
        """prompts: of all replicas; places: where those of this one stand among them."""
        result: list | Exception | None = None
        if self.engines is not None:
            try:
                seeds = request_seeds(self._config.run.seed, step, prompts)
                mine, own_seeds = prompts[_slice(places)], seeds[_slice(places)]
                samples = self.engines.generate(mine, n, temperature, max_tokens, own_seeds, places)
                result = self._grade(samples)
            except Exception as error:
                # The others wait for this rank's answer: they must hear of the failure, not of a lost connection.
                result = error
        result = broadcast_from_leader(result)
        if isinstance(result, Exception):
            raise result
        return result

    def _grade(self, samples: list[Sample]) -> list[Scored]:
        texts = self._tokenizer.batch_decode([s.token_ids for s in samples], skip_special_tokens=True)
        samples = [dataclasses.replace(s, text=text) for s, text in zip(samples, texts, strict=True)]
        scores = self._graders.score(
            [(s.text, s.prompt.answer, s.prompt.row) for s in samples], [s.prompt.index for s in samples]
        )
        return [Scored(s, score.reward, score.failure) for s, score in zip(samples, scores, strict=True)]

    def _file(self, step: int, replica: int) -> Path:
        return self._folder / f"step_{step:08d}.{replica}.jsonl"

    def _replay(self, prompts: list[Prompt], places: range, step: int) -> list[Scored]:
        """What another run recorded for this replica's prompts, whatever its data-parallel size was."""
        folder = self._config.rollout.replay
        recorded: dict[int, list[dict]] = {}
        for file in sorted(folder.glob(f"step_{step:08d}.*.jsonl"), key=lambda file: int(file.name.split(".")[1])):
            for line in file.read_text().splitlines():
                row = json.loads(line)
                recorded.setdefault(row["prompt"], []).append(row)
        group_size = self._config.rollout.group_size
        scored = []
        for place, prompt in enumerate(prompts):
            # A problem met twice in a step (at the turn of an epoch) has two groups, in order, whoever holds them.
            rows = recorded.get(prompt.index, [])
            if len(rows) < group_size:
                raise UsageError(
                    f"rollout.replay={folder}: step {step} has {len(rows)} responses to problem {prompt.index}, not "
                    f"{group_size}; replay needs the seed, data and rollout settings of the run that recorded"
                )
            recorded[prompt.index] = rows[group_size:]
            if place in places:
                scored += [_scored(prompt, row) for row in rows[:group_size]]
        return scored


def consecutive_share(count: int, replica: int, replicas: int) -> range:
    """Places of a replica's prompts in a step: joined in the order of replicas they are all `count`."""
    share, rest = divmod(count, replicas)
    if rest:
        raise ValueError(f"{count} prompts do not split evenly over {replicas} replicas")
    return range(replica * share, (replica + 1) * share)


def dealt_share(count: int, replica: int, replicas: int) -> range:
    """Places of a replica's problems in an evaluation, of any number."""
    return range(replica, count, replicas)


def _replica() -> tuple[int, int]:
    """(rank, size) of data parallelism."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


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


def write_samples(file: Path, scored: list[Scored]) -> None:
    """One JSON object a line; log-probs survive exactly."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        for item in scored:
            row = dataclasses.asdict(item.sample) | {
                "prompt": item.sample.prompt.index,
                "question": item.sample.prompt.text,
                "answer": item.sample.prompt.answer,
                "reward": item.reward,
                "failure": item.failure,
            }
            stream.write(json.dumps(row) + "\n")


def _scored(prompt: Prompt, row: dict) -> Scored:
    fields = {f.name: row[f.name] for f in dataclasses.fields(Sample) if f.name != "prompt"}
    return Scored(Sample(prompt=prompt, **fields), row["reward"], row["failure"])
