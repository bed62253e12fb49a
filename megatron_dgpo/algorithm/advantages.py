"""Advantages of whole responses, relative to their group, and then to the step."""

from __future__ import annotations

from typing import Literal

import torch

Advantage = Literal["mean_std", "mean", "rloo", "mean_mad", "batch_std", "best_of_group", "length_baseline"]
"""Of one reward."""


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
    tokens = None if lengths is None else lengths.double().view(-1, group_size)
    return _relative(rewards.double().view(-1, group_size), kind, eps, tokens).flatten().float()


def _relative(groups: torch.Tensor, kind: Advantage, eps: float, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """[number of groups, G] float64, of rewards of that shape and, for the length_baseline, as many tokens."""
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "mean_std":
        centred = centred / (groups.std(1, keepdim=True, correction=0) + eps)
    elif kind == "rloo":
        centred = centred * (groups.shape[1] / max(groups.shape[1] - 1, 1))
    elif kind == "mean_mad":
        centred = centred / (centred.abs().mean(1, keepdim=True) + eps)
    elif kind == "best_of_group":
        centred = _best_alone(groups) / (groups.std(1, keepdim=True, correction=0) + eps)
    elif kind == "length_baseline":
        assert tokens is not None, "the baseline is weighted with the responses' lengths"
        centred = groups - (tokens * groups).sum(1, keepdim=True) / tokens.sum(1, keepdim=True).clamp(min=1)
    # The mean of equal numbers is rounded: what is left of them would be divided by little more than eps.
    return centred.masked_fill(~differ(groups)[:, None], 0)


def differ(groups: torch.Tensor) -> torch.Tensor:
    """[number of groups, ...] bool: whether a group's rewards, [number of groups, G, ...], are not all equal."""
    return groups.amax(1) != groups.amin(1)


def decoupled_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, group_size: int, eps: float, conflict: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ_k a_k [B] float64, kept [B] bool) of K rewards [B, K], a_k = weights_k · mean_std of the k-th in its group.

    For `over_step` (GDPO, arXiv 2601.05242). Not kept is a response in conflict with itself, with a_k of both signs and
    |Σ a_k| < conflict · Σ |a_k|; the others of its group are multiplied by their share of it (GD²PO; 0: all are kept).
    Collectives: none.
    """
    groups = rewards.double().T.reshape(-1, group_size)
    terms = weights[:, None] * _relative(groups, "mean_std", eps).view(len(weights), -1)
    total, pulls = terms.sum(0), (terms > 0).any(0) & (terms < 0).any(0)
    kept = ~(pulls & (total.abs() < conflict * terms.abs().sum(0)))
    share = kept.double().view(-1, group_size).mean(1).repeat_interleave(group_size)
    return total * kept * share, kept


def over_step(advantages: torch.Tensor, kept: torch.Tensor, eps: float) -> torch.Tensor:
    """(A − m) / (σ + eps), [B] float32, with mean and deviation over those that are `kept`; 0 for the others.

    advantages: `batch_std` of `group_advantages` (REINFORCE++-baseline, arXiv 2501.03262) or `decoupled_advantages`, of
    the step's responses on all replicas. Collectives: none.
    """
    found = advantages.double()[kept]
    # Centred in each group, they are so together: what a mean of whole groups has is rounding.
    mean = 0.0 if kept.all() else found.mean()
    deviation = (found - mean).square().mean().sqrt()
    return ((advantages.double() - mean) / (deviation + eps)).masked_fill(~kept, 0).float()


def difficulty_weights(right: torch.Tensor, differing: torch.Tensor, temperature: float) -> torch.Tensor:
    """[number of groups] float64: n · softmax(−p / temperature) over the n that are `differing`, 0 for the others.

    right: the share p of right responses of each; of a group that has none p counts as 1, as what differs there says
    nothing of right and wrong. Source: MathForge, arXiv 2601.20614. Collectives: none.
    """
    shares = right.double().masked_fill(right == 0, 1)
    weights = torch.softmax((-shares / temperature).masked_fill(~differing, -torch.inf), 0)
    return differing.sum() * weights if differing.any() else torch.zeros_like(shares)


def _best_alone(groups: torch.Tensor) -> torch.Tensor:
    """How far the best of each group is ahead of the second, in its own place, and 0 elsewhere."""
    best = groups.topk(min(2, groups.shape[1]), 1)
    return torch.zeros_like(groups).scatter_(1, best.indices[:, :1], best.values[:, :1] - best.values[:, -1:])
