"""DGPO's credit rule: how a response's advantage is spread over its tokens (arXiv 2605.03327, §3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist


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


def credit_sums(scores: torch.Tensor, cu_seqlens: torch.Tensor, tau: float) -> torch.Tensor:
    """[3, B] float32 of the tokens at hand: per response the largest s_t / τ, Σ e^(s_t / τ − largest), their number.

    scores: [N], detached. cu_seqlens: [B + 1]; a response of which nothing is at hand weighs nothing in a merge.
    """
    scaled = scores.float() / tau
    largest = _segment_max(scaled, cu_seqlens)
    exponentials = torch.exp(scaled - largest[segment_ids(cu_seqlens)])
    return torch.stack([largest, _segment_sum(exponentials, cu_seqlens), cu_seqlens.diff().float()])


def merge_credit_sums(parts: torch.Tensor) -> torch.Tensor:
    """[parts, 3, B] of disjoint tokens of the same responses -> [3, B] of all of them."""
    largest = parts[:, 0].amax(0)
    scale = torch.where(parts[:, 2] > 0, torch.exp(parts[:, 0] - largest), 0)
    return torch.stack([largest, (parts[:, 1] * scale).sum(0), parts[:, 2].sum(0)])


def credit_weights(
    scores: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tau: float,
    sums: torch.Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """w_t = T_i · softmax_t(s_t / τ) over each response's tokens, [N] float32, so that Σ_t w_t = T_i.

    scores: [N] float32, detached. cu_seqlens: [B + 1]. tau: > 0. Where a response is cut, its pieces are given one at a
    time: sums, [3, B], are the merged `credit_sums` of all pieces on this rank (micro-batches), and cp_group holds the
    ranks that have others; B counts the same responses everywhere. Collectives: none, or one all-gather of [3, B]
    over cp_group.

    Example: a response of three tokens, whose last one scores τ·log 2 more than the others, and one of a single token.

    >>> scores = torch.tensor([0.0, 0.0, 0.5 * math.log(2), 0.3])
    >>> weights = credit_weights(scores, torch.tensor([0, 3, 4]), tau=0.5)
    >>> [round(weight, 4) for weight in weights.tolist()]
    [0.75, 0.75, 1.5, 1.0]
    """
    if sums is None:
        sums = credit_sums(scores, cu_seqlens, tau)
    if cp_group is not None:
        world = dist.get_world_size(cp_group)
        gathered = sums.new_empty(world * 3, sums.shape[1])
        dist.all_gather_into_tensor(gathered, sums, group=cp_group)
        sums = merge_credit_sums(gathered.view(world, *sums.shape))
    largest, total, length = sums[:, segment_ids(cu_seqlens)]
    return torch.exp(scores.float() / tau - largest) * (length / total)


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
