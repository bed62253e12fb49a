"""The loop: every rank runs `train`, from prompts to updated weights in the servers.

prompts -> responses (vLLM) -> rewards -> advantages -> reference -> policy update -> weights to the servers
"""

from __future__ import annotations

import math

import torch
from megatron.core import parallel_state

from megatron_dgpo import stop
from megatron_dgpo.algorithm.advantages import group_advantages
from megatron_dgpo.algorithm.objective import LARGEST, policy_objective, token_credit
from megatron_dgpo.batch import Batch
from megatron_dgpo.config import Config
from megatron_dgpo.data import PromptOrder, load_prompts
from megatron_dgpo.evaluation import evaluate
from megatron_dgpo.experience import Scored
from megatron_dgpo.manifest import Progress
from megatron_dgpo.model import device
from megatron_dgpo.model.policy import StepResult
from megatron_dgpo.model.reference import Reference
from megatron_dgpo.session import Session
from megatron_dgpo.statistics import token_statistics

# Mean |log-prob of the trainer - of the servers| of a sampled token: bfloat16 alone stays well below it.
_WIDE_GAP = 0.05


def train(config: Config) -> bool:
    """Run or continue the training run of `run.dir`; False if it was asked to stop before its last step.

    Collective: called by every rank.
    """
    with Session(config, "train", config.run.steps * config.batch.minibatches) as session:
        log = session.log
        problems = load_prompts(config, config.data.train, "data.train", session.tokenizer)
        held_out = load_prompts(config, config.data.eval, "data.eval", session.tokenizer) if config.data.eval else []
        order = PromptOrder(len(problems), config.run.seed, config.data.shuffle)
        reference = Reference(config, session.architecture) if config.algorithm.credit != "uniform" else None
        updates = Updates(session, reference)
        progress = session.restore()
        log.start(progress.step, config.run.steps)
        session.push_weights(progress.weight_version, problems)
        if progress.step == 0:
            log.write(0, evaluate(session, held_out, 0))
        stopped = stop.asked()
        while progress.step < config.run.steps and not stopped:
            step, last = progress.step + 1, progress.step + 1 == config.run.steps
            with log.phase("rollout"):
                rows = order.take(progress.prompts, config.rollout.prompts_per_step)
                scored = session.experience.sample([problems[row] for row in rows], step)
                session.rest_servers()
            metrics = updates.make(scored)
            with log.phase("weights"):
                metrics |= session.push_weights(step, problems)
            progress = Progress(step, progress.prompts + config.rollout.prompts_per_step, step)
            if last or (config.eval.every and step % config.eval.every == 0):
                with log.phase("eval"):
                    metrics |= evaluate(session, held_out, step)
            # Written before the checkpoint: a kill between the two repeats the step, and its row is replaced.
            log.write(step, metrics)
            stopped = stop.asked() and not last
            if last or stopped or step % config.checkpoint.every == 0:
                with log.phase("checkpoint"):
                    session.save(progress)
        if not stopped:
            session.export()
        return not stopped


