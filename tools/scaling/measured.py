"""Real training steps on the machine at hand beside what the formulas say of it.

One to four ranks over gloo, one thread each, take the trainer's own policy update (`Policy.step` with DGPO's loss,
reference states given) of small models in several layouts. The formulas get the machine as measured in the same run,
with as many ranks busy at once as the layout has: matrix products, copies and all-reduces of one rank's. Ranks beyond
the cores share them, and the rates fall accordingly. Absolute times are not what is compared: Python's and PyTorch's
overhead is a large part of them on such small models. Both are scaled to 1 at one rank.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dgpo.config import Config
from megatron_dgpo.planning import step_time
from megatron_dgpo.planning.hardware import Cluster, Efficiencies, Gpu
from megatron_dgpo.planning.sides import TrainerSide, Workload
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.weights.architectures import read_architecture

# Heads, groups and layers that four ranks divide.
_HEADS = dict(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
MODELS = {
    "7M": dict(vocab_size=4096, hidden_size=256, intermediate_size=768, **_HEADS),
    "26M": dict(vocab_size=8192, hidden_size=512, intermediate_size=1408, **_HEADS),
}
PROMPT_TOKENS, RESPONSE_TOKENS, RESPONSES = 32, 96, 8
# Measured rates are what operations reach: nothing is taken off them.
_REACHED = Efficiencies(gemm=1.0, grouped_gemm=1.0, attention=1.0, memory=1.0, network=1.0, decode_memory=1.0)
_RATE_S = 0.5
_STEPS = 2


@dataclass(frozen=True)
class Point:
    """One layout of a curve."""

    curve: str
    ranks: int
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    responses: int = RESPONSES

    @property
    def trainer(self) -> TrainerSide:
        # A sequence each.
        return TrainerSide(self.tensor, self.pipeline, self.data, micro_batch_tokens=PROMPT_TOKENS + RESPONSE_TOKENS)

    @property
    def work(self) -> Workload:
        lengths = PROMPT_TOKENS, RESPONSE_TOKENS
        return Workload(self.responses, 1, *lengths, *lengths, dtype="float32")


_ONE = Point("one rank", 1)
POINTS = [
    _ONE,
    *(Point("TP", ranks, tensor=ranks) for ranks in (2, 4)),
    *(Point("PP", ranks, pipeline=ranks) for ranks in (2, 4)),
    *(Point("DP", ranks, data=ranks) for ranks in (2, 4)),
    *(Point("DP, weak", ranks, data=ranks, responses=RESPONSES * ranks) for ranks in (2, 4)),
    Point("TP × PP", 4, tensor=2, pipeline=2),
    Point("TP × DP", 4, tensor=2, data=2),
]


def measure(rounds: int, report: Callable[[str], None] = print) -> dict:
    """Times and rates of this machine, as JSON has them: the best of `rounds` times over everything, so that other work
    on the machine spoils as little as possible. Starts and ends its own processes."""
    found: dict = {"cores": len(os.sched_getaffinity(0)), "rounds": rounds, "machines": {}, "steps": []}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, shape in MODELS.items():
            _save_model(folder / model, shape)
        for number in range(rounds):
            for ranks in sorted({point.ranks for point in POINTS}):
                report(f"round {number + 1}: {ranks} rank{'s' if ranks > 1 else ''}, load {loads[-1]:.0f}")
                _keep_rates(found, ranks, _on_ranks(ranks, folder, _rates))
                for model in MODELS:
                    for point in (point for point in POINTS if point.ranks == ranks):
                        seconds = _on_ranks(ranks, folder, _step_seconds, point, folder / model)
                        _keep_step(found, {"model": model, **asdict(point), "measured_s": seconds})
                loads.append(os.getloadavg()[0])
    found |= {"least_load": min(loads), "most_load": max(loads)}
    predict(found)
    return found


def _keep_rates(found: dict, ranks: int, rates: dict[str, float]) -> None:
    best = found["machines"].setdefault(str(ranks), rates)
    found["machines"][str(ranks)] = {name: max(rate, rates[name]) for name, rate in best.items()}


def _keep_step(found: dict, step: dict) -> None:
    same = [old for old in found["steps"] if all(old[name] == step[name] for name in ("model", "curve", "ranks"))]
    if same:
        same[0]["measured_s"] = min(same[0]["measured_s"], step["measured_s"])
    else:
        found["steps"].append(step)


def curves(measured: dict, model: str) -> dict[str, list[dict]]:
    """Points of every curve from one rank on, with `measured` and `predicted` times of a step over one rank's."""
    steps = [step for step in measured["steps"] if step["model"] == model]
    one = next(step for step in steps if step["ranks"] == 1)
    found: dict[str, list[dict]] = {}
    for step in steps:
        if step is not one:
            relative = {kind: step[f"{kind}_s"] / one[f"{kind}_s"] for kind in ("measured", "predicted")}
            start = {"ranks": 1, "measured": 1.0, "predicted": 1.0}
            found.setdefault(step["curve"], [start]).append({"ranks": step["ranks"], **relative})
    return found


def deviations(measured: dict) -> list[tuple[float, str, str, int]]:
    """(measured over predicted, both scaled to 1 at one rank, less 1; model; curve; ranks), the largest first."""
    found = [
        (point["measured"] / point["predicted"] - 1, model, curve, point["ranks"])
        for model in MODELS
        for curve, points in curves(measured, model).items()
        for point in points[1:]
    ]
    return sorted(found, key=lambda item: -abs(item[0]))


