"""A recorded step: its responses joined with what their credit was made of, and the rules of credit that follow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from megatron_dgpo.algorithm.credit import (
    credit_weights,
    future_kl_credit,
    gated_scores,
    segment_ids,
    temperatures_of_share,
)
from megatron_dgpo.algorithm.record import read_credit
from megatron_dgpo.config import Algorithm, Config
from megatron_dgpo.config_file import load_config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.rollout.recording import of_row
from megatron_dgpo.rollout.response import Prompt, Response
from megatron_dgpo.weights.architectures import read_architecture

Key = tuple[int, int]
"""Of a response: position of its group in the run's order of prompts, and its place in the group."""

GATED, UNGATED, ENTROPY = "d·h^κ", "d", "h"
"""Scores that credit can follow: the run's, with its κ; without the gate; the gate alone."""
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RecordedRun:
    folder: Path
    config: Config
    vocab_size: int

    @property
    def rollouts(self) -> Path:
        return self.folder / "rollouts"

    @property
    def algorithm(self) -> Algorithm:
        return self.config.algorithm

    def steps(self) -> list[int]:
        """All that were recorded. Raises UsageError where there is none."""
        found = {int(file.name.split(".")[0].removeprefix("step_")) for file in self.rollouts.glob("step_*.*.npz")}
        if not found:
            raise UsageError(f"{self.rollouts}: no step was recorded; train with rollout.record=true")
        return sorted(found)


@dataclass(frozen=True)
class RecordedStep:
    """B responses of N tokens in all, packed in the order of their keys."""

    run: RecordedRun
    number: int
    keys: list[Key]
    responses: list[Response]
    """Their prompts have a text and an answer, and no tokens."""
    tokens: dict[str, torch.Tensor]
    """[N] float32 each, by the names of `record.TOKENS` that the run had."""
    advantages: torch.Tensor
    """[B] float32."""
    counted: list[bool]
    taus: list[float | None]
    """Of each response that was given its own."""

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """[B + 1] int64."""
        return torch.tensor([0, *(len(response.token_ids) for response in self.responses)]).cumsum(0)

    @cached_property
    def scores(self) -> dict[str, torch.Tensor]:
        """[N] float32 each; of the deviation only where the run had a reference."""
        entropy = self.tokens["entropy"]
        found = {ENTROPY: self.gated(torch.ones_like(entropy), 1)}
        if "deviation" in self.tokens:
            found[GATED] = self.gated(self.tokens["deviation"], self.run.algorithm.kappa)
            found[UNGATED] = self.tokens["deviation"]
        return found

    def gated(self, deviation: torch.Tensor, kappa: float) -> torch.Tensor:
        return gated_scores(
            deviation,
            self.tokens["entropy"],
            self.cu_seqlens,
            kappa=kappa,
            vocab_size=self.run.vocab_size,
            entropy_norm=self.run.algorithm.entropy_norm,
        )

    def split(self, values: torch.Tensor) -> list[list[float]]:
        """[N] by response."""
        return [part.tolist() for part in values.split(self.cu_seqlens.diff().tolist())]


@dataclass(frozen=True)
class Rule:
    """Where a step's credit goes. weigh: its tokens' weights, [N] float32."""

    name: str
    weigh: Callable[[RecordedStep], torch.Tensor]
    score: str | None = None
    """What it follows, by its name in `RecordedStep.scores`."""


UNIFORM = Rule("uniform", lambda step: torch.ones_like(step.tokens["logprobs"]))


def at_tau(name: str, score: str, tau: float) -> Rule:
    return Rule(f"{name}, τ = {tau:g}", lambda step: credit_weights(step.scores[score], step.cu_seqlens, tau), score)


def at_share(name: str, score: str, share: float) -> Rule:
    """Every response has the temperature that gives its weights that effective share."""

    def weigh(step: RecordedStep) -> torch.Tensor:
        scores = step.scores[score]
        taus = temperatures_of_share(scores, step.cu_seqlens, share, step.run.algorithm.tau_min)
        return credit_weights(scores, step.cu_seqlens, taus)

    return Rule(f"{name}, E = {share:g}", weigh, score)


def own_rule(algorithm: Algorithm) -> Rule:
    """What `objective.token_credit` makes of the settings."""
    if algorithm.credit == "uniform":
        return UNIFORM
    if algorithm.credit == "none":
        return Rule("none", lambda step: torch.zeros_like(step.tokens["logprobs"]))
    if algorithm.credit == "future_kl":
        return Rule("future KL", _future_kl)
    if algorithm.tau_mode == "absolute":
        return at_tau("DGPO", GATED, algorithm.tau)
    return at_share("DGPO", GATED, algorithm.effective_share)


