"""What becomes of the grader's reward before responses are compared, and which responses take part in the loss."""

from __future__ import annotations

from typing import Literal

import torch


def shape_rewards(
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    cut_off: torch.Tensor,
    overlong: Literal["none", "filter", "punish"],
    max_tokens: int,
    buffer_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards, counted), both [B], of responses of `lengths` tokens, cut off by the limit of max_tokens or not.

    filter: what was cut off has no loss and is in no normaliser (`counted`), but keeps its place in the group's mean
    and deviation. punish: in the last buffer_tokens (None: a fifth of max_tokens) before the limit the reward falls
    linearly, at the limit by 1. Source: DAPO, arXiv 2503.14476, §3.4 and eq. 13. Collectives: none.
    """
    counted = torch.ones_like(cut_off, dtype=torch.bool)
    if overlong == "filter":
        counted = ~cut_off
    elif overlong == "punish":
        buffer = buffer_tokens or max(max_tokens // 5, 1)
        rewards = rewards - ((lengths - (max_tokens - buffer)) / buffer).clamp(0, 1)
    return rewards, counted
