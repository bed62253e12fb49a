"""The loop: every rank runs `train`, from prompts to updated weights in the servers.

prompts -> responses (vLLM) -> rewards -> advantages -> reference -> policy update -> weights to the servers
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from megatron_dgpo.algorithm.objective import Objective
from megatron_dgpo.algorithm.outcome import Outcome, step_advantages
from megatron_dgpo.algorithm.record import CreditRecord, file_of_credit
from megatron_dgpo.algorithm.resolve import resolved_algorithm
from megatron_dgpo.config import Config
from megatron_dgpo.data import end_tokens, load_prompts, load_tokenizer
from megatron_dgpo.evaluation import evaluate, load_sets
from megatron_dgpo.manifest import Progress
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.model.collectives import all_gathered, from_leader
from megatron_dgpo.model.packed import pack_micro_batches
from megatron_dgpo.model.parallel import (
    context_group,
    context_place,
    data_group,
    replica,
    tensor_group,
    tensor_place,
)
from megatron_dgpo.model.reference import Reference
from megatron_dgpo.pace import Pace
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.response import Response
from megatron_dgpo.rollout.source import RolloutSource
from megatron_dgpo.session import Session, world
from megatron_dgpo.step_metrics import Warnings, computing, step_metrics
from megatron_dgpo.throughput import FORWARDS_OF_UPDATE
from megatron_dgpo.trace import traced
from megatron_dgpo.weight_sync.sync import ServerSleep, WeightSync


def train(config: Config) -> bool:
    """Run or continue the training run of `run.dir`; False if it was asked to stop before its last step.

    Collective: called by every rank.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(world(config))
        tokenizer = load_tokenizer(config.model.path)
        problems = load_prompts(config, config.data.train, "data.train", tokenizer)
        held_out = load_sets(config, tokenizer)
        ends = end_tokens(config.model.path, tokenizer)
        engines = Engines.of_run(config, ends)
        sleep = ServerSleep(config, engines)
        sleep.begin()
        session = stack.enter_context(Session(config, "train", config.run.steps * config.batch.minibatches))
        log = session.log
        weight_sync = stack.enter_context(WeightSync(config, engines, sleep, session.policy, problems))
        rollouts = stack.enter_context(RolloutSource(config, ends, tokenizer, weight_sync, problems))
        reference = None
        if config.needs_reference:
            with log.startup("loading the reference"):
                reference = Reference(config, session.architecture)
        objective = Objective(
            config,
            session.architecture.vocab_size,
            reference.head_weight if reference else None,
            tensor_group(),
            context_group(),
            CreditRecord(tensor_place()[0] == context_place()[0] == 0) if config.rollout.record else None,
        )
        progress = session.begin(config.run.steps)
        warnings = Warnings(log, config)
        rollouts.begin(log.warn)
        with log.startup("waiting for the servers, which get the policy's weights"):
            weight_sync.push(progress.weight_version)
        if progress.step == 0:
            with log.phase("eval"):
                metrics = evaluate(config, rollouts, held_out, progress)
            log.write(0, metrics)
        pace = Pace(config.checkpoint)
        stopped = pace.stopped()
        while progress.step < config.run.steps and not stopped:
            step, last = progress.step + 1, progress.step + 1 == config.run.steps
            with traced(config.run, step):
                with log.phase("rollout"):
                    taken = rollouts.take(progress)
                    sleep.begin()
                metrics = update(session, objective, reference, taken.groups, step) | rollouts.metrics()
                with log.phase("weights"):
                    metrics |= weight_sync.push(step)
            warnings.look(metrics)
            progress = Progress(step, taken.next_position, step)
            rollouts.proceed(progress)
            if last or (config.eval.every and step % config.eval.every == 0):
                with log.phase("eval"):
                    metrics |= evaluate(config, rollouts, held_out, progress)
            # Written before the checkpoint: a kill between the two repeats the step, and its row is replaced.
            log.write(step, metrics)
            stopped, saves = pace.after_step(step, last)
            if saves:
                session.save(progress)
            if oldest := session.completed(wait=stopped or last):
                rollouts.forget(oldest)
        if not stopped:
            session.export()
        return not stopped


