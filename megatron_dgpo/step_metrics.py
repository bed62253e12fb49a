"""What a training step reports: metrics of its responses and updates, and what a user should be told of them."""

from __future__ import annotations

import math

import torch

from megatron_dgpo.algorithm.objective import LARGEST
from megatron_dgpo.metrics import MetricsLog
from megatron_dgpo.model import device
from megatron_dgpo.model.parallel import data_group
from megatron_dgpo.model.policy import StepResult
from megatron_dgpo.rollout.response import Response

# Mean |log-prob of the trainer - of the servers| of a sampled token: bfloat16 alone stays well below it.
_WIDE_GAP = 0.05


def step_metrics(responses: list[Response], results: list[StepResult]) -> dict[str, float]:
    """Of one step: its responses over all replicas, and its optimizer steps; the same on every rank but peak memory.

    Collectives: one all-reduce over data-parallel ranks.
    """
    return {
        **_response_metrics(responses),
        **policy_metrics(totals(results)),
        "policy/grad_norm": sum(r.grad_norm for r in results) / len(results),
        "policy/lr": results[-1].lr,
        "policy/skipped_steps": float(sum(r.skipped for r in results)),
        "memory/peak_gib": device.peak_memory_bytes() / 2**30,
    }


def totals(results: list[StepResult]) -> dict[str, float]:
    """Of all optimizer steps: sums, and maxima of what is named so."""
    found: dict[str, float] = {}
    for result in results:
        for name, value in result.metrics.items():
            held = found.get(name, 0.0)
            found[name] = max(held, value) if name.startswith(LARGEST) else held + value
    return found


def policy_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over tokens or responses from their sums."""
    tokens, responses = max(sums["tokens"], 1.0), max(sums["responses"], 1.0)
    metrics = {"policy/loss": sums["loss"] / max(sums["normaliser"], 1.0)}
    for name in ("entropy", "hellinger2", "clip_low", "clip_high"):
        if name in sums:
            metrics[f"policy/{name}"] = sums[name] / tokens
    metrics["policy/rollout_logprob_gap"] = sums["logprob_gap"] / tokens
    # KL(sampler ‖ trainer) in nats a token, and the most that either gave a token over the other.
    metrics["policy/rollout_kl"] = sums["rollout_kl"] / tokens
    metrics["policy/rollout_ratio_max"] = math.exp(min(sums[LARGEST + "logprob_gap"], 700.0))
    for name in ("effective_share", "max_weight", "top1_share", "top10_share"):
        metrics[f"credit/{name}"] = sums[name] / responses
    return metrics


def _response_metrics(responses: list[Response]) -> dict[str, float]:
    sums = torch.tensor(
        [
            len(responses),
            sum(r.reward for r in responses),
            sum(r.correct for r in responses),
            sum(len(r.token_ids) for r in responses),
            sum(r.finish_reason == "length" for r in responses),
            sum(r.failure is not None for r in responses),
        ],
        dtype=torch.float64,
        device=torch.cuda.current_device(),
    )
    torch.distributed.all_reduce(sums, group=data_group())
    count, reward, correct, tokens, cut, failed = sums.tolist()
    return {
        "rollout/reward": reward / count,
        "rollout/accuracy": correct / count,
        "rollout/response_length": tokens / count,
        "rollout/tokens": tokens,
        "rollout/cut_off_share": cut / count,
        "rollout/grader_failures": failed,
        "rollout/weight_version": float(responses[0].weight_version),
    }


class Warnings:
    """What is wrong with a run though it goes on, each said once."""

    def __init__(self, log: MetricsLog) -> None:
        self._log = log
        self._said: set[str] = set()

    def look(self, metrics: dict[str, float]) -> None:
        """At the metrics of a step."""
        for kind, text in (("credit", _degenerate_credit(metrics)), ("sampler", _other_sampler(metrics))):
            if text and kind not in self._said:
                self._said.add(kind)
                self._log.warn(text)


def _degenerate_credit(metrics: dict[str, float]) -> str | None:
    """Weights that have become uniform, or one token's. At π = ρ they are uniform by definition."""
    share = metrics["credit/effective_share"]
    if metrics.get("policy/hellinger2", 0.0) < 1e-3:
        return None
    if share > 0.9999:
        return "credit weights are all but uniform (as in GRPO): lower algorithm.tau"
    if share * metrics["rollout/response_length"] < 1.5:
        return "one token of each response takes nearly all credit: raise algorithm.tau"
    return None


def _other_sampler(metrics: dict[str, float]) -> str | None:
    """Servers that compute another policy than the trainer; nothing corrects for it yet."""
    gap = metrics["policy/rollout_logprob_gap"]
    if gap <= _WIDE_GAP:
        return None
    return (
        f"log-probs of the sampled tokens are {gap:.3g} from the trainer's on average "
        f"(policy/rollout_logprob_gap, at most {_WIDE_GAP:g} is usual in bfloat16): the update takes both for "
        "one policy; see policy/rollout_kl and policy/rollout_ratio_max, or set servers.dtype and model.dtype "
        "to float32 to see where it comes from"
    )
