"""Credit rules: how a response's advantage is spread over its tokens. DGPO's (arXiv 2605.03327, §3) and FIPO's."""

from __future__ import annotations

import math
from typing import Literal

import torch

from megatron_dgpo.algorithm.correction import bounded
from megatron_dgpo.config import Algorithm

_MOST_STEPS = 100
_SHARE_TOLERANCE = 1e-9
"""Of log E, which is right to 1e-15."""
_LARGEST_TAU = 1e30
"""Makes all weights 1, as infinity would, and has a logarithm."""


def segment_ids(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[N] int64: the response that each packed token belongs to."""
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def _segment_max(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[B]; minus infinity for an empty response."""
    empty = values.new_full((len(cu_seqlens) - 1,), -torch.inf)
    return empty.scatter_reduce(0, segment_ids(cu_seqlens), values, "amax")


def _segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[B]; 0 for an empty response."""
    return values.new_zeros(len(cu_seqlens) - 1).index_add(0, segment_ids(cu_seqlens), values)


def gated_scores(
    deviation: torch.Tensor,
    entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    kappa: float,
    vocab_size: int,
    entropy_norm: Literal["log_vocab", "response_max"],
) -> torch.Tensor:
    """s_t = d_t · h_t^κ, [N] float32.

    deviation: [N], d_t of the reference. entropy: [N] nats, divided by log V or by the largest of its own response to
    give h_t in [0, 1]. cu_seqlens: [B + 1]. Collectives: none.
    """
    if entropy_norm == "log_vocab":
        normalised = entropy / math.log(vocab_size)
    else:
        largest = _segment_max(entropy, cu_seqlens)[segment_ids(cu_seqlens)]
        # A response without any uncertainty has no token to prefer.
        normalised = entropy / largest.clamp(min=torch.finfo(entropy.dtype).tiny)
    return deviation * normalised.clamp(0, 1) ** kappa


def credit_weights(scores: torch.Tensor, cu_seqlens: torch.Tensor, tau: float | torch.Tensor) -> torch.Tensor:
    """w_t = T_i · softmax_t(s_t / τ) over each response's tokens, [N] float32, so that Σ_t w_t = T_i.

    scores: [N] float32, detached, of whole responses. cu_seqlens: [B + 1]. tau: > 0, or [B] of them, one a response.
    Collectives: none.

    Example: a response of three tokens, whose last one scores τ·log 2 more than the others, and one of a single token.

    >>> scores = torch.tensor([0.0, 0.0, 0.5 * math.log(2), 0.3])
    >>> weights = credit_weights(scores, torch.tensor([0, 3, 4]), tau=0.5)
    >>> [round(weight, 4) for weight in weights.tolist()]
    [0.75, 0.75, 1.5, 1.0]
    """
    ids = segment_ids(cu_seqlens)
    # The maximum first: of large s / τ the difference would be rounded.
    scores = scores.float()
    below = scores - _segment_max(scores, cu_seqlens)[ids]
    exponentials = torch.exp(below / (tau[ids] if isinstance(tau, torch.Tensor) else tau))
    return exponentials * (cu_seqlens.diff() / _segment_sum(exponentials, cu_seqlens))[ids]


def temperatures_of_share(scores: torch.Tensor, cu_seqlens: torch.Tensor, share: float, tau_min: float) -> torch.Tensor:
    """τ_i [B] float32 at which `credit_weights` has the effective share (Σw)²/(T·Σw²) = `share`, but at least tau_min.

    scores: [N] of whole responses. share: in (0, 1]. The effective share falls monotonically from 1 at τ = ∞ to m/T at
    τ = 0, m tokens having the largest score: where it stays above `share` even at tau_min, that is the answer. Newton's
    steps in 1/τ within a bracket, in float64, each response's own: how responses are packed changes nothing.
    Collectives: none.
    """
    ids, lengths = segment_ids(cu_seqlens), cu_seqlens.diff()
    scores = scores.double()
    below = scores - _segment_max(scores, cu_seqlens)[ids]
    # An empty response is one token with the largest score.
    empty, count = (lengths == 0).double(), lengths.clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return _segment_sum(values, cu_seqlens) / count

    def excess(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log E − log share at λ = 1/τ, and its derivative by λ."""
        once = torch.exp(below * inverse[ids])
        twice = once * once
        first, second = mean(once) + empty, mean(twice) + empty
        slope = 2 * (mean(once * below) / first - mean(twice * below) / second)
        return 2 * first.log() - second.log() - math.log(share), slope

    low, high = torch.zeros_like(empty), torch.full_like(empty, 1 / tau_min)
    done = excess(high)[0] > 0
    # For small scores log E = −λ² Var(s).
    variance = mean(below * below) - mean(below) ** 2
    guess = (math.log(1 / share) / variance.clamp(min=1e-300)).sqrt()
    inverse = torch.where(done, high, torch.minimum(guess, high))
    for _ in range(_MOST_STEPS):
        value, slope = excess(inverse)
        done = done | (value.abs() < _SHARE_TOLERANCE)
        if bool(done.all()):
            break
        low, high = torch.where(value > 0, inverse, low), torch.where(value > 0, high, inverse)
        step = inverse - value / slope
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        inverse = torch.where(done, inverse, step)
    return (1 / inverse).clamp(max=_LARGEST_TAU).float()


def future_kl_weights(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    half_life: float,
    low: float,
    high: float,
    dual_clip: float | None,
    safety: float,
) -> torch.Tensor:
    """f_t = clip(e^F_t, low, high), F_t = Σ_{k ≥ t} γ^(k−t) x_k over the rest of a token's response, [N] float32.

    log_ratio: [N], log π/π_old of whole responses, detached; x is that, and 0 where it is above log dual_clip.
    advantages: [N], of the tokens' responses. γ = 2^(−1/half_life). A token of negative advantage and a ratio above
    `safety` is not weighted up, nor below 0.8. Σ f is not T. Source: FIPO, arXiv 2603.19835. Collectives: none.
    """
    x = bounded(log_ratio.double())
    if dual_clip is not None:
        x = x.masked_fill(log_ratio > math.log(dual_clip), 0)
    remaining = cu_seqlens[1:][segment_ids(cu_seqlens)] - torch.arange(len(x), device=x.device)
    decay, total, shift = 2 ** (-1 / half_life), x, 1
    # After k rounds each sum is of 2^k tokens: no loop over them.
    while shift < len(x):
        following = torch.nn.functional.pad(total[shift:], (0, shift)).masked_fill(remaining <= shift, 0)
        total, shift = total + decay**shift * following, 2 * shift
    weights = total.exp().clamp(low, high)
    unsafe = (advantages < 0) & (log_ratio > math.log(safety))
    return torch.where(unsafe, weights.clamp(0.8, 1.0), weights).float()


def future_kl_credit(
    log_ratio: torch.Tensor, advantages: torch.Tensor, cu_seqlens: torch.Tensor, config: Algorithm
) -> torch.Tensor:
    """`future_kl_weights` as the settings have it. log_ratio: [N] of whole responses. advantages: [B] of theirs."""
    return future_kl_weights(
        log_ratio,
        advantages[segment_ids(cu_seqlens)],
        cu_seqlens,
        half_life=config.future_half_life,
        low=config.future_low,
        high=config.future_high,
        dual_clip=config.dual_clip,
        safety=config.future_safety,
    )


def credit_concentration(weights: torch.Tensor, cu_seqlens: torch.Tensor) -> dict[str, torch.Tensor]:
    """How unevenly each response's credit is spread, [B] float32 each; 0 for an empty response.

    effective_share: (Σw)² / (T·Σw²), 1 when all tokens count alike and 1/T when one takes all. max_weight: largest w.
    top1_share, top10_share: part of Σw on the ceil(1 %) and ceil(10 %) heaviest tokens. Collectives: none.
    """
    lengths = cu_seqlens.diff()
    total, squares = _segment_sum(weights, cu_seqlens), _segment_sum(weights * weights, cu_seqlens)
    # By response, heaviest first: a stable sort by response of the tokens sorted by weight.
    descending = weights.argsort(descending=True)
    ids = segment_ids(cu_seqlens)
    order = descending[ids[descending].argsort(stable=True)]
    place = torch.arange(len(weights), device=weights.device) - cu_seqlens[:-1][ids]
    shares = {}
    for name, part in (("top1_share", 0.01), ("top10_share", 0.1)):
        kept = place < torch.ceil(lengths * part)[ids]
        shares[name] = _segment_sum(weights[order] * kept, cu_seqlens) / total.clamp(min=1e-30)
    return {
        "effective_share": total**2 / (lengths * squares).clamp(min=1e-30),
        "max_weight": _segment_max(weights, cu_seqlens).clamp(min=0),
        **shares,
    }
