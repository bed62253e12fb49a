"""PPO's clipped objective, and how token values become one number."""

from __future__ import annotations

from typing import Literal

import torch


def ppo_clip(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """−min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) per token, r = π/π_old; no KL term.

    All [N] float32. Returns (loss, clipped_low, clipped_high): the masks [N] bool mark tokens whose gradient the
    lower bound (A < 0) or the upper bound (A > 0) cut off. Source: arXiv 1707.06347, eq. 7. Collectives: none.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return loss, (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def aggregate(
    values: torch.Tensor, cu_seqlens: torch.Tensor, how: Literal["token_mean", "sequence_mean"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, normaliser) of packed token values [N]; sums and normalisers of micro-batches and ranks add up.

    token_mean: Σ over tokens, N. sequence_mean: Σ over responses of their token mean, B; an empty response adds 0 but
    counts. normaliser: int64 scalar. Collectives: none.
    """
    lengths = cu_seqlens.diff()
    if how == "token_mean":
        return values.sum(), lengths.sum()
    weights = (1 / lengths.clamp(min=1)).repeat_interleave(lengths)
    return (values * weights).sum(), torch.tensor(len(lengths), device=values.device)
