"""avg@k and pass@k on a data set, through the same servers and graders as training."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch.distributed as dist

from megatron_dgpo import checkpoint
from megatron_dgpo.config import Config
from megatron_dgpo.data import end_tokens, load_prompts, load_tokenizer
from megatron_dgpo.manifest import Progress, newest, read_manifest
from megatron_dgpo.metrics import pass_at_k
from megatron_dgpo.model.collectives import from_rank_0
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.recording import write_responses
from megatron_dgpo.rollout.response import Prompt, Response
from megatron_dgpo.rollout.source import RolloutSource
from megatron_dgpo.session import Session, world
from megatron_dgpo.weight_sync.sync import ServerSleep, WeightSync


def evaluate(config: Config, rollouts: RolloutSource, problems: list[Prompt], progress: Progress) -> dict[str, float]:
    """`eval.samples` responses to every problem; writes them to run.dir/eval. Collective over all ranks.

    A response is correct when its reward is at least 1. `accuracy` is avg@k, the mean over all responses.
    """
    if not problems or config.rollout.replay:
        return {}
    k = config.eval.samples
    responses = rollouts.evaluate(problems[: config.eval.problems], k, config.eval.temperature, progress)
    return from_rank_0(lambda: _written(config.run.dir / "eval" / f"step_{progress.step:08d}.jsonl", responses, k))


def _written(file: Path, responses: list[Response], k: int) -> dict[str, float]:
    """Metrics of k responses to each problem; writes them."""
    write_responses(file, responses)
    correct: dict[int, int] = {}
    for response in responses:
        index = response.prompt.index
        correct[index] = correct.get(index, 0) + response.correct
    metrics = {
        "eval/accuracy": sum(correct.values()) / len(responses),
        "eval/reward": sum(r.reward for r in responses) / len(responses),
        "eval/response_length": sum(len(r.token_ids) for r in responses) / len(responses),
    }
    for j in _powers_of_two(k):
        metrics[f"eval/pass_at_{j}"] = sum(pass_at_k(k, count, j) for count in correct.values()) / len(correct)
    return metrics


def evaluate_policy(config: Config, folder: Path | None, from_model: bool) -> None:
    """Print avg@k and pass@k of a checkpoint (`folder`, or the run's newest) or, `from_model`, of model.path itself.

    Collective: called by every rank.
    """
    assert config.data.eval, "preflight.check asks for it"
    with contextlib.ExitStack() as stack:
        stack.enter_context(world(config))
        tokenizer = load_tokenizer(config.model.path)
        problems = load_prompts(config, config.data.eval, "data.eval", tokenizer)
        ends = end_tokens(config.model.path, tokenizer)
        engines = Engines.of_run(config, ends)
        sleep = ServerSleep(config, engines)
        sleep.begin()
        session = stack.enter_context(Session(config, "eval"))
        weight_sync = stack.enter_context(WeightSync(config, engines, sleep, session.policy, problems))
        rollouts = stack.enter_context(RolloutSource(config, ends, tokenizer, weight_sync))
        progress = Progress()
        if not from_model:
            path = folder or newest(config.run.dir / "checkpoints")
            manifest = read_manifest(path) if path else None
            assert path and manifest, "preflight.check finds it"
            checkpoint.load(path, session.policy, weights_only=True)
            progress = Progress(**manifest["progress"])
        weight_sync.push(progress.weight_version)
        metrics = evaluate(config, rollouts, problems, progress)
        if dist.get_rank() == 0:
            k = config.eval.samples
            shares = [f"pass@{j}={metrics[f'eval/pass_at_{j}']:.4f}" for j in _powers_of_two(k)]
            count = len(problems[: config.eval.problems])
            print(f"eval: problems={count} avg@{k}={metrics['eval/accuracy']:.4f}", *shares, flush=True)


def _powers_of_two(most: int) -> list[int]:
    """2, 4, … and `most` itself."""
    return sorted({2**i for i in range(1, most.bit_length()) if 2**i <= most} | ({most} if most > 1 else set()))
