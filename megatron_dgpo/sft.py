"""Supervised fine-tuning on written solutions: the warm-up before DGPO."""

from __future__ import annotations

import torch

from megatron_dgpo.config import Config
from megatron_dgpo.data import PromptOrder, load_solutions, load_tokenizer
from megatron_dgpo.manifest import Progress
from megatron_dgpo.model.packed import pack_micro_batches
from megatron_dgpo.model.parallel import replica, tensor_group
from megatron_dgpo.model.policy import LossFunction
from megatron_dgpo.pace import Pace
from megatron_dgpo.session import Session, world
from megatron_dgpo.statistics import token_statistics
from megatron_dgpo.throughput import FORWARDS_OF_UPDATE
from megatron_dgpo.trace import traced


def sft(config: Config) -> bool:
    """Fine-tune for `sft.steps`, or continue doing so, and write `run.dir/hf`; False if it was asked to stop before.

    Collective: called by every rank.
    """
    with world(config), Session(config, "sft", config.sft.steps) as session:
        solutions = load_solutions(config, load_tokenizer(config.model.path))
        order = PromptOrder(len(solutions), config.run.seed, config.data.shuffle)
        loss = mean_negative_logprob(session.architecture.vocab_size)
        progress = session.begin(config.sft.steps)
        pace = Pace(config.checkpoint)
        stopped = pace.stopped()
        while progress.step < config.sft.steps and not stopped:
            with traced(config.run, progress.step + 1), session.log.phase("policy"):
                rows = order.take(progress.prompts, config.sft.batch_size)
                sequences = [solutions[row] for row in rows]
                mine = session.shares(sequences)[replica()[0]]
                result = session.step(pack_micro_batches(mine, config.parallel), loss)
            progress = Progress(progress.step + 1, progress.prompts + config.sft.batch_size)
            metrics = {
                "policy/loss": result.metrics["loss"] / result.metrics["tokens"],
                "policy/entropy": result.metrics["entropy"] / result.metrics["tokens"],
                "policy/grad_norm": result.grad_norm,
                "policy/lr": result.lr,
                "policy/skipped_steps": float(result.skipped),
                "policy/model_tflop": FORWARDS_OF_UPDATE * session.forward_flops(sequences) / 1e12,
                "rollout/tokens": result.metrics["tokens"],
            }
            session.log.write(progress.step, metrics)
            last = progress.step == config.sft.steps
            stopped, saves = pace.after_step(progress.step, last, session.writing_beside_s)
            if saves:
                session.save(progress)
            session.completed(wait=stopped or last)
        if not stopped:
            session.export()
        return not stopped


def mean_negative_logprob(vocab_size: int) -> LossFunction:
    """Of the response tokens, without a temperature. One all-gather over the tensor-parallel ranks a call."""

    def loss(batch, hidden_states, head_weight):
        statistics = token_statistics(
            hidden_states,
            head_weight,
            batch.targets,
            temperature=1.0,
            vocab_size=vocab_size,
            tp_group=tensor_group(),
        )
        total = -statistics.logprobs.sum()
        tokens = torch.tensor(len(batch.targets), device=total.device)
        return total, tokens, {"loss": total.detach(), "tokens": tokens, "entropy": statistics.entropy.detach().sum()}

    return loss
