"""What a training step reports: metrics of its responses and updates, and what a user should be told of them."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable

from megatron_dgpo.algorithm.resolve import uncorrected, without_effect
from megatron_dgpo.config import Config
from megatron_dgpo.metrics import MetricsLog
from megatron_dgpo.model import device
from megatron_dgpo.model.collectives import all_gathered, from_leader
from megatron_dgpo.model.parallel import data_group, replica
from megatron_dgpo.model.policy import LARGEST, StepResult
from megatron_dgpo.rollout.response import Response

# Mean |log-prob of the trainer - of the servers| of a sampled token: bfloat16 alone stays well below it.
_WIDE_GAP = 0.05
# Of tokens: below it the sampled ones say less of the policy that they train than half as many of its own would.
_FEW_EFFECTIVE = 0.5
# Steps in a row, and the part of them, in which one side waited for the other, that are worth a word.
_RECENT, _LONG_WAIT = 5, 0.1
# Of the median replica's speed: one that is last and slower than this has not just got more to do.
_SLOW = 0.8


def step_metrics(responses: list[Response], step: int, results: list[StepResult]) -> dict[str, float]:
    """Of one step: its responses over all replicas, and its optimizer steps; the same on every rank but peak memory.

    responses: of this replica, on its leader. Collectives: one object all-gather over the leaders, one object
    broadcast over the replica.
    """
    return {
        **from_leader(lambda: _response_metrics(responses, step)),
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
    for name in ("entropy", "deviation", "reference_kl", "clip_low", "clip_high"):
        if name in sums:
            metrics[f"policy/{name}"] = sums[name] / tokens
    gaps = _gap_by_lag(sums)
    metrics |= {f"policy/logprob_gap_at_lag_{lag}": gap for lag, gap in gaps.items()}
    if not gaps or 0 in gaps:
        # Of rounding alone: where some weights that sampled were older, of the tokens of the others.
        metrics["policy/rollout_logprob_gap"] = gaps.get(0, sums["logprob_gap"] / tokens)
    # KL(sampler ‖ trainer) in nats a token, and the most that either gave a token over the other.
    metrics["policy/rollout_kl"] = sums["rollout_kl"] / tokens
    metrics["policy/rollout_ratio_max"] = math.exp(min(sums[LARGEST + "logprob_gap"], 700.0))
    # Ratios q of trainer to sampler: their mean, what share of the tokens' number they are worth, (Σq)²/(N·Σq²), and
    # the share of tokens whose weight algorithm.correction cut off.
    ratios, squares = sums["rollout_ratio"], sums["rollout_ratio_squared"]
    metrics["policy/rollout_ratio_mean"] = ratios / tokens
    metrics["policy/rollout_effective_share"] = ratios**2 / max(tokens * squares, 1e-30)
    metrics["policy/corrected_share"] = sums["corrected"] / tokens
    metrics["policy/counted_share"] = sums["counted_tokens"] / tokens
    for name in ("effective_share", "max_weight", "top1_share", "top10_share"):
        metrics[f"credit/{name}"] = sums[name] / responses
    if "log_tau" in sums:
        metrics["credit/tau"] = math.exp(sums["log_tau"] / responses)
        metrics["credit/tau_at_bound"] = sums["tau_at_bound"] / responses
    return metrics


def _gap_by_lag(sums: dict[str, float]) -> dict[int, float]:
    lags = [int(name.removeprefix("tokens_at_lag_")) for name in sums if name.startswith("tokens_at_lag_")]
    return {n: sums[f"logprob_gap_at_lag_{n}"] / count for n in lags if (count := sums[f"tokens_at_lag_{n}"])}


def _response_metrics(responses: list[Response], step: int) -> dict[str, float]:
    sums = (
        len(responses),
        sum(r.reward for r in responses),
        sum(r.correct for r in responses),
        sum(len(r.token_ids) for r in responses),
        sum(r.finish_reason == "length" for r in responses),
        sum(r.failure is not None for r in responses),
    )
    shares = all_gathered((sums, _tokens_by_lag(responses, step), _sums_of_rewards(responses)), data_group())
    count, reward, correct, tokens, cut, failed = map(sum, zip(*(sums for sums, *_ in shares), strict=True))
    lags: Counter[int] = sum((lags for _, lags, _ in shares), Counter())
    names = dict.fromkeys(name for *_, rewards in shares for name in rewards)
    return {
        "rollout/reward": reward / count,
        **{f"rollout/reward/{name}": sum(found.get(name, 0.0) for *_, found in shares) / count for name in names},
        "rollout/accuracy": correct / count,
        "rollout/response_length": tokens / count,
        "rollout/tokens": float(tokens),
        "rollout/cut_off_share": cut / count,
        "rollout/grader_failures": float(failed),
        "rollout/staleness_mean": sum(lag * number for lag, number in lags.items()) / max(tokens, 1),
        "rollout/staleness_max": float(max(lags, default=0)),
        **{
            f"rollout/tokens_at_lag_{lag}": number / max(tokens, 1) for lag, number in sorted(lags.items()) if any(lags)
        },
    }


def _sums_of_rewards(responses: list[Response]) -> dict[str, float]:
    """Of several rewards."""
    names = responses[0].components if responses else ()
    return {name: sum(response.components[name] for response in responses) for name in names}


def _tokens_by_lag(responses: list[Response], step: int) -> Counter[int]:
    """{versions that the weights were behind those that the step trains: tokens}"""
    return Counter(lag for response in responses for lag in response.lags(step - 1))


def computing(forward_flops: int, passes: int, busy_s: float) -> dict[str, float]:
    """Of one step: the model's operations in all replicas, and which replica the others waited for, with its speed.

    forward_flops: of one pass over this replica's sequences. passes: how many of them the step needs. busy_s: of
    `StepResult`, over the optimizer steps. Collectives: one object all-gather over all ranks.
    """
    # By the first rank of each: a slow one holds up the others of its replica.
    first: dict[int, int] = {}
    work: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for rank, (number, flops, busy) in enumerate(all_gathered((replica()[0], forward_flops, busy_s))):
        leader = first.setdefault(number, rank)
        work[leader], seconds[leader] = flops, max(seconds.get(leader, 0.0), busy)
    metrics = {"policy/model_tflop": passes * sum(work.values()) / 1e12}
    if len(work) > 1 and all(work.values()):
        last = max(seconds, key=seconds.__getitem__)
        # The faster one's of two.
        usual = statistics.median_high(work[rank] / seconds[rank] for rank in work)
        metrics |= {"policy/slowest_rank": float(last), "policy/slowest_rank_speed": work[last] / seconds[last] / usual}
    return metrics


class Warnings:
    """What is wrong with a run though it goes on, each said once; at the start, settings that do nothing or harm."""

    def __init__(self, log: MetricsLog, config: Config) -> None:
        self._log, self._algorithm = log, config.algorithm
        self._said: set[str] = set()
        self._latest: deque[dict[str, float]] = deque(maxlen=_RECENT)
        for text in (*without_effect(config), uncorrected(config)):
            if text:
                log.warn(text)

    def look(self, metrics: dict[str, float]) -> None:
        """At the metrics of a step."""
        self._latest.append(metrics)
        looks: list[Callable[[dict[str, float]], str | None]] = [_other_sampler, _few_effective]
        looks += [self._waiting, self._straggling]
        if self._algorithm.credit == "distribution_guided" and self._algorithm.tau_mode == "absolute":
            looks.append(_degenerate_credit)
        for look in looks:
            text, kind = look(metrics), look.__name__
            if text and kind not in self._said:
                self._said.add(kind)
                self._log.warn(text)

    def _waiting(self, _: dict[str, float]) -> str | None:
        """One side that waits for the other, step after step, where both run at a time."""
        if len(self._latest) < _RECENT or "rollout/finished_ahead" not in self._latest[-1]:
            return None
        waits, ahead = (
            sum(metrics[name] for metrics in self._latest) / _RECENT
            for name in ("rollout/wait_share", "rollout/finished_ahead")
        )
        if waits > _LONG_WAIT:
            return (
                f"the ranks wait for the servers {waits:.0%} of the time (rollout/wait_share): more servers, or a "
                "larger rollout.max_staleness, would shorten a step"
            )
        if ahead > 1 - _LONG_WAIT:
            return (
                "the servers wait for the ranks: all that rollout.max_staleness allows was finished when a step began "
                "(rollout/finished_ahead); fewer servers, or a smaller rollout.max_staleness, would do"
            )
        return None

    def _straggling(self, _: dict[str, float]) -> str | None:
        """One replica that all others wait for, step after step, though its work is no more than theirs."""
        speeds = [metrics.get("policy/slowest_rank_speed", 1.0) for metrics in self._latest]
        if len(speeds) < _RECENT or max(speeds) > _SLOW:
            return None
        ranks = {metrics["policy/slowest_rank"] for metrics in self._latest}
        if len(ranks) > 1:
            return None
        return (
            f"the replica that begins with rank {int(ranks.pop())} computes at {sum(speeds) / _RECENT:.0%} of the "
            "others' speed, and they wait for it (policy/slowest_rank_speed): look at the clocks and temperatures of "
            "its GPUs, and at what else runs on its machines"
        )


def _degenerate_credit(metrics: dict[str, float]) -> str | None:
    """Weights that have become uniform, or one token's. At π = ρ they are uniform by definition."""
    share = metrics["credit/effective_share"]
    if metrics.get("policy/deviation", 0.0) < 1e-3:
        return None
    if share > 0.9999:
        return "credit weights are all but uniform (as in GRPO): lower algorithm.tau"
    if share * metrics["rollout/response_length"] < 1.5:
        return "one token of each response takes nearly all credit: raise algorithm.tau"
    return None


def _other_sampler(metrics: dict[str, float]) -> str | None:
    """Servers that compute another policy than the trainer."""
    gap = metrics.get("policy/rollout_logprob_gap", 0.0)
    if gap <= _WIDE_GAP:
        return None
    return (
        f"log-probs of the sampled tokens are {gap:.3g} from the trainer's on average "
        f"(policy/rollout_logprob_gap, at most {_WIDE_GAP:g} is usual in bfloat16): the update takes both for "
        "one policy; see policy/rollout_kl and policy/rollout_ratio_max, or set servers.dtype and model.dtype "
        "to float32 to see where it comes from"
    )


def _few_effective(metrics: dict[str, float]) -> str | None:
    """Tokens that the policy they train would seldom have sampled."""
    share = metrics["policy/rollout_effective_share"]
    if share >= _FEW_EFFECTIVE:
        return None
    return (
        f"the sampled tokens are worth {share:.0%} of as many from the policy that they train "
        "(policy/rollout_effective_share): lower rollout.max_staleness or optimizer.lr"
    )