class Updates:
    """Turns a step's scored samples into `batch.minibatches` optimizer steps."""

    def __init__(self, session: Session, reference: Reference | None) -> None:
        self._session, self._reference = session, reference
        self._policy, self._config = session.policy, session.config
        self._warned = False
        self._warned_of_sampler = False

    def make(self, scored: list[Scored]) -> dict[str, float]:
        """Update the policy; returns the step's metrics, the same on every rank. Collective over all ranks."""
        micro_batches = self._batch(scored).split(self._config.batch.micro_batch_size)
        log = self._session.log
        with log.phase("reference"):
            reference_states = self._reference.hidden_states(micro_batches) if self._reference else []
        with log.phase("policy"):
            results = self._step_through(micro_batches, reference_states)
        metrics = {
            **_sample_metrics(scored),
            **_policy_metrics(_totals(results)),
            "policy/grad_norm": sum(r.grad_norm for r in results) / len(results),
            "policy/lr": results[-1].lr,
            "policy/skipped_steps": float(sum(r.skipped for r in results)),
            "memory/peak_gib": device.peak_memory_bytes() / 2**30,
        }
        self._warn_of_degenerate_credit(metrics)
        self._warn_of_other_sampler(metrics)
        return metrics

    def _step_through(self, micro_batches: list[Batch], reference_states: list) -> list[StepResult]:
        config = self._config
        # With one optimizer step the policy that sampled is the one that is updated: nothing to compute twice.
        many = config.batch.minibatches > 1
        sampling = self._policy.forward(micro_batches, self._sampling_policy(reference_states)) if many else []
        share = len(micro_batches) // config.batch.minibatches
        results = []
        for first in range(0, len(micro_batches), share):
            part = slice(first, first + share)
            loss = self._loss(reference_states[part], sampling[part])
            more = part.stop < len(micro_batches)
            results.append(self._session.step(micro_batches[part], loss, more))
        return results

    def _batch(self, scored: list[Scored]) -> Batch:
        algorithm = self._config.algorithm
        rewards = torch.tensor([s.reward for s in scored], dtype=torch.float64)
        advantages = group_advantages(
            rewards, self._config.rollout.group_size, algorithm.advantage, algorithm.advantage_eps
        )
        return self._session.make_batch(
            [s.sample.prompt.token_ids for s in scored],
            [s.sample.token_ids for s in scored],
            advantages.tolist(),
            [s.sample.logprobs for s in scored],
        )

    def _statistics(self, batch, hidden_states, head_weight, reference_states):
        return token_statistics(
            hidden_states,
            head_weight,
            batch.targets,
            temperature=self._config.rollout.temperature,
            vocab_size=self._session.architecture.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            reference_hidden_states=reference_states,
            reference_head_weight=self._reference.head_weight if self._reference else None,
            check_finite=self._config.run.check_finite,
        )

    def _credit(self, statistics, batch) -> torch.Tensor:
        return token_credit(statistics, batch.cu_seqlens, self._session.architecture.vocab_size, self._config.algorithm)

    def _sampling_policy(self, reference_states: list):
        """Log-probs and credit weights before the first update, [N] each, of every micro-batch."""

        def compute(batch, index, hidden_states, head_weight):
            states = reference_states[index] if reference_states else None
            statistics = self._statistics(batch, hidden_states, head_weight, states)
            return statistics.logprobs, self._credit(statistics, batch)

        return compute

    def _loss(self, reference_states: list, sampling: list):
        algorithm = self._config.algorithm

        def loss(batch, index, hidden_states, head_weight):
            states = reference_states[index] if reference_states else None
            statistics = self._statistics(batch, hidden_states, head_weight, states)
            old_logprobs, weights = sampling[index] if sampling else (statistics.logprobs.detach(), None)
            if weights is None or algorithm.scored_by == "current":
                weights = self._credit(statistics, batch)
            return policy_objective(statistics, batch, weights, old_logprobs, algorithm)

        return loss

    def _warn_of_degenerate_credit(self, metrics: dict[str, float]) -> None:
        """Say once that the weights have become uniform, or one token's. At π = ρ they are uniform by definition."""
        share = metrics["credit/effective_share"]
        if self._warned or metrics.get("policy/hellinger2", 0.0) < 1e-3:
            return
        if share > 0.9999:
            self._session.log.warn("credit weights are all but uniform (as in GRPO): lower algorithm.tau")
        elif share * metrics["rollout/response_length"] < 1.5:
            self._session.log.warn("one token of each response takes nearly all credit: raise algorithm.tau")
        else:
            return
        self._warned = True

    def _warn_of_other_sampler(self, metrics: dict[str, float]) -> None:
        """Say once that the servers compute another policy than the trainer; nothing corrects for it yet."""
        gap = metrics["policy/rollout_logprob_gap"]
        if gap > _WIDE_GAP and not self._warned_of_sampler:
            self._warned_of_sampler = True
            self._session.log.warn(
                f"log-probs of the sampled tokens are {gap:.3g} from the trainer's on average "
                f"(policy/rollout_logprob_gap, at most {_WIDE_GAP:g} is usual in bfloat16): the update takes both for "
                "one policy; see policy/rollout_kl and policy/rollout_ratio_max, or set rollout.dtype and model.dtype "
                "to float32 to see where it comes from"
            )


def _totals(results: list[StepResult]) -> dict[str, float]:
    """Of all optimizer steps: sums, and maxima of what is named so."""
    totals: dict[str, float] = {}
    for result in results:
        for name, value in result.metrics.items():
            held = totals.get(name, 0.0)
            totals[name] = max(held, value) if name.startswith(LARGEST) else held + value
    return totals


def _sample_metrics(scored: list[Scored]) -> dict[str, float]:
    """Of this step's samples over all replicas. Collectives: one all-reduce over data-parallel ranks."""
    lengths = [len(s.sample.token_ids) for s in scored]
    sums = torch.tensor(
        [
            len(scored),
            sum(s.reward for s in scored),
            sum(s.correct for s in scored),
            sum(lengths),
            sum(s.sample.finish_reason == "length" for s in scored),
            sum(s.failure is not None for s in scored),
        ],
        dtype=torch.float64,
        device=torch.cuda.current_device(),
    )
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    count, reward, correct, tokens, cut, failed = sums.tolist()
    return {
        "rollout/reward": reward / count,
        "rollout/accuracy": correct / count,
        "rollout/response_length": tokens / count,
        "rollout/tokens": tokens,
        "rollout/cut_off_share": cut / count,
        "rollout/grader_failures": failed,
        "rollout/weight_version": float(scored[0].sample.weight_version),
    }


def _policy_metrics(totals: dict[str, float]) -> dict[str, float]:
    """Means over tokens or responses from their sums."""
    tokens, responses = max(totals["tokens"], 1.0), max(totals["responses"], 1.0)
    metrics = {"policy/loss": totals["loss"] / max(totals["normaliser"], 1.0)}
    for name in ("entropy", "hellinger2", "clip_low", "clip_high"):
        if name in totals:
            metrics[f"policy/{name}"] = totals[name] / tokens
    metrics["policy/rollout_logprob_gap"] = totals["logprob_gap"] / tokens
    # KL(sampler ‖ trainer) in nats a token, and the most that either gave a token over the other.
    metrics["policy/rollout_kl"] = totals["rollout_kl"] / tokens
    metrics["policy/rollout_ratio_max"] = math.exp(min(totals[LARGEST + "logprob_gap"], 700.0))
    for name in ("effective_share", "max_weight", "top1_share", "top10_share"):
        metrics[f"credit/{name}"] = totals[name] / responses
    return metrics
