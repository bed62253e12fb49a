"""The loop: every rank runs `train`, from prompts to updated weights in the servers.

prompts -> responses (vLLM) -> rewards -> advantages -> reference -> policy update -> weights to the servers
"""

from __future__ import annotations

import contextlib

import torch

from megatron_dgpo import stop
from megatron_dgpo.algorithm.advantages import group_advantages
from megatron_dgpo.algorithm.objective import Objective
from megatron_dgpo.config import Config
from megatron_dgpo.data import PromptOrder, end_tokens, load_prompts, load_tokenizer
from megatron_dgpo.evaluation import evaluate
from megatron_dgpo.manifest import Progress
from megatron_dgpo.model.parallel import tensor_group
from megatron_dgpo.model.reference import Reference
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.response import Response
from megatron_dgpo.rollout.source import RolloutSource
from megatron_dgpo.session import Session, world
from megatron_dgpo.step_metrics import Warnings, step_metrics
from megatron_dgpo.weight_sync.sync import ServerSleep, WeightSync


def train(config: Config) -> bool:
    """Run or continue the training run of `run.dir`; False if it was asked to stop before its last step.

    Collective: called by every rank.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(world(config))
        tokenizer = load_tokenizer(config.model.path)
        problems = load_prompts(config, config.data.train, "data.train", tokenizer)
        held_out = load_prompts(config, config.data.eval, "data.eval", tokenizer) if config.data.eval else []
        engines = Engines.of_run(config, end_tokens(config.model.path, tokenizer))
        sleep = ServerSleep(config, engines)
        sleep.begin()
        session = stack.enter_context(Session(config, "train", config.run.steps * config.batch.minibatches))
        log = session.log
        rollouts = stack.enter_context(RolloutSource(config, engines, tokenizer))
        weight_sync = stack.enter_context(WeightSync(config, engines, sleep, session.policy, problems))
        order = PromptOrder(len(problems), config.run.seed, config.data.shuffle)
        reference = Reference(config, session.architecture) if config.algorithm.credit != "uniform" else None
        objective = Objective(
            config,
            session.architecture.vocab_size,
            reference.head_weight if reference else None,
            tensor_group(),
        )
        warnings = Warnings(log)
        progress = session.restore()
        log.start(progress.step, config.run.steps)
        weight_sync.push(progress.weight_version)
        if progress.step == 0:
            log.write(0, evaluate(config, rollouts, held_out, 0))
        stopped = stop.asked()
        while progress.step < config.run.steps and not stopped:
            step, last = progress.step + 1, progress.step + 1 == config.run.steps
            with log.phase("rollout"):
                rows = order.take(progress.prompts, config.rollout.prompts_per_step)
                responses = rollouts.sample([problems[row] for row in rows], step)
                sleep.begin()
            metrics = update(session, objective, reference, responses)
            warnings.look(metrics)
            with log.phase("weights"):
                metrics |= weight_sync.push(step)
            progress = Progress(step, progress.prompts + config.rollout.prompts_per_step, step)
            if last or (config.eval.every and step % config.eval.every == 0):
                with log.phase("eval"):
                    metrics |= evaluate(config, rollouts, held_out, step)
            # Written before the checkpoint: a kill between the two repeats the step, and its row is replaced.
            log.write(step, metrics)
            stopped = stop.asked() and not last
            if last or stopped or step % config.checkpoint.every == 0:
                with log.phase("checkpoint"):
                    session.save(progress)
        if not stopped:
            session.export()
        return not stopped


def update(
    session: Session, objective: Objective, reference: Reference | None, responses: list[Response]
) -> dict[str, float]:
    """`batch.minibatches` optimizer steps on a step's responses; returns its metrics. Collective over all ranks.

    The micro-batches hold the reference's states, gigabytes of them: they go when this returns.
    """
    config, log = session.config, session.log
    advantages = group_advantages(
        torch.tensor([r.reward for r in responses], dtype=torch.float64),
        config.rollout.group_size,
        config.algorithm.advantage,
        config.algorithm.advantage_eps,
    )
    micro_batches = session.make_batch(
        [r.prompt.token_ids for r in responses],
        [r.token_ids for r in responses],
        advantages.tolist(),
        [r.logprobs for r in responses],
    ).split(config.batch.micro_batch_size)
    with log.phase("reference"):
        micro_batches = reference.attach(micro_batches) if reference else micro_batches
    with log.phase("policy"):
        if config.batch.minibatches > 1:
            # With one optimizer step the policy that sampled is the one that is updated: nothing to compute twice.
            micro_batches = objective.freeze(session.policy.forward, micro_batches)
        share = len(micro_batches) // config.batch.minibatches
        results = [
            session.step(micro_batches[first : first + share], objective, more=first + share < len(micro_batches))
            for first in range(0, len(micro_batches), share)
        ]
    return step_metrics(responses, results)
