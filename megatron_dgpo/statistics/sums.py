"""What a part of the vocabulary contributes to a token's statistics: sums that merge associatively.

A tile of columns gives eight float32 numbers a token (four without a reference), all relative to the tile's own maxima:
logits of any size keep full precision. Tiles of one rank and ranks of a group are merged by the same function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sums(NamedTuple):
    """Rows of a [8, N] float32 tensor, or of the first four of it. Every field is [N], or [parts, N] of several."""

    max_x: torch.Tensor
    target_x: torch.Tensor
    """x − max_x of the target where the part holds it, else −∞."""
    sum_x: torch.Tensor
    """Σ e^(x − max_x)."""
    mean_x: torch.Tensor
    """Σ e^(x − max_x)·(x − max_x)."""
    max_y: torch.Tensor | None = None
    target_y: torch.Tensor | None = None
    sum_y: torch.Tensor | None = None
    sum_m: torch.Tensor | None = None
    """Σ e^(α(x − max_x) + (1 − α)(y − max_y)); underflows only where the deviation is 1 to float32. For KL instead of
    an α: Σ e^(x − max_x)·(y − max_y)."""


def num_sums(has_reference: bool) -> int:
    return 8 if has_reference else 4


def empty_sums(num: int, n: int, device: torch.device) -> torch.Tensor:
    """[num, n] of a part without columns: its maxima weigh nothing in a merge."""
    sums = torch.zeros(num, n, device=device)
    sums[0::4] = sums[1::4] = -torch.inf
    return sums


def merge(parts: torch.Tensor, alpha: float | None = 0.5) -> torch.Tensor:
    """[parts, 8 or 4, N] of disjoint columns -> the same of their union. alpha: of the deviation, None for KL."""
    if len(parts) == 1:
        return parts[0]
    sums = Sums(*parts.unbind(1))
    max_x, shift = _shift(sums.max_x)
    scale, nothing = shift.exp(), sums.sum_x == 0
    # A part without columns has shift −∞ and sum 0: that must not become 0·∞.
    mean = (sums.mean_x + sums.sum_x * shift.masked_fill(nothing, 0)) * scale
    merged = [max_x, (sums.target_x + shift).amax(0), (sums.sum_x * scale).sum(0), mean.sum(0)]
    if sums.max_y is not None:
        max_y, shift_y = _shift(sums.max_y)
        if alpha is None:
            sum_m = ((sums.sum_m + sums.sum_x * shift_y.masked_fill(nothing, 0)) * scale).sum(0)
        else:
            sum_m = (sums.sum_m * (alpha * shift + (1 - alpha) * shift_y).exp()).sum(0)
        merged += [max_y, (sums.target_y + shift_y).amax(0), (sums.sum_y * shift_y.exp()).sum(0), sum_m]
    return torch.stack(merged)


def finish(total: torch.Tensor, alpha: float | None = 0.5):
    """[8 or 4, N] over the whole vocabulary -> (lse, log π(a), H(π), d(π, ρ), log ρ(a)), the last two None without ρ.

    d = 1 − Σ π^α ρ^(1−α), which is H² for α = ½, or KL(π ‖ ρ) for None. log Σ π^α ρ^(1−α) = lse(αx + (1 − α)y) −
    α·lse(x) − (1 − α)·lse(y), in which the maxima cancel: large logits cost no precision.
    """
    sums = Sums(*total)
    log_sum = sums.sum_x.log()
    entropy = (log_sum - sums.mean_x / sums.sum_x).clamp_(min=0)
    lse, logprobs = sums.max_x + log_sum, sums.target_x - log_sum
    if sums.sum_y is None or sums.sum_m is None or sums.target_y is None:
        return lse, logprobs, entropy, None, None
    log_sum_y = sums.sum_y.log()
    # Rounding must give no negative distance where π = ρ.
    if alpha is None:
        deviation = (log_sum_y - sums.sum_m / sums.sum_x - entropy).clamp_(min=0)
    else:
        log_sum_m = sums.sum_m.log() - (alpha * log_sum + (1 - alpha) * log_sum_y)
        deviation = torch.expm1(log_sum_m.clamp_(max=0)).abs_()
    return lse, logprobs, entropy, deviation, sums.target_y - log_sum_y


def _shift(maxima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[parts, N] -> the overall maximum [N], and the maxima less that."""
    maximum = maxima.amax(0)
    return maximum, maxima - maximum
