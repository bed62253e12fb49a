"""Group-relative advantages."""

from __future__ import annotations

from typing import Literal

import torch


def group_advantages(rewards: torch.Tensor, group_size: int, kind: Literal["mean_std", "mean"], eps: float):
    """[B] float32: each reward relative to its group of `group_size` consecutive responses; 0 where all are equal.

    mean_std: (r − mean) / (std + eps), std over the group with Bessel's correction off; mean: r − mean.
    Source: arXiv 2605.03327, §3; `mean` is Dr. GRPO's (arXiv 2503.20783). Collectives: none.
    """
    # The mean of equal numbers is rounded: what is left of them would be divided by little more than eps.
    groups = rewards.double().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "mean_std":
        centred = centred / (groups.std(1, keepdim=True, correction=0) + eps)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return centred.masked_fill(equal, 0).flatten().float()
