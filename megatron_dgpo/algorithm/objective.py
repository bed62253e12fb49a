"""The loss: from a micro-batch's hidden states to what it adds to the objective, and to what is known of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_dgpo.algorithm.correction import sampler_ratio, sampler_weights
from megatron_dgpo.algorithm.credit import (
    credit_concentration,
    credit_weights,
    future_kl_credit,
    gated_scores,
    temperatures_of_share,
)
from megatron_dgpo.algorithm.policy_loss import LOSSES, aggregate, at_sequence_level, divergence
from megatron_dgpo.algorithm.record import TOKENS, CreditRecord
from megatron_dgpo.algorithm.resolve import resolved_algorithm
from megatron_dgpo.config import Algorithm, Config
from megatron_dgpo.micro_batch import MicroBatch, with_known
from megatron_dgpo.model.collectives import all_rows
from megatron_dgpo.model.policy import LARGEST
from megatron_dgpo.statistics import TokenStatistics, token_statistics


class Signal(NamedTuple):
    """What decides the loss of a micro-batch's N response tokens here; M of them on all context-parallel ranks."""

    statistics: TokenStatistics
    """Of the current policy, and with a reference of the distance to it."""
    old_logprobs: torch.Tensor
    """[N] float32, detached: the denominator of the ratio."""
    credit: torch.Tensor
    """[M] float32, detached: the weights w; DGPO's have their response's length for a sum."""
    tau: torch.Tensor | None = None
    """[B] float32: the temperature of each response's weights, where it has its own."""
    mean_log_ratio: torch.Tensor | None = None
    """[B] float32, detached: of log π/π_old over each response, where the policy loss asks for it."""


