"""avg@k and pass@k on sets of problems, through the same servers and graders as training."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path

import torch.distributed as dist

from megatron_dgpo import checkpoint
from megatron_dgpo.config import Config
from megatron_dgpo.data import end_tokens, load_prompts, load_tokenizer
from megatron_dgpo.manifest import Progress, newest, read_manifest
from megatron_dgpo.metrics import accuracy_interval, pass_at_k
from megatron_dgpo.model.collectives import from_rank_0
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.recording import write_responses
from megatron_dgpo.rollout.response import Prompt, Response
from megatron_dgpo.rollout.source import RolloutSource
from megatron_dgpo.session import Session, world
from megatron_dgpo.weight_sync.sync import ServerSleep, WeightSync

Sets = dict[str, list[Prompt]]
"""{place: problems}; the place is a set's folder in run.dir, and what its metrics' names begin with."""

_INTERVAL = ("accuracy_low", "accuracy_high")


def load_sets(config: Config, tokenizer) -> Sets:
    """The first `eval.problems` of each file of `data.eval`: "eval", or with several files "eval/STEM" each."""
    files, most = config.data.eval, config.eval.problems
    places = ["eval"] if len(files) == 1 else [f"eval/{path.stem}" for path in files]
    loaded = (load_prompts(config, path, "data.eval", tokenizer)[:most] for path in files)
    return dict(zip(places, loaded, strict=True))


def evaluate(config: Config, rollouts: RolloutSource, sets: Sets, progress: Progress) -> dict[str, float]:
    """`eval.samples` responses to every problem; writes them to the sets' folders. Collective over all ranks.

    A response is correct when its reward is at least 1. `accuracy` is avg@k, the mean over all responses of a set. With
    several sets `eval/` has the means over them; they have no interval: other sets are not what it would be over.
    """
    if not sets or config.rollout.replay:
        return {}
    responses = rollouts.evaluate([problem for problems in sets.values() for problem in problems], progress)
    return from_rank_0(lambda: _written(config, sets, responses, progress.step))


def _written(config: Config, sets: Sets, responses: list[Response], step: int) -> dict[str, float]:
    """Metrics of the responses, which come in the order of the problems; writes them."""
    found = {}
    for place, problems in sets.items():
        count = len(problems) * config.eval.samples
        own, responses = responses[:count], responses[count:]
        write_responses(config.run.dir / place / f"step_{step:08d}.jsonl", own)
        found[place] = _metrics(own, config.eval.samples)
    if len(found) > 1:
        names = [name for name in next(iter(found.values())) if name not in _INTERVAL]
        found["eval"] = {name: statistics.fmean(values[name] for values in found.values()) for name in names}
    return {f"{place}/{name}": value for place, values in found.items() for name, value in values.items()}


def _metrics(responses: list[Response], k: int) -> dict[str, float]:
    """Of k responses to each problem."""
    correct: dict[int, int] = {}
    for response in responses:
        index = response.prompt.index
        correct[index] = correct.get(index, 0) + response.correct
    counts = list(correct.values())
    metrics = {
        "accuracy": sum(counts) / len(responses),
        **dict(zip(_INTERVAL, accuracy_interval(k, counts), strict=True)),
        "reward": sum(r.reward for r in responses) / len(responses),
        "response_length": sum(len(r.token_ids) for r in responses) / len(responses),
    }
    for j in _powers_of_two(k):
        metrics[f"pass_at_{j}"] = sum(pass_at_k(k, count, j) for count in counts) / len(counts)
    return metrics


def evaluate_policy(config: Config, folder: Path | None, from_model: bool) -> None:
    """Print avg@k and pass@k of a checkpoint (`folder`, or the run's newest) or, `from_model`, of model.path itself.

    Collective: called by every rank.
    """
    assert config.data.eval, "preflight.check asks for it"
    with contextlib.ExitStack() as stack:
        stack.enter_context(world(config))
        tokenizer = load_tokenizer(config.model.path)
        sets = load_sets(config, tokenizer)
        ends = end_tokens(config.model.path, tokenizer)
        engines = Engines.of_run(config, ends)
        sleep = ServerSleep(config, engines)
        sleep.begin()
        session = stack.enter_context(Session(config, "eval"))
        weight_sync = stack.enter_context(WeightSync(config, engines, sleep, session.policy, next(iter(sets.values()))))
        rollouts = stack.enter_context(RolloutSource(config, ends, tokenizer, weight_sync))
        progress = Progress()
        if not from_model:
            path = folder or newest(config.run.dir / "checkpoints")
            manifest = read_manifest(path) if path else None
            assert path and manifest, "preflight.check finds it"
            checkpoint.load(path, session.policy, weights_only=True)
            progress = Progress(**manifest["progress"])
        with session.log.startup("waiting for the servers, which get the policy's weights"):
            weight_sync.push(progress.weight_version)
        metrics = evaluate(config, rollouts, sets, progress)
        if dist.get_rank() == 0:
            print(*report(sets, config.eval.samples, metrics), sep="\n", flush=True)


def report(sets: Sets, k: int, metrics: dict[str, float]) -> list[str]:
    """A line for each set, and with several one of the means over them."""
    of = {place: f"problems={len(problems)}" for place, problems in sets.items()}
    if len(sets) > 1:
        of["eval"] = f"mean over {len(sets)} sets"
    return [_line(place, text, k, metrics) for place, text in of.items()]


def _line(place: str, of: str, k: int, metrics: dict[str, float]) -> str:
    bounds = [f"{metrics[f'{place}/{bound}']:.3f}" for bound in _INTERVAL if f"{place}/{bound}" in metrics]
    parts = [f"{place}: {of}", f"avg@{k}={metrics[f'{place}/accuracy']:.4f}"]
    parts += [f"[{', '.join(bounds)}]"] if bounds else []
    return " ".join([*parts, *(f"pass@{j}={metrics[f'{place}/pass_at_{j}']:.4f}" for j in _powers_of_two(k))])


def _powers_of_two(most: int) -> list[int]:
    """2, 4, … and `most` itself."""
    return sorted({2**i for i in range(1, most.bit_length()) if 2**i <= most} | ({most} if most > 1 else set()))
