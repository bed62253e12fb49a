"""The loop: every rank runs `train`, from prompts to updated weights in the servers.

prompts -> responses (vLLM) -> rewards -> advantages -> reference -> policy update -> weights to the servers
"""

from __future__ import annotations

import contextlib

from megatron_dgpo.algorithm.objective import Objective
from megatron_dgpo.algorithm.record import CreditRecord
from megatron_dgpo.config import Config
from megatron_dgpo.data import end_tokens, load_prompts, load_tokenizer
from megatron_dgpo.evaluation import evaluate, load_sets
from megatron_dgpo.manifest import Progress
from megatron_dgpo.model.parallel import (
    context_group,
    context_place,
    tensor_group,
    tensor_place,
)
from megatron_dgpo.model.reference import Reference
from megatron_dgpo.pace import Pace
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.source import RolloutSource
from megatron_dgpo.session import Session, world
from megatron_dgpo.step_metrics import Warnings
from megatron_dgpo.trace import traced
from megatron_dgpo.update import update
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
            stopped, saves = pace.after_step(step, last, session.writing_beside_s)
            if saves:
                session.save(progress)
            if oldest := session.completed(wait=stopped or last):
                rollouts.forget(oldest)
        if not stopped:
            session.export()
        return not stopped
