"""Token weights that make up for a sampler whose policy is not the one that the ratio starts from."""

from __future__ import annotations

from typing import Literal

import torch

_LARGEST_LOG_RATIO = 20.0
"""Of a token, in nats; the exponential of what is above would drown every other token."""


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    """Before it is exponentiated."""
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def sampler_ratio(logprobs: torch.Tensor, sampled_logprobs: torch.Tensor) -> torch.Tensor:
    """q = π/μ per token, [N] float32, detached: of the trainer's log-probs to those of who sampled. Collectives: none.

    Never its product over a response, whose variance grows with e to the length (VCPO).
    """
    return bounded((logprobs - sampled_logprobs).detach()).exp()


def sampler_weights(
    ratio: torch.Tensor, how: Literal["truncate", "mask"], low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(c, where it is not q), both [N], of `sampler_ratio` q.

    truncate: min(q, high), TIS of verl and TRL. mask: q within [low, high] and 0 outside, IcePop's. A token of weight 0
    keeps its place in the normaliser. Collectives: none.
    """
    if how == "truncate":
        return ratio.clamp(max=high), ratio > high
    outside = (ratio < low) | (ratio > high)
    return ratio.masked_fill(outside, 0), outside
