"""The loop: every rank runs `train`, from prompts to updated weights in the servers.

    prompts -> responses (vLLM) -> rewards -> advantages -> reference -> policy update -> weights to the servers
"""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dgpo import checkpoint
from megatron_dgpo.algorithm.advantages import group_advantages
from megatron_dgpo.algorithm.objective import policy_objective, token_credit
from megatron_dgpo.batch import Batch
from megatron_dgpo.config import Config
from megatron_dgpo.experience import Scored, write_samples
from megatron_dgpo.metrics import MetricsLog, pass_at_k
from megatron_dgpo.model.policy import Policy
from megatron_dgpo.model.reference import Reference
from megatron_dgpo.session import Session
from megatron_dgpo.statistics import token_statistics

logger = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Run or continue the training run of `config.run.dir`. Collective: called by every rank."""
    with Session(config) as session:
        policy, log, experience = session.policy, session.log, session.experience
        reference = Reference(config, session.architecture) if needs_reference(config) else None
        progress = session.restore() or checkpoint.Progress()
        session.push_weights(progress.weight_version)
        if progress.step == 0:
            log.write(0, evaluate(session, 0))
        while progress.step < config.run.steps:
            step = progress.step + 1
            with log.phase("rollout"):
                prompts = session.prompts.take(progress.prompts, config.rollout.prompts_per_step)
                scored = experience.sample(prompts, step)
            batch = make_batch(scored, session)
            micro_batches = batch.split(config.batch.micro_batch_size)
            with log.phase("reference"):
                reference_states = reference.hidden_states(micro_batches) if reference else None
            with log.phase("policy"):
                metrics = update(policy, micro_batches, reference, reference_states, session)
            with log.phase("weights"):
                session.push_weights(progress.weight_version + 1)
            progress = checkpoint.Progress(
                step, progress.prompts + config.rollout.prompts_per_step, progress.weight_version + 1
            )
            if step == config.run.steps or (config.eval.every and step % config.eval.every == 0):
                with log.phase("eval"):
                    metrics |= evaluate(session, step)
            if step == config.run.steps or step % config.checkpoint.every == 0:
                with log.phase("checkpoint"):
                    session.save(progress)
            log.write(step, metrics | rollout_metrics(scored))
        session.export()