def update(
    session: Session, objective: Objective, reference: Reference | None, groups: dict[int, list[Response]], step: int
) -> dict[str, float]:
    """`batch.minibatches` optimizer steps on a step's groups; returns its metrics. Collective over all ranks.

    The reference's states, gigabytes of them, are those of one minibatch at a time.
    """
    config, log = session.config, session.log
    algorithm = resolved_algorithm(config)
    shares = shared_out(session, groups, step)
    minibatches = [pack_micro_batches(micro_batches, config.parallel) for micro_batches in shares]
    several = len(minibatches) > 1
    # By the policy as it is before the first update, which then needs the reference, and none after it.
    scored_before = several and algorithm.scored_by == "old"

    def with_reference(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        with log.phase("reference"):
            return reference.attach(micro_batches) if reference else micro_batches

    frozen = scored_before or (several and algorithm.old_logprobs == "recomputed")
    if frozen:
        # With one optimizer step the policy that sampled is the one that is updated: nothing to compute twice.
        for number, micro_batches in enumerate(minibatches):
            micro_batches = with_reference(micro_batches) if scored_before else micro_batches
            with log.phase("policy"):
                minibatches[number] = objective.freeze(session.policy.forward, micro_batches)
    results = []
    for number, micro_batches in enumerate(minibatches, 1):
        micro_batches = micro_batches if scored_before else with_reference(micro_batches)
        with log.phase("policy"):
            results.append(session.step(micro_batches, objective, more=number < len(minibatches)))
    with log.phase("policy"):
        # The optimizer's last kernels are of this phase, not of the push.
        torch.cuda.synchronize()
    sequences = [sequence for share in shares for part in share for sequence in part]
    if objective.record:
        file = file_of_credit(config.run.dir / "rollouts", step, replica()[0])
        objective.record.write(file, sequences)
    metrics = step_metrics([response for group in groups.values() for response in group], step, results)
    passes = FORWARDS_OF_UPDATE + (reference is not None) + frozen
    return metrics | computing(session.forward_flops(sequences), passes, sum(result.busy_s for result in results))


def shared_out(session: Session, groups: dict[int, list[Response]], step: int) -> list[list[list[TrainingSequence]]]:
    """[optimizer step][micro-batch][sequence] of this replica: its leader's to give, from all replicas' groups.

    An optimizer step's responses are the same whatever the number of replicas; who trains on which goes by length.
    Collectives: one object all-gather over the leaders, one object broadcast over the replica.
    """

    def mine() -> list[list[list[TrainingSequence]]]:
        config = session.config
        own = {position: training_sequences(config, position, group, step) for position, group in groups.items()}
        found = {position: group for share in all_gathered(own, data_group()) for position, group in share.items()}
        sequences = compared([pair for position in sorted(found) for pair in found[position]], config)
        size = len(sequences) // config.batch.minibatches
        parts = [sequences[first : first + size] for first in range(0, len(sequences), size)]
        return [session.shares(part)[replica()[0]] for part in parts]

    return from_leader(mine)


def compared(step: list[tuple[TrainingSequence, Outcome]], config: Config) -> list[TrainingSequence]:
    """All of a step's sequences with their advantages, and whether they count."""
    advantages, counted = step_advantages([outcome for _, outcome in step], config)
    rows = zip(step, advantages.tolist(), counted.tolist(), strict=True)
    return [replace(sequence, advantage=advantage, counted=counts) for (sequence, _), advantage, counts in rows]


def training_sequences(
    config: Config, position: int, responses: list[Response], step: int
) -> list[tuple[TrainingSequence, Outcome]]:
    """The responses of one group, each without an advantage yet, and what came of it."""
    return [
        (
            TrainingSequence.of(
                r.prompt.token_ids, r.token_ids, 0.0, r.logprobs, True, r.lags(step - 1), (position, place)
            ),
            Outcome(
                r.reward,
                tuple(r.components[name] for name in config.reward.weights),
                r.correct,
                len(r.token_ids),
                r.finish_reason == "length",
            ),
        )
        for place, r in enumerate(responses)
    ]
