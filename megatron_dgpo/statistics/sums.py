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
    """Σ e^((x − max_x + y − max_y) / 2); underflows only where H² is 1 to float32."""


def num_sums(has_reference: bool) -> int:
    return 8 if has_reference else 4


def empty_sums(num: int, n: int, device: torch.device) -> torch.Tensor:
    """[num, n] of a part without columns: its maxima weigh nothing in a merge."""
    sums = torch.zeros(num, n, device=device)
    sums[0::4] = sums[1::4] = -torch.inf
    return sums


def merge(parts: torch.Tensor) -> torch.Tensor:
    """[parts, 8 or 4, N] of disjoint columns -> the same of their union."""
    if len(parts) == 1:
        return parts[0]
    sums = Sums(*parts.unbind(1))
    max_x, shift = _shift(sums.max_x)
    scale = shift.exp()
    # A part without columns has shift −∞ and sum 0: that must not become 0·∞.
    mean = (sums.mean_x + sums.sum_x * shift.masked_fill(sums.sum_x == 0, 0)) * scale
    merged = [max_x, (sums.target_x + shift).amax(0), (sums.sum_x * scale).sum(0), mean.sum(0)]
    if sums.max_y is not None:
        max_y, shift_y = _shift(sums.max_y)
        sum_m = (sums.sum_m * ((shift + shift_y) / 2).exp()).sum(0)
        merged += [max_y, (sums.target_y + shift_y).amax(0), (sums.sum_y * shift_y.exp()).sum(0), sum_m]
    return torch.stack(merged)


def finish(total: torch.Tensor):
    """[8 or 4, N] over the whole vocabulary -> (lse, log π(a), H(π), H²(π, ρ), log ρ(a)), the last two None without ρ.

    log Σ √(πρ) = lse((x + y)/2) − (lse(x) + lse(y))/2, in which the maxima cancel: large logits cost no precision.
    """
    sums = Sums(*total)
    log_sum = sums.sum_x.log()
    entropy = (log_sum - sums.mean_x / sums.sum_x).clamp_(min=0)
    lse, logprobs = sums.max_x + log_sum, sums.target_x - log_sum
    if sums.sum_y is None or sums.sum_m is None or sums.target_y is None:
        return lse, logprobs, entropy, None, None
    log_sum_y = sums.sum_y.log()
    log_bc = sums.sum_m.log() - (log_sum + log_sum_y) / 2
    # Rounding must give no negative distance where π = ρ.
    hellinger2 = torch.expm1(log_bc.clamp_(max=0)).abs_()
    return lse, logprobs, entropy, hellinger2, sums.target_y - log_sum_y


def _shift(maxima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[parts, N] -> the overall maximum [N], and the maxima less that."""
    maximum = maxima.amax(0)
    return maximum, maxima - maximum