def rules_of(step: RecordedStep) -> list[Rule]:
    """The run's own first, then those to compare it with, each once."""
    algorithm = step.run.algorithm
    rules = [own_rule(algorithm), UNIFORM]
    if GATED in step.scores:
        rules += [at_tau("DGPO", GATED, algorithm.tau), at_share("DGPO", GATED, 0.8), at_share("DGPO", GATED, 0.5)]
        rules += [at_tau("no gate", UNGATED, algorithm.tau), at_share("no gate", UNGATED, 0.8)]
    rules.append(at_share("entropy only", ENTROPY, 0.8))
    return list({rule.name: rule for rule in rules}.values())


def _future_kl(step: RecordedStep) -> torch.Tensor:
    return future_kl_credit(step.tokens["log_ratio"], step.advantages, step.cu_seqlens, step.run.algorithm)


# Reading


def open_run(folder: Path) -> RecordedRun:
    """Raises UsageError where the folder is no run's, or its model is gone."""
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder}: has no config.yaml, so it is no run's folder; give the run.dir of a training run")
    config = load_config(folder / "config.yaml")
    return RecordedRun(folder, config, read_architecture(config.model.path).vocab_size)


def read_step(run: RecordedRun, number: int) -> RecordedStep:
    """Raises UsageError where the step was not recorded, its files are not of one another, or its credit does not
    follow from the run's settings."""
    known = run.steps()
    if number not in known:
        raise UsageError(f"{run.rollouts}: step {number} was not recorded; there are {len(known)}, {_span(known)}")
    credit, responses = read_credit(run.rollouts, number), dict(_responses(run.rollouts, number))
    odd = sorted(credit.keys() ^ responses.keys())
    both = sorted(credit.keys() & responses.keys())
    odd += [key for key in both if len(credit[key].tokens["credit"]) != len(responses[key].token_ids)]
    if odd:
        raise UsageError(
            f"{run.rollouts}: the .jsonl and .npz files of step {number} do not belong together: they differ in "
            f"{_name(odd[0])}; remove the step's files and let the run make it again"
        )
    keys = sorted(credit)
    found = [credit[key] for key in keys]
    tokens = {
        name: torch.cat([torch.from_numpy(response.tokens[name]) for response in found]) for name in found[0].tokens
    }
    step = RecordedStep(
        run,
        number,
        keys,
        [responses[key] for key in keys],
        tokens,
        torch.tensor([response.advantage for response in found]),
        [response.counted for response in found],
        [response.tau for response in found],
    )
    _check(step)
    return step


def _responses(folder: Path, number: int) -> Iterator[tuple[Key, Response]]:
    """By key: rows of a group follow one another, in the order of their places in it."""
    for file in sorted(folder.glob(f"step_{number:08d}.*.jsonl")):
        places: Counter[int] = Counter()
        for line, text in enumerate(file.read_bytes().splitlines(), 1):
            try:
                row = json.loads(text)
                response = of_row(Prompt(row["prompt"], [], row["question"], row["answer"]), row)
                position = row["position"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{file}: line {line} is no recorded response ({error!r})") from None
            yield (position, places[position]), response
            places[position] += 1


def _check(step: RecordedStep) -> None:
    """The recorded credit is that of the settings; so are then, of the same numbers, the other rules'."""
    for name, values in step.tokens.items():
        if not values.isfinite().all():
            raise UsageError(f"{step.run.rollouts}: {name} of step {step.number} are not all finite; take another step")
    expected, recorded = own_rule(step.run.algorithm).weigh(step), step.tokens["credit"]
    # Float32 sums of T terms in another order differ by about √T of their last bits.
    rounding = step.cu_seqlens.diff().sqrt()[segment_ids(step.cu_seqlens)] * torch.finfo(torch.float32).eps
    beyond = (expected - recorded).abs() - rounding * expected
    worst = int(beyond.argmax()) if len(beyond) else 0
    if len(beyond) and beyond[worst] > _TOLERANCE:
        response = int(segment_ids(step.cu_seqlens)[worst])
        raise UsageError(
            f"{step.run.rollouts}: the credit of step {step.number} does not follow from the settings in "
            f"{step.run.folder / 'config.yaml'}: token {worst - int(step.cu_seqlens[response])} of "
            f"{_name(step.keys[response])} has {recorded[worst]:.7g} and they give {expected[worst]:.7g}; put back "
            "those that the step was trained with"
        )


def _name(key: Key) -> str:
    return f"response {key[1]} at position {key[0]}"


def _span(steps: list[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
