"""Advantages of whole responses, relative to their group."""

from __future__ import annotations

from typing import Literal

import torch

Advantage = Literal["mean_std", "mean", "rloo", "mean_mad", "batch_std", "best_of_group", "length_baseline"]


def group_advantages(
    rewards: torch.Tensor, group_size: int, kind: Advantage, eps: float, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """[B] float32: each reward relative to its group of `group_size` consecutive responses; 0 where all are equal.

    With m and σ the group's mean and standard deviation (Bessel's correction off):
    mean_std: (r − m)/(σ + eps), GRPO, arXiv 2402.03300. mean: r − m, Dr. GRPO, 2503.20783. rloo: r less the mean of the
    others, 2402.14740. mean_mad: (r − m)/(mean |r − m| + eps), 2601.20614. batch_std: r − m, which `over_step` divides
    by the step's deviation. best_of_group: (r₁ − r₂)/(σ + eps) for the best and 0 for the others, 2503.19595.
    length_baseline: r − Σ T r / Σ T with the `lengths` T [B], 2505.23585. Collectives: none.
    """
    # The mean of equal numbers is rounded: what is left of them would be divided by little more than eps.
    groups = rewards.double().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "mean_std":
        centred = centred / (groups.std(1, keepdim=True, correction=0) + eps)
    elif kind == "rloo":
        centred = centred * (group_size / max(group_size - 1, 1))
    elif kind == "mean_mad":
        centred = centred / (centred.abs().mean(1, keepdim=True) + eps)
    elif kind == "best_of_group":
        centred = _best_alone(groups) / (groups.std(1, keepdim=True, correction=0) + eps)
    elif kind == "length_baseline":
        assert lengths is not None, "the baseline is weighted with the responses' lengths"
        tokens = lengths.double().view(-1, group_size)
        centred = groups - (tokens * groups).sum(1, keepdim=True) / tokens.sum(1, keepdim=True).clamp(min=1)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return centred.masked_fill(equal, 0).flatten().float()


def over_step(centred: torch.Tensor, eps: float) -> torch.Tensor:
    """centred / (σ_B + eps), [B] float32, σ_B the deviation of them all (REINFORCE++-baseline, arXiv 2501.03262).

    centred: `batch_std` of `group_advantages`, of the step's responses on all replicas. Collectives: none.
    """
    # Centred in each group, they are so together.
    return (centred.double() / (centred.double().square().mean().sqrt() + eps)).float()


def _best_alone(groups: torch.Tensor) -> torch.Tensor:
    """How far the best of each group is ahead of the second, in its own place, and 0 elsewhere."""
    best = groups.topk(min(2, groups.shape[1]), 1)
    return torch.zeros_like(groups).scatter_(1, best.indices[:, :1], best.values[:, :1] - best.values[:, -1:])
