"""One training step on packed sequences beside the same on rows padded to the longest.

    git worktree add ../padded 4011fba      # the last commit that padded
    python tools/bench_packing.py --padded ../padded --json benchmarks/packing_cpu.json

A step is: reference, policy forward and backward over micro-batches, optimizer; DGPO's loss. The two checkouts take
turns, a process each time, whose peak memory is its own; the fastest step of each counts. What to expect is the ratio
of positions that run through the model: more where attention over padding counts, less where a step's fixed cost does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Case(NamedTuple):
    model: dict
    rows: int
    """Of a padded micro-batch."""
    budget: int
    """Tokens of a packed one."""


CASES = {
    # The model and the batch of examples/arithmetic.
    "demo": Case(
        dict(vocab_size=20, hidden_size=128, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4),
        256,
        16384,
    ),
    # Mean 400, longest 1,500.
    "skewed": Case(
        dict(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8),
        4,
        4096,
    ),
}
_STEPS, _ROUNDS = 3, 3


def sequences(case: str) -> list[tuple[list[int], list[int], float]]:
    """(prompt, response, advantage), the same in every process."""
    draw = random.Random(0)
    if case == "demo":
        lengths = [(draw.randint(8, 12), draw.randint(18, 48)) for _ in range(256)]
    else:
        logs = [math.log(340) - 0.4 + 0.9 * draw.gauss(0, 1) for _ in range(31)]
        lengths = [(60, 1440)] + [(60, max(16, min(1440, int(math.exp(log))))) for log in logs]
    size = CASES[case].model["vocab_size"]
    tokens = [[draw.randrange(size) for _ in range(prompt + response)] for prompt, response in lengths]
    return [(row[:prompt], row[prompt:], draw.uniform(-1, 1)) for row, (prompt, _) in zip(tokens, lengths, strict=True)]


def measure(name: str, folder: Path) -> dict:
    """Steps of whichever checkout is imported."""
    import torch
    import torch.distributed as dist
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_dgpo.algorithm.objective import Objective
    from megatron_dgpo.config import Config
    from megatron_dgpo.model.device import backend, init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.model.reference import Reference
    from megatron_dgpo.weights.architectures import read_architecture

    case = CASES[name]
    init_device()
    dist.init_process_group(backend(), init_method=f"file://{folder}/group", rank=0, world_size=1)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**case.model, num_key_value_heads=2, tie_word_embeddings=True))
    model.save_pretrained(folder / "model")
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    config = Config.model_validate(
        {
            "model": {"path": folder / "model", "dtype": dtype},
            "data": {"train": "none"},
            "algorithm": {"tau": 0.02},
            "optimizer": {"clip_grad": 0.0},
        }
    )
    initialize_parallel(config.parallel, 1)
    architecture = read_architecture(config.model.path)
    policy, reference = Policy(config, architecture, 1000), Reference(config, architecture)
    policy.load(config.model.path)
    objective = Objective(config, architecture.vocab_size, reference.head_weight, tp_group=None)
    rows = sequences(name)
    try:
        from megatron_dgpo.balance import fit
        from megatron_dgpo.micro_batch import TrainingSequence
        from megatron_dgpo.model.packed import pack_micro_batches
    except ImportError:
        from megatron_dgpo.batch import Batch  # type: ignore[import-not-found]

        batch = Batch.from_sequences(*(list(part) for part in zip(*rows, strict=True)))
        micro_batches = batch.to(torch.cuda.current_device()).split(case.rows)
    else:
        plan = fit([len(prompt) + len(response) for prompt, response, _ in rows], case.budget)
        parts = [[TrainingSequence.of(*rows[i]) for i in part] for part in plan]
        micro_batches = pack_micro_batches(parts, config.parallel)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, results = [], []
    for _ in range(1 + _STEPS):
        start = time.perf_counter()
        # step() ends by reading the metrics: nothing is left in flight.
        results.append(policy.step(reference.attach(micro_batches), objective))
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        before, peak = 0, torch.cuda.max_memory_allocated() // 1024
    dist.destroy_process_group()
    return {
        "seconds": min(times[1:]),
        "positions": sum(batch.tokens.numel() for batch in micro_batches),
        "mib": (peak - before) / 1024,
        "loss": results[0].metrics["loss"],
        "grad_norm": results[0].grad_norm,
    }


def run(checkout: Path, case: str) -> dict:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [sys.executable, __file__, "--child", case]
    done = subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--padded", type=Path, help="a checkout of the last commit that padded rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.child, Path(folder))))
        return
    if arguments.padded is None:
        parser.error("--padded is missing: see the first lines of this file")
    checkouts = {"padded": arguments.padded.resolve(), "packed": Path(__file__).resolve().parents[1]}
    table = Table("case", "", "positions", "s a step", "MiB at its peak", "loss", "gradient norm")
    found = []
    for case in CASES:
        best: dict[str, dict] = {}
        for _ in range(_ROUNDS):
            for name, checkout in checkouts.items():
                result = run(checkout, case)
                if name not in best or result["seconds"] < best[name]["seconds"]:
                    best[name] = result
        for name, result in best.items():
            numbers = (f"{result['positions']:,}", f"{result['seconds']:.3f}", f"{result['mib']:.0f}")
            table.add_row(case, name, *numbers, f"{result['loss']:.7g}", f"{result['grad_norm']:.7g}")
        ratios = [best["padded"][what] / best["packed"][what] for what in ("positions", "seconds", "mib")]
        table.add_row(case, "times", *(f"{ratio:.2f}" for ratio in ratios), "", "")
        found.append({"case": case, **best})
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
