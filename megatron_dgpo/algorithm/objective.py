"""What one micro-batch adds to the objective: credit weights, PPO-clip and their metrics."""

from __future__ import annotations

import torch

from megatron_dgpo.algorithm.credit import credit_concentration, credit_weights, gated_scores
from megatron_dgpo.algorithm.policy_loss import aggregate, ppo_clip
from megatron_dgpo.batch import Batch
from megatron_dgpo.config import Algorithm
from megatron_dgpo.statistics import TokenStatistics

LARGEST = "largest_"
"""Metrics of this prefix are merged by their maximum; all others are sums."""


def token_credit(statistics: TokenStatistics, cu_seqlens: torch.Tensor, vocab_size: int, config: Algorithm):
    """[N] weights that redistribute a response's advantage over its tokens, detached; Σ w = T_i per response.

    statistics: packed, of the policy whose deviation is scored. Collectives: none.
    """
    if config.credit == "uniform":
        return torch.ones_like(statistics.logprobs)
    scores = gated_scores(
        statistics.hellinger2,
        statistics.entropy,
        cu_seqlens,
        kappa=config.kappa,
        vocab_size=vocab_size,
        entropy_norm=config.entropy_norm,
    )
    return credit_weights(scores.detach(), cu_seqlens, config.tau)


def policy_objective(
    statistics: TokenStatistics,
    batch: Batch,
    weights: torch.Tensor,
    old_logprobs: torch.Tensor,
    config: Algorithm,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """DGPO's loss over the packed response tokens of a micro-batch (arXiv 2605.03327, §3).

    weights, old_logprobs: [N] float32, detached. Returns (loss sum, normaliser, metrics): the loss of an optimizer
    step is Σ loss / Σ normaliser over its micro-batches and data-parallel ranks, and metrics are sums over tokens
    or responses that add up the same way, or largest values, named so. Collectives: none.

    old_logprobs are the trainer's own. The engine that sampled rounds differently, so that its policy μ is not quite
    π_old; the difference is measured (logprob_gap, the KL estimate) and not corrected: the ratio starts at 1.
    """
    cu_seqlens = batch.cu_seqlens
    lengths = cu_seqlens.diff()
    advantages = batch.advantages.repeat_interleave(lengths) * weights
    token_loss, clipped_low, clipped_high = ppo_clip(
        statistics.logprobs, old_logprobs, advantages, config.clip_low, config.clip_high
    )
    if config.entropy_bonus:
        token_loss = token_loss - config.entropy_bonus * statistics.entropy
    loss, normaliser = aggregate(token_loss, cu_seqlens, config.aggregation)
    with torch.no_grad():
        difference = old_logprobs - batch.packed_sampling_logprobs
        gap = difference.abs()
        metrics = {
            "tokens": lengths.sum(),
            "responses": torch.tensor(len(batch), device=loss.device),
            "loss": loss,
            "normaliser": normaliser,
            "entropy": statistics.entropy.sum(),
            "clip_low": clipped_low.sum(),
            "clip_high": clipped_high.sum(),
            "logprob_gap": gap.sum(),
            LARGEST + "logprob_gap": torch.cat([gap, gap.new_zeros(1)]).max(),
            # Of KL(μ ‖ π_old), unbiased and never negative: r − 1 − log r with r = π_old/μ.
            "rollout_kl": (difference.double().expm1() - difference.double()).sum(),
            "advantage": advantages.abs().sum(),
            **{name: values.sum() for name, values in credit_concentration(weights, cu_seqlens).items()},
        }
        if statistics.hellinger2 is not None:
            metrics["hellinger2"] = statistics.hellinger2.sum()
    return loss, normaliser, {name: value.detach().float() for name, value in metrics.items()}
