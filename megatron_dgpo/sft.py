"""Supervised fine-tuning on written solutions: the warm-up before DGPO."""

from __future__ import annotations

import torch

from megatron_dgpo import checkpoint
from megatron_dgpo.batch import Batch
from megatron_dgpo.config import Config
from megatron_dgpo.data import PromptOrder, load_solutions
from megatron_dgpo.session import Session
from megatron_dgpo.statistics import token_statistics


def sft(config: Config) -> None:
    """Fine-tune for `sft.steps`, or continue doing so, and write `run.dir/hf`. Collective: called by every rank."""
    with Session(config, "sft", optimizer_steps=config.sft.steps) as session:
        policy, log = session.policy, session.log
        solutions = load_solutions(config, session.tokenizer)
        order = PromptOrder(len(solutions), config.run.seed, config.data.shuffle)
        progress = session.restore()
        log.start(progress.step, config.sft.steps)
        while progress.step < config.sft.steps:
            with log.phase("policy"):
                rows = [solutions[i] for i in order.take(progress.prompts, config.sft.batch_size, *session.replica)]
                batch = session.make_batch([r.prompt_ids for r in rows], [r.response_ids for r in rows])
                result = policy.step(batch.split(config.batch.micro_batch_size), _loss(session))
            progress = checkpoint.Progress(progress.step + 1, progress.prompts + config.sft.batch_size)
            log.write(progress.step, {})
        session.export()