def machine(rates: dict[str, float], tensor: int) -> Cluster:
    """One rank's part of the machine. Every tensor-parallel group is a node: inside, messages are as large as
    activations; between them gradients travel."""
    gpu = Gpu("this machine", 1e12, rates["flops"], rates["copy"], rates["activations"], rates["gradients"])
    return Cluster(gpu, tensor, _REACHED)


def predict(found: dict) -> None:
    """Add `predicted_s` to every step, from the rates beside it."""
    sizes = {model: _sizes(shape) for model, shape in MODELS.items()}
    for step in found["steps"]:
        point = Point(**{name: step[name] for name in Point.__dataclass_fields__})
        cluster = machine(found["machines"][str(point.ranks)], point.tensor)
        step["predicted_s"] = step_time.update_time(sizes[step["model"]], point.work, point.trainer, cluster).total


def _sizes(shape: dict) -> Sizes:
    from transformers import Qwen2Config

    with tempfile.TemporaryDirectory() as folder:
        Qwen2Config(architectures=["Qwen2ForCausalLM"], **shape).save_pretrained(folder)
        return Sizes(read_architecture(Path(folder)))


def _save_model(folder: Path, shape: dict) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)


def _on_ranks(ranks: int, folder: Path, function: Callable, *arguments):
    """`function(*arguments)` on that many ranks; rank 0's answer.

    In fresh processes: Megatron forgets a layout's groups, but nobody can end all threads that gloo keeps for them.
    """
    import torch.multiprocessing

    # They come from a server that has done the imports.
    multiprocessing.set_forkserver_preload(["megatron_dgpo.trainer"])
    (folder / "group").unlink(missing_ok=True)
    task = ranks, folder, function, *arguments
    torch.multiprocessing.start_processes(_run_rank, task, ranks, start_method="forkserver")
    return json.loads((folder / "answer.json").read_text())


def _run_rank(rank: int, ranks: int, folder: Path, function: Callable, *arguments) -> None:
    import torch
    import torch.distributed as dist

    from megatron_dgpo.model.device import init_device

    torch.set_num_threads(1)
    init_device()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    answer = function(*arguments)
    if rank == 0:
        (folder / "answer.json").write_text(json.dumps(answer))


def _step_seconds(point: Point, model: Path) -> float:
    """The fastest of some policy updates. Collective."""
    import torch
    import torch.distributed as dist

    from megatron_dgpo.algorithm.objective import Objective
    from megatron_dgpo.micro_batch import TrainingSequence
    from megatron_dgpo.model.packed import pack_micro_batches
    from megatron_dgpo.model.parallel import initialize_parallel, replica, tensor_group
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.model.reference import Reference

    config = Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": "none"},
            "parallel": {"tensor": point.tensor, "pipeline": point.pipeline},
        }
    )
    architecture = read_architecture(model)
    initialize_parallel(config.parallel, 1)
    policy, reference = Policy(config, architecture, 1000), Reference(config, architecture)
    policy.load(model)
    torch.manual_seed(replica()[0])
    rows = torch.randint(
        architecture.vocab_size, (point.responses // point.data, PROMPT_TOKENS + RESPONSE_TOKENS)
    ).tolist()
    advantages = torch.randn(len(rows)).tolist()
    sequences = [
        TrainingSequence.of(row[:PROMPT_TOKENS], row[PROMPT_TOKENS:], advantage)
        for row, advantage in zip(rows, advantages, strict=True)
    ]
    micro_batches = reference.attach(pack_micro_batches([[sequence] for sequence in sequences], config.parallel))
    objective = Objective(config, architecture.vocab_size, reference.head_weight, tensor_group())
    times = []
    # The first has Megatron's set-up in it.
    for _ in range(1 + _STEPS):
        dist.barrier()
        start = time.perf_counter()
        # It ends by reading the metrics on every rank: nothing is left in flight.
        policy.step(micro_batches, objective)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _rates() -> dict[str, float]:
    """A rank's operations/s of matrix products, bytes/s of copies (read and written), and bytes/s in a ring of
    all-reduces of activations and of gradients, while all ranks do the same; means over the ranks. Sizes are the 26M
    model's. Collective."""
    import torch

    from megatron_dgpo.model.collectives import all_gathered

    tokens, shape = PROMPT_TOKENS + RESPONSE_TOKENS, MODELS["26M"]
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    left, right = torch.randn(tokens, hidden), torch.randn(hidden, ffn)
    large, copy = torch.randn(8 * 2**20), torch.empty(8 * 2**20)
    rates = {
        "flops": _rate(lambda: left @ right) * 2 * tokens * hidden * ffn,
        "copy": _rate(lambda: copy.copy_(large)) * 2 * large.nbytes,
        "activations": _ring_rate(torch.zeros(tokens, hidden), 50),
        "gradients": _ring_rate(large.zero_(), 3),
    }
    gathered = all_gathered(rates)
    return {name: sum(rank[name] for rank in gathered) / len(gathered) for name in rates}


def _ring_rate(message, calls: int) -> float:
    """Bytes a second of one rank: a ring sends 2 (n - 1) / n of the message. Alone it sends nothing, and the rate is
    not used."""
    import torch.distributed as dist

    ranks = dist.get_world_size()
    if ranks == 1:
        return 1e15
    dist.barrier()
    start = time.perf_counter()
    # As many calls on every rank, not as much time.
    for _ in range(calls):
        dist.all_reduce(message)
    return 2 * (ranks - 1) / ranks * message.nbytes * calls / (time.perf_counter() - start)


def _rate(call: Callable[[], object]) -> float:
    """Calls a second."""
    import torch.distributed as dist

    call()
    dist.barrier()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < _RATE_S:
        call()
        calls += 1
    return calls / (time.perf_counter() - start)
