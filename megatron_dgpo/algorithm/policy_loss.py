"""Policy losses of single tokens, the distance to the reference as a loss, and how token values become one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_dgpo.algorithm.correction import bounded
from megatron_dgpo.config import Algorithm


class TokenLoss(NamedTuple):
    """[N] each."""

    loss: torch.Tensor
    low: torch.Tensor
    """bool: the lower bound (A < 0) changed the gradient."""
    high: torch.Tensor
    """bool: the upper bound (A > 0), or the dual clip, did."""


def ppo_clip(
    logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, settings: Algorithm
) -> TokenLoss:
    """−min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) with log r = log_ratio; no gradient where it clips.

    With `dual_clip` c the loss where A < 0 is at most −c·A (arXiv 1912.09729). All [N] float32; logprobs and log_ratio
    carry gradients. Source: arXiv 1707.06347, eq. 7. Collectives: none, as in all losses here.
    """
    ratio = torch.exp(log_ratio)
    lowest, highest = 1 - settings.clip_low, 1 + settings.clip_high
    clipped = ratio.clamp(lowest, highest)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    low, high = (ratio < lowest) & (advantages < 0), (ratio > highest) & (advantages > 0)
    if settings.dual_clip is not None:
        bound = -settings.dual_clip * advantages
        dual = (advantages < 0) & (loss > bound)
        loss, high = torch.where(dual, bound, loss), high | dual
    return TokenLoss(loss, low, high)


def decoupled_gradient(
    logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, settings: Algorithm
) -> TokenLoss:
    """−A·r·u, u without gradient: outside the clip range the gradient decays, where ppo_clip's ends.

    u = (r/lo)^decay_low where A < 0 and r < lo, (hi/r)^(1/decay_high) where A > 0 and r > hi, else 1. Source: Decoupled
    Gradient Policy Optimization, arXiv 2603.14389; the other method of these four letters.
    """
    log_ratio = bounded(log_ratio)
    log_low = math.log(1 - settings.clip_low) if settings.clip_low < 1 else -math.inf
    below, above = log_ratio.detach() - log_low, math.log1p(settings.clip_high) - log_ratio.detach()
    low, high = (below < 0) & (advantages < 0), (above < 0) & (advantages > 0)
    exponent = torch.where(low, settings.decay_low * below, torch.where(high, above / settings.decay_high, 0.0))
    return TokenLoss(-advantages * torch.exp(log_ratio) * exponent.exp(), low, high)


def clipped_weight(
    logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, settings: Algorithm
) -> TokenLoss:
    """−clip(r)·A·log π, the clipped ratio without gradient: every token keeps one (CISPO, arXiv 2506.13585)."""
    ratio = torch.exp(log_ratio.detach())
    lowest, highest = 1 - settings.clip_low, 1 + settings.clip_high
    loss = -ratio.clamp(lowest, highest) * advantages * logprobs
    return TokenLoss(loss, (ratio < lowest) & (advantages < 0), (ratio > highest) & (advantages > 0))


LOSSES: dict[str, Callable[..., TokenLoss]] = {
    "ppo_clip": ppo_clip,
    "decoupled_gradient": decoupled_gradient,
    # With the log-ratio of `at_sequence_level`: GSPO, arXiv 2507.18071.
    "sequence_clip": ppo_clip,
    "clipped_weight": clipped_weight,
}


def at_sequence_level(logprobs: torch.Tensor, mean_log_ratio: torch.Tensor) -> torch.Tensor:
    """[N] log-ratios whose value is their response's mean and whose gradient is the token's own (GSPO-token, eq. 13).

    mean_log_ratio: [N], detached, the mean over the response that each token belongs to.
    """
    return logprobs - logprobs.detach() + mean_log_ratio


def divergence(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """[N] of the sampled token, v = log ρ(a) − log π(a): k2 = v²/2 or k3 = e^v − v − 1, never negative.

    On tokens of the policy itself k2's gradient is that of KL(π ‖ ρ), k3's that of KL(ρ ‖ π). k1 = −v has a gradient
    of mean 0 and is no loss. Source: John Schulman, "Approximating KL divergence" (2020). Collectives: none.
    """
    v = reference_logprobs - logprobs
    return v * v / 2 if estimator == "k2" else torch.expm1(v) - v


def aggregate(
    values: torch.Tensor,
    response_ids: torch.Tensor,
    lengths: torch.Tensor,
    counted: torch.Tensor,
    how: str,
    max_tokens: int,
    counts_responses: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, normaliser) of token values [N]; sums and normalisers of micro-batches and ranks add up.

    response_ids: [N], of B responses with `lengths` [B], wherever their other tokens are; those that are not `counted`
    [B] are in neither. counts_responses: whether this rank counts responses, rather than another one that shares them.
    token_mean: Σ over tokens, their number. sequence_mean: Σ over responses of their token mean, their number; an empty
    one adds 0 but counts. fixed_length: Σ over tokens / max_tokens, the number of responses (Dr. GRPO, arXiv
    2503.20783). normaliser: int64 scalar. Collectives: none.
    """
    taken = counted[response_ids]
    values = values.masked_fill(~taken, 0)
    if how == "token_mean":
        return values.sum(), taken.sum()
    values = values / (lengths[response_ids] if how == "sequence_mean" else max_tokens)
    return values.sum(), counted.sum() * counts_responses
