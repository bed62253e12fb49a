"""DGPO's credit rule: how a response's advantage is spread over its tokens (arXiv 2605.03327, §3)."""

from __future__ import annotations

import math
from typing import Literal

import torch


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
    hellinger2: torch.Tensor,
    entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    kappa: float,
    vocab_size: int,
    entropy_norm: Literal["log_vocab", "response_max"],
) -> torch.Tensor:
    """s_t = d_t · h_t^κ, [N] float32.

    hellinger2: [N], d_t. entropy: [N] nats, divided by log V or by the largest of its own response to give h_t in
    [0, 1]. cu_seqlens: [B + 1]. Collectives: none.
    """
    if entropy_norm == "log_vocab":
        normalised = entropy / math.log(vocab_size)
    else:
        largest = _segment_max(entropy, cu_seqlens)[segment_ids(cu_seqlens)]
        # A response without any uncertainty has no token to prefer.
        normalised = entropy / largest.clamp(min=torch.finfo(entropy.dtype).tiny)
    return hellinger2 * normalised.clamp(0, 1) ** kappa


def credit_weights(scores: torch.Tensor, cu_seqlens: torch.Tensor, tau: float) -> torch.Tensor:
    """w_t = T_i · softmax_t(s_t / τ) over each response's own tokens, [N] float32, so that Σ_t w_t = T_i.

    scores: [N] float32, detached. cu_seqlens: [B + 1]. tau: > 0. Collectives: none.
    """
    ids = segment_ids(cu_seqlens)
    scaled = scores.float() / tau
    exponentials = torch.exp(scaled - _segment_max(scaled, cu_seqlens)[ids])
    return exponentials * (cu_seqlens.diff() / _segment_sum(exponentials, cu_seqlens))[ids]


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
