"""The update of one training step: from its groups of responses to optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from megatron_dgpo.algorithm.objective import Objective
from megatron_dgpo.algorithm.outcome import Outcome, step_advantages
from megatron_dgpo.algorithm.passes import Passes
from megatron_dgpo.algorithm.record import file_of_credit
from megatron_dgpo.config import Config
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.model.collectives import all_gathered, broadcast_from_last_stage, from_leader, from_leaders
from megatron_dgpo.model.packed import pack_micro_batches
from megatron_dgpo.model.parallel import data_group, replica
from megatron_dgpo.model.reference import Reference
from megatron_dgpo.rollout.response import Response
from megatron_dgpo.session import Session
from megatron_dgpo.step_metrics import computing, step_metrics
from megatron_dgpo.throughput import FORWARDS_OF_UPDATE

Share = list[list[list[TrainingSequence]]]
"""[optimizer step][micro-batch][sequence] of one replica."""


def update(
    session: Session, objective: Objective, reference: Reference | None, groups: dict[int, list[Response]], step: int
) -> dict[str, float]:
    """`batch.minibatches` optimizer steps on a step's groups; returns its metrics. Collective over all ranks.

    The reference's states, gigabytes of them, are those of one minibatch at a time.
    """
    config, log = session.config, session.log
    passes, kl_in_reward = Passes.from_config(config), config.algorithm.kl == "reward"
    share = shared_out(session, groups, step)
    minibatches = [pack_micro_batches(micro_batches, config.parallel) for micro_batches in share]

    def with_reference(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        with log.phase("reference"):
            return reference.attach(micro_batches) if reference else micro_batches

    if passes.policy_before:
        for number, micro_batches in enumerate(minibatches):
            micro_batches = with_reference(micro_batches) if passes.reference_before else micro_batches
            with log.phase("policy"):
                minibatches[number] = objective.freeze(session.policy.forward, micro_batches)
    metrics = {}
    if kl_in_reward:
        kl = response_kl(objective, share, minibatches)
        metrics["policy/response_kl"] = sum(kl.values()) / len(kl)
        share = shared_out(session, groups, step, kl)
        minibatches = [list(map(with_advantages, *pair)) for pair in zip(minibatches, share, strict=True)]
    results = []
    for number, micro_batches in enumerate(minibatches, 1):
        micro_batches = with_reference(micro_batches) if passes.reference else micro_batches
        with log.phase("policy"):
            results.append(session.step(micro_batches, objective, more=number < len(minibatches)))
    with log.phase("policy"):
        # The optimizer's last kernels are of this phase, not of the push.
        torch.cuda.synchronize()
    sequences = [sequence for parts in share for part in parts for sequence in part]
    if objective.record:
        file = file_of_credit(config.run.dir / "rollouts", step, replica()[0])
        objective.record.write(file, sequences)
    forwards = FORWARDS_OF_UPDATE + passes.policy_before
    if reference:
        forwards += (passes.reference_before + passes.reference) * reference.models
    metrics |= step_metrics([response for group in groups.values() for response in group], step, results)
    return metrics | computing(session.forward_flops(sequences), forwards, sum(result.busy_s for result in results))


def shared_out(
    session: Session, groups: dict[int, list[Response]], step: int, kl: Mapping[tuple[int, int], float] | None = None
) -> Share:
    """This replica's share: its leader's to give, from all replicas' groups. kl: what `Outcome.kl` is, by key.

    An optimizer step's responses are the same whatever the number of replicas; who trains on which goes by length.
    Collectives: one object all-gather over the leaders, one object broadcast over the replica.
    """

    def mine() -> Share:
        config = session.config
        own = {position: training_sequences(config, position, group, step) for position, group in groups.items()}
        found = {position: group for share in all_gathered(own, data_group()) for position, group in share.items()}
        pairs = [pair for position in sorted(found) for pair in found[position]]
        if kl is not None:
            pairs = [(sequence, outcome._replace(kl=kl[sequence.key])) for sequence, outcome in pairs]
        sequences = compared(pairs, config)
        size = len(sequences) // config.batch.minibatches
        parts = [sequences[first : first + size] for first in range(0, len(sequences), size)]
        return [session.shares(part)[replica()[0]] for part in parts]

    return from_leader(mine)


def response_kl(
    objective: Objective, share: Share, minibatches: list[list[MicroBatch]]
) -> dict[tuple[int, int], float]:
    """{key: Σ_t log π_old(a_t) − log ρ(a_t)} of all replicas' responses, whose micro-batches are frozen; on every rank.

    Collectives: those of `Objective.response_kl` for each micro-batch, one object broadcast over the pipeline, and
    those of `from_leaders`.
    """
    found = [
        objective.response_kl(batch).tolist() if batch.old_logprobs is not None else []
        for micro_batches in minibatches
        for batch in micro_batches
    ]
    found = broadcast_from_last_stage(found)
    keys = [[sequence.key for sequence in part] for parts in share for part in parts]
    own = {key: value for part in zip(keys, found, strict=True) for key, value in zip(*part, strict=True)}
    return {key: value for everyones in from_leaders(lambda: own) for key, value in everyones.items()}


def with_advantages(batch: MicroBatch, sequences: list[TrainingSequence]) -> MicroBatch:
    """The same with the sequences' advantages, and whether they count."""
    return replace(
        batch,
        advantages=batch.advantages.new_tensor([sequence.advantage for sequence in sequences]),
        counted=batch.counted.new_tensor([sequence.counted for sequence in sequences]),
    )


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
