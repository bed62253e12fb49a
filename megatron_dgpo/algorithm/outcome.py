"""What came of a step's responses, and what each is worth: from rewards to advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_dgpo.algorithm.advantages import (
    decoupled_advantages,
    differ,
    difficulty_weights,
    group_advantages,
    over_step,
)
from megatron_dgpo.algorithm.shaping import shape_rewards
from megatron_dgpo.config import Config


class Outcome(NamedTuple):
    """All of a response that its advantage, and that of others, depends on."""

    reward: float
    """The grader's; of several rewards their weighted sum."""
    components: tuple[float, ...]
    """The several, in the order of reward.weights."""
    correct: bool
    length: int
    """In tokens."""
    cut_off: bool
    """By rollout.max_response_tokens."""
    kl: float = 0.0
    """Σ_t log π_old(a_t) − log ρ(a_t), where algorithm.kl takes it off the reward."""


def step_advantages(outcomes: Sequence[Outcome], config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [B] float32, counted [B] bool) of a step's responses on all replicas, groups end to end.

    counted: which have a loss and are in the normaliser. Whoever computes them has all of them, in one order, so that
    the number of replicas changes no bit. Collectives: none.
    """
    lengths = torch.tensor([outcome.length for outcome in outcomes])
    rewards, counted = shape_rewards(
        torch.tensor([outcome.reward for outcome in outcomes], dtype=torch.float64),
        lengths,
        torch.tensor([outcome.cut_off for outcome in outcomes]),
        config.reward.overlong,
        config.rollout.max_response_tokens,
        config.reward.overlong_buffer_tokens,
    )
    if config.algorithm.kl == "reward":
        kl = torch.tensor([outcome.kl for outcome in outcomes], dtype=torch.float64)
        rewards = rewards - config.algorithm.kl_coefficient * kl
    weights = torch.tensor([*config.reward.weights.values()], dtype=torch.float64)
    if config.algorithm.advantage == "decoupled":
        several = torch.tensor([outcome.components for outcome in outcomes], dtype=torch.float64)
        # Those without a weight are looked at by nobody.
        rewards, weights = several[:, weights != 0], weights[weights != 0]
    advantages, kept = _compared(rewards, weights, lengths, config)
    if config.algorithm.group_weight == "difficulty":
        size = config.rollout.group_size
        right = torch.tensor([outcome.correct for outcome in outcomes]).double().view(-1, size).mean(1)
        differing = differ(rewards.reshape(len(right), size, -1)).any(1)
        factors = difficulty_weights(right, differing, config.algorithm.difficulty_temperature)
        advantages = (advantages * factors.repeat_interleave(size)).float()
        kept = kept & differing.repeat_interleave(size)
    return advantages, counted & kept


def _compared(
    rewards: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [B] float32, kept [B] bool) of rewards [B], or decoupled ones [B, K] with weights [K]."""
    settings, size = config.algorithm, config.rollout.group_size
    if settings.advantage == "decoupled":
        advantages, kept = decoupled_advantages(rewards, weights, size, settings.advantage_eps, settings.conflict)
    else:
        kept = torch.ones(len(rewards), dtype=torch.bool)
        advantages = group_advantages(rewards, size, settings.advantage, settings.advantage_eps, lengths)
    if settings.advantage in ("decoupled", "batch_std"):
        advantages = over_step(advantages, kept, settings.advantage_eps)
    return advantages, kept
