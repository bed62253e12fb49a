"""avg@k and pass@k on a data set, through the same servers and graders as training."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_dgpo import checkpoint
from megatron_dgpo.config import Config
from megatron_dgpo.data import load_prompts
from megatron_dgpo.experience import write_samples
from megatron_dgpo.manifest import newest, read_manifest
from megatron_dgpo.metrics import pass_at_k
from megatron_dgpo.rollout.sample import Prompt
from megatron_dgpo.session import Session


def evaluate(session: Session, problems: list[Prompt], step: int) -> dict[str, float]:
    """`eval.samples` responses to every problem; writes them to run.dir/eval. Collective over all ranks.

    A response is correct when its reward is at least 1. `accuracy` is avg@k, the mean over all responses.
    """
    config = session.config
    if not problems or config.rollout.replay:
        return {}
    k = config.eval.samples
    scored = session.experience.evaluate(problems[: config.eval.problems], k, config.eval.temperature)
    if dist.get_rank() == 0:
        write_samples(config.run.dir / "eval" / f"step_{step:08d}.jsonl", scored)
    correct: dict[int, int] = {}
    for item in scored:
        index = item.sample.prompt.index
        correct[index] = correct.get(index, 0) + item.correct
    metrics = {
        "eval/accuracy": sum(correct.values()) / len(scored),
        "eval/reward": sum(item.reward for item in scored) / len(scored),
        "eval/response_length": sum(len(item.sample.token_ids) for item in scored) / len(scored),
    }
    for j in _powers_of_two(k):
        metrics[f"eval/pass_at_{j}"] = sum(pass_at_k(k, count, j) for count in correct.values()) / len(correct)
    return metrics


def evaluate_policy(config: Config, folder: Path | None, from_model: bool) -> None:
    """Print avg@k and pass@k of a checkpoint (`folder`, or the run's newest) or, `from_model`, of model.path itself.

    Collective: called by every rank.
    """
    with Session(config, "eval") as session:
        step = 0
        if not from_model:
            path = folder or newest(config.run.dir / "checkpoints")
            checkpoint.load(path, session.policy, weights_only=True)
            step = read_manifest(path)["progress"]["step"]
        problems = load_prompts(config, config.data.eval, "data.eval", session.tokenizer)
        session.weight_sync(problems).push(step)
        metrics = evaluate(session, problems, step)
        if dist.get_rank() == 0:
            k = config.eval.samples
            shares = [f"pass@{j}={metrics[f'eval/pass_at_{j}']:.4f}" for j in _powers_of_two(k)]
            count = len(problems[: config.eval.problems])
            print(f"eval: problems={count} avg@{k}={metrics['eval/accuracy']:.4f}", *shares, flush=True)


def _powers_of_two(most: int) -> list[int]:
    """2, 4, … and `most` itself."""
    return sorted({2**i for i in range(1, most.bit_length()) if 2**i <= most} | ({most} if most > 1 else set()))
