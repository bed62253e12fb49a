"""What a user types, on a tiny model: continuing from a checkpoint, and training with a vLLM server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tools.gpu_checks.line import FAILED, PASSED, Line, Task, within
from tools.tiny_models import make_tiny_model

STEPS = 3
# The backward passes of a GPU's attention and embedding add in an order of their own: what a third step makes of it,
# as a part of what three steps changed.
RESUMED_BOUND = {"cpu": 0.0, "cuda": 0.05}
# Mean difference of log-probs between server and trainer.
GAP_BOUND = {"cpu": 1e-3, "cuda": 0.1}
_GRADER = """
def reward(response, answer, row):
    return sum(map(ord, response)) % 7 / 7
"""


class CommandError(RuntimeError):
    """A command failed; says what it wrote last."""


def resume(task: Task) -> Iterator[Line]:
    """A run that continues after its second step ends as one that was never stopped."""
    start = make_tiny_model(task.folder / "model", "qwen2")
    problems = task.folder / "problems.jsonl"
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i), "response": f"{i} and {i} is {2 * i}"} for i in range(8)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "batch": {"micro_batch_tokens": 256},
        "rollout": {"context_tokens": 64},
        "data": {"train": str(problems)},
        "sft": {"data": str(problems), "steps": STEPS, "batch_size": 8},
        "checkpoint": {"every": 1, "keep": STEPS},
    }
    whole, part = task.folder / "whole", task.folder / "part"
    _run(task, "sft", whole, start, sections)
    for step in range(1, STEPS):
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(whole / name, part / name)
    _run(task, "sft", part, start, sections)
    begun, once, again = (_weights(path) for path in (start, whole / "hf", part / "hf"))
    moved = (once - begun).norm().item()
    if not moved:
        yield Line("continued run", FAILED, f"{STEPS} steps changed no weight")
        return
    errors = {"weights": (once - again).norm().item() / moved}
    yield within("continued run", errors, {"weights": RESUMED_BOUND[task.device]}, "an uninterrupted one")


def server(task: Task, transport: str, sleep: str) -> Iterator[Line]:
    """Two training steps with a vLLM server: the trainer's canary compares weights and log-probs after every update."""
    start = make_tiny_model(task.folder / "model", "qwen2")
    (task.folder / "check_reward.py").write_text(_GRADER)
    problems = task.folder / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{i}+{i}", "answer": "0"}) + "\n" for i in range(4)))
    sections = {
        "run": {"steps": 2},
        "algorithm": {"tau": 0.02},
        "rollout": {
            **{"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 12, "context_tokens": 64},
        },
        "servers": {"sleep": sleep == "sleep", "gpu_memory_fraction": 0.3, "max_concurrent": 16},
        "weight_sync": {"transport": transport, "check_all": True},
        "data": {"train": str(problems)},
        "reward": {"grader": "check_reward:reward", "workers": 1},
    }
    run = task.folder / "run"
    _run(task, "train", run, start, sections)
    rows = [json.loads(line) for line in (run / "metrics" / "train.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "policy/rollout_logprob_gap" in row]
    gap = max(row["policy/rollout_logprob_gap"] for row in steps)
    against = "the trainer's, of sampled tokens"
    yield within("log-probs", {"mean": gap}, {"mean": GAP_BOUND[task.device]}, against)
    moved = (_weights(run / "hf") - _weights(start)).norm().item()
    canary = max(row.get("weights/canary_logprob_gap", 0.0) for row in rows)
    found = f"{len(steps)} updates by {transport}, versions and log-probs compared after each (largest {canary:.1e})"
    figures = {"weights_moved": moved, "canary": canary, "rows": steps}
    if len(steps) == 2 and moved > 0:
        yield Line("updates", PASSED, found, figures)
    else:
        yield Line("updates", FAILED, f"{len(steps)} steps, which moved the weights by {moved:g}", figures)
    if sleep == "sleep":
        yield Line("sleep", PASSED, "the server slept during each policy update, and woke with new weights")


def _run(task: Task, command: str, run: Path, model: Path, sections: dict) -> None:
    settings = sections | {
        "run": {"dir": str(run)} | sections.get("run", {}),
        "model": {"path": str(model), "dtype": "bfloat16" if task.on_gpu else "float32"},
        "optimizer": {"lr": 1e-3, "schedule": "cosine"},
    }
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    line = [sys.executable, "-m", "megatron_dgpo.cli", command, str(config)]
    # Graders are looked for in the current folder.
    paths = [str(task.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(line, cwd=task.folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-20:]
        raise CommandError(f"megatron-dgpo {command} ended with {done.returncode}:\n" + "\n".join(last))


def _weights(folder: Path) -> torch.Tensor:
    """All of a small model, as one float64 vector."""
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
