"""Whole training steps beside TRL's GRPO trainer, which a small user would pick: same model, batch and temperature.

    make demo                                # leaves the model and the problems of the first case
    pip install --target build/trl --no-deps trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 dill==0.4.1 \\
        multiprocess==0.70.19 xxhash==4.1.0 pandas==3.1.1
    python tools/bench_trl.py --trl build/trl --json benchmarks/trl_cpu.json

A step samples, grades, passes through the reference, updates once and, here, gives the new weights to a vLLM server.
TRL generates with transformers in the training process, and its reference pass is that of its KL term. One after the
other on all cores; medians of the steps but the first and the last, whose checkpoint and export are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "runs" / "arithmetic"


class Case(NamedTuple):
    prompts: int
    group: int
    response_tokens: int
    context_tokens: int
    lr: float
    bf16: bool = False
    """Each in its own mixed precision: here weights in bfloat16 with a float32 copy for the optimizer, there float32
    weights under autocast, TRL's default."""


CASES = {
    "demo": Case(32, 8, 64, 96, 1e-4),
    "42M": Case(8, 8, 96, 160, 1e-5),
    "42M, bf16": Case(8, 8, 96, 160, 1e-5, True),
}


def model_and_problems(case: str, folder: Path) -> tuple[Path, Path]:
    if case == "demo":
        if not (DEMO / "sft" / "hf").is_dir():
            raise SystemExit(f"{DEMO / 'sft' / 'hf'} is missing: run `make demo` first")
        return DEMO / "sft" / "hf", DEMO / "data" / "train.jsonl"
    from tools.tiny_models import make_tiny_model

    model = make_tiny_model(
        folder / "model",
        "qwen2",
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    problems = folder / "problems.jsonl"
    rows = [{"question": f"{i} + {i} = ", "answer": str(2 * i)} for i in range(256)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, problems


def ours(case: Case, model: Path, problems: Path, folder: Path, steps: int, tensor: int) -> dict:
    """{phase: median seconds} of `megatron-dgpo train`."""
    import yaml

    settings = {
        "run": {"dir": str(folder / "run"), "steps": steps},
        "model": {"path": str(model), "dtype": "bfloat16" if case.bf16 else "float32"},
        "parallel": {"tensor": tensor},
        "batch": {"micro_batch_tokens": 16384},
        "optimizer": {"lr": case.lr},
        "algorithm": {"tau": 0.02},
        "rollout": {
            "prompts_per_step": case.prompts,
            "group_size": case.group,
            "max_response_tokens": case.response_tokens,
            "context_tokens": case.context_tokens,
        },
        "servers": {"max_concurrent": case.prompts * case.group},
        "data": {"train": str(problems)},
        "reward": {"grader": "exact", "workers": 1},
        "checkpoint": {"every": 1000},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_dgpo.cli", "train", str(folder / "config.yaml")]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (folder / "run" / "metrics" / "train.jsonl").read_text().splitlines()]
    rows = [row for row in rows if 1 < row["step"] < steps]
    names = [name for name in rows[0] if name.startswith("time/") and name.endswith("_s")]
    found = {name[5:-2]: statistics.median(row[name] for row in rows) for name in names if "tokens" not in name}
    return found | {"response_length": statistics.mean(row["rollout/response_length"] for row in rows)}


def theirs(case: Case, model: Path, problems: Path, steps: int) -> dict:
    """Of TRL, in this process."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from megatron_dgpo.data import load_tokenizer

    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    data = Dataset.from_list([{"prompt": row["question"], "answer": row["answer"]} for row in rows])
    tokenizer = load_tokenizer(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    lengths = []

    def exact(completions, answer, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(text.strip().endswith(right)) for text, right in zip(completions, answer, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=case.bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=case.prompts * case.group,
            num_generations=case.group,
            max_completion_length=case.response_tokens,
            temperature=1.0,
            # Any above 0 has it pass through the reference.
            beta=0.01,
            learning_rate=case.lr,
            max_steps=steps,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
        )
        trainer = GRPOTrainer(
            str(model), exact, settings, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
        )
        trainer.train()
    return {"step": statistics.median(seconds[1:-1]), "response_length": statistics.mean(lengths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, required=True, help="a folder with TRL and what it needs, as above")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks of the trainer here")
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, problems = map(Path, arguments.child.split(":"))
        print(json.dumps(theirs(CASES[arguments.case[0]], model, problems, arguments.steps)))
        return
    table = Table(
        "case", "trainer", "s a step", "tokens a response", "of it: sampling", "reference", "update", "weights"
    )
    results = []
    for name in arguments.case or CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            model, problems = model_and_problems(name, folder)
            mine = ours(case, model, problems, folder, arguments.steps, arguments.tensor)
            command = [sys.executable, __file__, "--trl", arguments.trl, "--steps", str(arguments.steps)]
            command += ["--case", name, "--child", f"{model}:{problems}"]
            path = os.pathsep.join([str(arguments.trl.resolve()), str(ROOT)])
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
            )
            other = json.loads(done.stdout.splitlines()[-1])
        phases = (f"{mine[phase]:.2f}" for phase in ("rollout", "reference", "policy", "weights"))
        table.add_row(name, "here", f"{mine['step']:.2f}", f"{mine['response_length']:.0f}", *phases)
        table.add_row(name, "TRL", f"{other['step']:.2f}", f"{other['response_length']:.0f}", "", "", "", "")
        table.add_row(name, "times", f"{other['step'] / mine['step']:.2f}", "", "", "", "", "")
        results.append({"case": name, "here": mine, "trl": other})
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
