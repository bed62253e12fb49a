"""The loss: from a micro-batch's hidden states to what it adds to the objective, and to what is known of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_dgpo.algorithm.credit import credit_concentration, credit_weights, gated_scores
from megatron_dgpo.algorithm.policy_loss import aggregate, ppo_clip
from megatron_dgpo.batch import Batch, with_known
from megatron_dgpo.config import Algorithm, Config
from megatron_dgpo.statistics import TokenStatistics, token_statistics

LARGEST = "largest_"
"""Metrics of this prefix are merged by their maximum; all others are sums."""


class Signal(NamedTuple):
    """What decides the loss of a micro-batch's N response tokens, in their packed order."""

    statistics: TokenStatistics
    """Of the current policy, and with a reference of the distance to it."""
    old_logprobs: torch.Tensor
    """[N] float32, detached: of the policy before the first update."""
    credit: torch.Tensor
    """[N] float32, detached: the weights w, whose sum over a response is its length."""


class Objective:
    """DGPO's loss (arXiv 2605.03327, §3) of packed hidden states, for `Policy.step` and `Policy.forward`.

    Its methods run on the last pipeline stage, and make one all-gather over the tensor-parallel ranks a call.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        reference_head: torch.Tensor | None,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        """reference_head: [V_padded / tp, H]; None where `algorithm.credit` asks for no reference."""
        self._config, self._vocab_size = config, vocab_size
        self._reference_head, self._tp_group = reference_head, tp_group

    def __call__(
        self, batch: Batch, hidden_states: torch.Tensor, head_weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(loss sum, normaliser, metrics) of `policy_objective`.

        hidden_states: [N, H]. head_weight: [V_padded / tp, H].
        """
        statistics, old_logprobs, credit = self.signal(batch, hidden_states, head_weight)
        return policy_objective(statistics, batch, credit, old_logprobs, self._config.algorithm)

    def signal(self, batch: Batch, hidden_states: torch.Tensor, head_weight: torch.Tensor) -> Signal:
        """What the loss is made of; what the micro-batch does not know of itself is the current policy's."""
        statistics = token_statistics(
            hidden_states,
            head_weight,
            batch.targets,
            temperature=self._config.rollout.temperature,
            vocab_size=self._vocab_size,
            tp_group=self._tp_group,
            reference_hidden_states=batch.reference_states,
            reference_head_weight=self._reference_head,
            check_finite=self._config.run.check_finite,
        )
        credit = batch.credit
        if credit is None or self._config.algorithm.scored_by == "current":
            credit = token_credit(statistics, batch.cu_seqlens, self._vocab_size, self._config.algorithm)
        old_logprobs = statistics.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        return Signal(statistics, old_logprobs, credit)

    def freeze(self, forward: Callable, micro_batches: list[Batch]) -> list[Batch]:
        """The same with log-probs and credit of the policy as it is now, for several updates on them.

        forward: `Policy.forward`, whose collectives these are. Elsewhere than on the last stage nothing is added.
        """

        def now(batch: Batch, hidden_states: torch.Tensor, head_weight: torch.Tensor) -> dict[str, torch.Tensor]:
            statistics, _, credit = self.signal(batch, hidden_states, head_weight)
            return {"old_logprobs": statistics.logprobs, "credit": credit}

        return with_known(micro_batches, forward(micro_batches, now))


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
        difference = old_logprobs - batch.packed_generator_logprobs
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
            **{name: values.sum() for name, values in credit_concentration(weights, cu_seqlens).items()},
        }
        if statistics.hellinger2 is not None:
            metrics["hellinger2"] = statistics.hellinger2.sum()
    return loss, normaliser, {name: value.detach().float() for name, value in metrics.items()}