class Objective:
    """The loss of packed hidden states, for `Policy.step` and `Policy.forward`: DGPO's (arXiv 2605.03327, §3), or what
    else the settings make of its stages.

    Its methods run on the last pipeline stage. Collectives of each: an all-gather of sums over the tensor-parallel
    ranks, before it one of the reference's states, where there is one, and over the context-parallel ranks an
    all-reduce of what credit is made of ([2, M] or [M]) and one of [B] for a ratio of whole responses; each only where
    there are several.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        reference_head: torch.Tensor | None,
        tp_group: dist.ProcessGroup | None,
        cp_group: dist.ProcessGroup | None = None,
        record: CreditRecord | None = None,
    ) -> None:
        """reference_head: [V_padded / tp, H]; None where nothing asks for a reference. record: is told what credit is
        made of, for one more all-gather over the tensor-parallel and one all-reduce over the context-parallel ranks."""
        self._config, self._vocab_size = config, vocab_size
        self._algorithm = resolved_algorithm(config)
        self._reference_head, self._tp_group, self._cp_group = reference_head, tp_group, cp_group
        self.record = record

    def __call__(
        self, batch: MicroBatch, hidden_states: torch.Tensor, head_weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(loss sum, normaliser, metrics) of `policy_objective`, and where samplers may have older weights the gap to
        them by their age.

        hidden_states: [N, H]. head_weight: [V_padded / tp, H].
        """
        signal, rollout = self.signal(batch, hidden_states, head_weight), self._config.rollout
        loss, normaliser, metrics = policy_objective(signal, batch, self._algorithm, rollout.max_response_tokens)
        if rollout.max_staleness:
            metrics |= _gap_by_lag(signal, batch, self._algorithm, rollout.max_staleness)
        return loss, normaliser, metrics

    def signal(self, batch: MicroBatch, hidden_states: torch.Tensor, head_weight: torch.Tensor) -> Signal:
        """What the loss is made of; what the micro-batch does not know of itself is the current policy's."""
        statistics = self._statistics(batch, hidden_states, head_weight)
        old_logprobs = statistics.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        if self._algorithm.old_logprobs == "sampled":
            old_logprobs = batch.generator_logprobs
        log_ratio = statistics.logprobs.detach() - old_logprobs
        credit, tau = batch.credit, batch.tau
        if credit is None:
            credit, tau = self._credit(statistics, log_ratio, batch, hidden_states, head_weight)
        mean = None
        if self._algorithm.policy_loss == "sequence_clip":
            mean = response_means(log_ratio, batch, self._cp_group)
        return Signal(statistics, old_logprobs, credit, tau, mean)

    def freeze(self, forward: Callable, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The same with what the policy as it is now says of them, for several updates on them: log-probs and, where it
        is the one whose deviation is scored, that, credit and the reference's log-probs instead of its states.

        forward: `Policy.forward`, whose collectives these are. Elsewhere than on the last stage nothing is added.
        """

        def now(batch: MicroBatch, hidden_states: torch.Tensor, head_weight: torch.Tensor) -> dict:
            statistics = self._statistics(batch, hidden_states, head_weight)
            known: dict[str, torch.Tensor | None] = {"old_logprobs": statistics.logprobs}
            if self._algorithm.kl == "reward":
                known |= {"reference_logprobs": statistics.reference_logprobs, "reference_states": None}
            if self._algorithm.scored_by == "old":
                log_ratio = torch.zeros_like(statistics.logprobs)
                credit, tau = self._credit(statistics, log_ratio, batch, hidden_states, head_weight)
                known |= {"deviation": statistics.deviation, "reference_logprobs": statistics.reference_logprobs}
                known |= {"credit": credit, "tau": tau, "reference_states": None}
            return known

        return with_known(micro_batches, forward(micro_batches, now))

    def response_kl(self, batch: MicroBatch) -> torch.Tensor:
        """[B] float64: Σ_t log π_old(a_t) − log ρ(a_t) over each response, of a micro-batch that is frozen with the
        reference. Collectives: one all-reduce over the context-parallel ranks, where there are several."""
        assert batch.old_logprobs is not None and batch.reference_logprobs is not None
        sampled = self._algorithm.old_logprobs == "sampled"
        old_logprobs = batch.generator_logprobs if sampled else batch.old_logprobs
        return response_sums((old_logprobs - batch.reference_logprobs).double(), batch, self._cp_group)

    def _credit(
        self,
        statistics: TokenStatistics,
        log_ratio: torch.Tensor,
        batch: MicroBatch,
        hidden_states: torch.Tensor,
        head_weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of `token_credit`, and recorded."""
        credit, tau = token_credit(statistics, log_ratio, batch, self._vocab_size, self._algorithm, self._cp_group)
        if self.record is not None:
            square_prob = self._square_prob(statistics, batch, hidden_states, head_weight)
            known = statistics._asdict() | {"log_ratio": log_ratio, "square_prob": square_prob}
            values = {name: known[name].detach() for name in TOKENS if known.get(name) is not None}
            whole = of_whole_responses(torch.stack([*values.values()]), batch, self._cp_group)
            self.record.add(batch, dict(zip(values, whole, strict=True)), credit, tau)
        return credit, tau

    @torch.no_grad()
    def _square_prob(
        self, statistics: TokenStatistics, batch: MicroBatch, hidden_states: torch.Tensor, head_weight: torch.Tensor
    ) -> torch.Tensor:
        """Σ π², [N]: with π' of half the temperature log π'(a) = 2x(a) − lse(2x), so that log Σ π² is 2 log π(a) less
        that. One more product with the head, for who records.
        """
        sharper = token_statistics(
            hidden_states,
            head_weight,
            batch.targets,
            temperature=self._config.rollout.temperature / 2,
            vocab_size=self._vocab_size,
            tp_group=self._tp_group,
        )
        return (2 * statistics.logprobs - sharper.logprobs).exp()

    def _statistics(self, batch: MicroBatch, hidden_states: torch.Tensor, head_weight: torch.Tensor) -> TokenStatistics:
        states = batch.reference_states
        found = token_statistics(
            hidden_states,
            head_weight,
            batch.targets,
            temperature=self._config.rollout.temperature,
            vocab_size=self._vocab_size,
            tp_group=self._tp_group,
            reference_hidden_states=None if states is None else all_rows(states, len(batch.targets), self._tp_group),
            reference_head_weight=None if states is None else self._reference_head,
            alpha=_alpha(self._algorithm),
            check_finite=self._config.run.check_finite,
        )
        if states is None:
            found = found._replace(deviation=batch.deviation, reference_logprobs=batch.reference_logprobs)
        return found


def _alpha(config: Algorithm) -> float | None:
    """`token_statistics` takes KL for the family's end."""
    return {"hellinger2": 0.5, "alpha": config.deviation_alpha, "kl": None}[config.deviation]


def token_credit(
    statistics: TokenStatistics,
    log_ratio: torch.Tensor,
    batch: MicroBatch,
    vocab_size: int,
    config: Algorithm,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weights [M] that redistribute a response's advantage over its tokens, temperatures [B] if each has its own).

    Detached. statistics, log_ratio [N] of policy to old policy: of this rank's N tokens, of the policy that is scored.
    Collectives: one all-reduce of [2, M] (distribution_guided) or [M] (future_kl) float32 over cp_group.
    """
    if config.credit in ("uniform", "none"):
        return statistics.logprobs.new_full((batch.num_response_tokens,), float(config.credit == "uniform")), None
    if config.credit == "future_kl":
        whole = of_whole_responses(log_ratio.detach(), batch, cp_group)
        return future_kl_credit(whole, batch.advantages, batch.cu_responses, config), None
    if statistics.deviation is None:
        raise ValueError("credit needs the reference's states: Reference.attach the micro-batches first")
    values = torch.stack([statistics.deviation, statistics.entropy]).detach()
    deviation, entropy = of_whole_responses(values, batch, cp_group)
    scores = gated_scores(
        deviation,
        entropy,
        batch.cu_responses,
        kappa=config.kappa,
        vocab_size=vocab_size,
        entropy_norm=config.entropy_norm,
    )
    if config.tau_mode == "absolute":
        return credit_weights(scores, batch.cu_responses, config.tau), None
    tau = temperatures_of_share(scores, batch.cu_responses, config.effective_share, config.tau_min)
    return credit_weights(scores, batch.cu_responses, tau), tau


def response_means(values: torch.Tensor, batch: MicroBatch, cp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """[B] means over whole responses of [N] values; 0 of an empty one. Collectives: those of `response_sums`."""
    return response_sums(values, batch, cp_group) / batch.cu_responses.diff().clamp(min=1)


def response_sums(values: torch.Tensor, batch: MicroBatch, cp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """[B] sums over whole responses of [N] values. Collectives: one all-reduce over cp_group of several ranks."""
    sums = values.new_zeros(len(batch)).index_add(0, batch.response_ids, values)
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        dist.all_reduce(sums, group=cp_group)
    return sums


def of_whole_responses(values: torch.Tensor, batch: MicroBatch, cp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """[..., N] of this rank's tokens -> [..., M] of all, in the order of the responses.

    Collectives: one all-reduce over cp_group where there are several ranks.
    """
    if cp_group is None or dist.get_world_size(cp_group) == 1:
        return values
    whole = values.new_zeros(*values.shape[:-1], batch.num_response_tokens)
    whole[..., batch.response_index] = values
    dist.all_reduce(whole, group=cp_group)
    return whole


def policy_objective(
    signal: Signal, batch: MicroBatch, config: Algorithm, max_response_tokens: int = 1
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The loss over the response tokens of a micro-batch that are predicted here: Σ c·ℓ(r, Â) + β·k − bonus·H.

    With Â = A·w, and the teacher's term where there is one. config: resolved (`resolved_algorithm`).
    max_response_tokens: for fixed_length. Returns (loss sum, normaliser, metrics): the loss of an optimizer step is
    Σ loss / Σ normaliser over its micro-batches, data- and context-parallel ranks, and metrics are sums over tokens or
    responses that add up the same way, or largest values, named so. Collectives: none.

    The engine that sampled rounds differently from the trainer, and may have had older weights, so that its policy μ is
    not π_old. The trainer's own log-probs, the old ones or the current where those are the sampler's, tell by how much
    (logprob_gap, the KL estimate, the ratio q and its square); `correction` multiplies a token's policy loss, and
    nothing else, by a weight c for it.
    """
    statistics, old_logprobs, credit = signal[:3]
    logprobs, reference_logprobs = statistics.logprobs, statistics.reference_logprobs
    advantages = batch.advantages[batch.response_ids] * credit[batch.response_index]
    if config.teacher:
        assert reference_logprobs is not None, "the teacher is the reference"
        taught = _teachers_logprobs(reference_logprobs, batch, config) - old_logprobs
        advantages = advantages + config.teacher * taught
    log_ratio = logprobs - old_logprobs
    if signal.mean_log_ratio is not None:
        log_ratio = at_sequence_level(logprobs, signal.mean_log_ratio[batch.response_ids])
    token_loss, clipped_low, clipped_high = LOSSES[config.policy_loss](logprobs, log_ratio, advantages, config)
    trainers = _trainers_logprobs(signal, config)
    ratio = sampler_ratio(trainers, batch.generator_logprobs)
    corrected = torch.zeros_like(clipped_low)
    if config.correction in ("truncate", "mask"):
        weights, corrected = sampler_weights(ratio, config.correction, config.correction_low, config.correction_high)
        token_loss = token_loss * weights
    if config.kl in ("k2", "k3"):
        assert reference_logprobs is not None, "the distance is to the reference"
        token_loss = token_loss + config.kl_coefficient * divergence(logprobs, reference_logprobs, config.kl)
    if config.entropy_bonus:
        token_loss = token_loss - config.entropy_bonus * statistics.entropy
    lengths, how = batch.cu_responses.diff(), config.aggregation
    of_responses = batch.response_ids, lengths, batch.counted
    loss, normaliser = aggregate(token_loss, *of_responses, how, max_response_tokens, batch.counts_responses)
    with torch.no_grad():
        metrics = {
            "tokens": torch.tensor(len(batch.targets), device=loss.device),
            "counted_tokens": batch.counted[batch.response_ids].sum(),
            "responses": torch.tensor(len(batch) * batch.counts_responses, device=loss.device),
            "loss": loss,
            "normaliser": normaliser,
            "clip_low": clipped_low.sum(),
            "clip_high": clipped_high.sum(),
            "corrected": corrected.sum(),
            **_sampler_metrics(trainers - batch.generator_logprobs, ratio),
            **_policy_metrics(statistics),
            **_credit_metrics(signal, batch, config),
        }
    return loss, normaliser, {name: value.detach().float() for name, value in metrics.items()}


def _teachers_logprobs(reference_logprobs: torch.Tensor, batch: MicroBatch, config: Algorithm) -> torch.Tensor:
    """[N]: the reference's, or beyond it as seen from where the student started."""
    if config.teacher_extrapolation == 1:
        return reference_logprobs
    assert batch.start_logprobs is not None, "a teacher is extrapolated from the start: Reference.attach first"
    return torch.lerp(batch.start_logprobs, reference_logprobs, config.teacher_extrapolation)


def _trainers_logprobs(signal: Signal, config: Algorithm) -> torch.Tensor:
    """[N], detached: the trainer's own that the sampler's are compared with."""
    return signal.statistics.logprobs.detach() if config.old_logprobs == "sampled" else signal.old_logprobs


def _gap_by_lag(signal: Signal, batch: MicroBatch, config: Algorithm, most: int) -> dict[str, torch.Tensor]:
    gap = (_trainers_logprobs(signal, config) - batch.generator_logprobs).abs()
    found = {}
    for lag in range(most + 1):
        found[f"tokens_at_lag_{lag}"] = (batch.lags == lag).sum().float()
        found[f"logprob_gap_at_lag_{lag}"] = (gap * (batch.lags == lag)).sum()
    return found


def _sampler_metrics(difference: torch.Tensor, ratio: torch.Tensor) -> dict[str, torch.Tensor]:
    """difference: [N], of the trainer's log-probs and the sampler's."""
    gap = difference.abs()
    return {
        "logprob_gap": gap.sum(),
        LARGEST + "logprob_gap": torch.cat([gap, gap.new_zeros(1)]).max(),
        # Of KL(μ ‖ π_old), unbiased and never negative: r − 1 − log r with r = π_old/μ.
        "rollout_kl": (difference.double().expm1() - difference.double()).sum(),
        "rollout_ratio": ratio.sum(),
        "rollout_ratio_squared": (ratio.double() ** 2).sum(),
    }


def _policy_metrics(statistics: TokenStatistics) -> dict[str, torch.Tensor]:
    found = {"entropy": statistics.entropy.sum()}
    if statistics.deviation is not None:
        found["deviation"] = statistics.deviation.sum()
    if statistics.reference_logprobs is not None:
        found["reference_kl"] = divergence(statistics.logprobs, statistics.reference_logprobs, "k3").double().sum()
    return found


def _credit_metrics(signal: Signal, batch: MicroBatch, config: Algorithm) -> dict[str, torch.Tensor]:
    """Of whole responses: sums where they are this rank's to count, else 0."""
    found = credit_concentration(signal.credit, batch.cu_responses)
    if signal.tau is not None:
        found["log_tau"] = signal.tau.log()
        found["tau_at_bound"] = signal.tau <= config.tau_min * (1 + 1e-6)
    return {name: values.sum() * batch.counts_responses for name, values in found.items()}
