"""Models of every family on one device, or over several: log-probs and a training step against transformers."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_dgpo.algorithm.objective import Objective, of_whole_responses
from megatron_dgpo.config import Config
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.model.collectives import broadcast_from_last_stage
from megatron_dgpo.model.layer_specs import uses_transformer_engine
from megatron_dgpo.model.packed import pack_micro_batches
from megatron_dgpo.model.parallel import context_group, tensor_group
from megatron_dgpo.model.reference import Reference
from megatron_dgpo.session import Session, world
from megatron_dgpo.statistics import token_statistics
from megatron_dgpo.weights.export import FullTensors
from tools.gpu_checks.line import FAILED, Line, Task, within
from tools.oracle import Oracle, dense_step
from tools.tiny_models import MIXTURES, make_tiny_model

VOCAB = 131
TEMPERATURE = 0.8
LAYOUTS = {1: {}, 2: {"tensor": 2, "sequence": True}, 4: {"tensor": 2, "pipeline": 2, "sequence": True}}
# Rounding over four layers; of every tensor's gradient, relative to its norm.
STEP_BOUNDS = {
    "float32": {"loss": 1e-4, "gradients": 1e-3},
    "tf32": {"loss": 1e-2, "gradients": 0.1},
    "bfloat16": {"loss": 0.05, "gradients": 0.2},
}
# transformers rounds to bfloat16 in other places than Megatron: how far each is from float64 differs by chance.
TIMES_TRANSFORMERS = 3
# Transformer Engine multiplies float32 matrices with 10 bits of them (TF32).
LOGPROB_BOUNDS = {"float32": 1e-4, "tf32": 0.05}

Row = tuple[list[int], list[int], float, None]


def model(task: Task, family: str, layer_spec: str, context: str = "1") -> Iterator[Line]:
    layout = {"context": int(context)} if context != "1" else LAYOUTS[task.ranks]
    configs = []
    for dtype in ("float32", "bfloat16") if task.on_gpu else ("float32",):
        # A folder for each rank: they make the same models without waiting for each other.
        folder = task.folder / f"{dtype}_{os.environ['RANK']}"
        policy, reference = (
            make_tiny_model(folder / name, family, vocab_size=VOCAB, dtype=getattr(torch, dtype), seed=seed)
            for seed, name in enumerate(("policy", "reference"))
        )
        configs.append(_config(folder, policy, reference, layer_spec, dtype, layout))
    # One for all: its store listens as long as the process lives.
    with world(configs[0]):
        for config in configs:
            try:
                yield from _compared(config, family)
            except Exception:
                # The other dtype may still work.
                yield Line(config.model.dtype, FAILED, traceback.format_exc().rstrip())


def _compared(config: Config, family: str) -> Iterator[Line]:
    dtype = config.model.dtype
    products = "tf32" if dtype == "float32" and uses_transformer_engine(config.model.layer_spec) else dtype
    with _session(config) as session:
        yield _logprobs(session, products)
        # In bfloat16 some tokens go to other experts than in float64: nothing to compare.
        if dtype == "float32" or family not in MIXTURES:
            yield _step(session, products)


def _config(folder: Path, policy: Path, reference: Path, layer_spec: str, dtype: str, layout: dict) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": folder / "run"},
            "model": {"path": policy, "reference": reference, "dtype": dtype, "layer_spec": layer_spec},
            "parallel": layout,
            "algorithm": {"tau": 0.02},
            # Clipping would scale the gradients that are compared.
            "optimizer": {"clip_grad": 0},
            "rollout": {"temperature": TEMPERATURE},
            "data": {"train": folder / "none.jsonl"},
        }
    )


@contextlib.contextmanager
def _session(config: Config):
    with Session(config, "sft") as session:
        # For the next one of this world.
        session.callback(parallel_state.destroy_model_parallel)
        yield session


def _rows() -> list[Row]:
    """(prompt, response, advantage, no old log-probs) of four responses of different lengths."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    advantages = torch.randn(4, generator=generator).tolist()
    return [(tokens(4 + i % 3), tokens(12 + 5 * i % 11), advantages[i], None) for i in range(4)]


def _micro_batches(session: Session) -> list[MicroBatch]:
    sequences = [TrainingSequence.of(*row) for row in _rows()]
    return pack_micro_batches([sequences[:2], sequences[2:]], session.config.parallel)


def _logprobs(session: Session, products: str) -> Line:
    """Of float64 transformers with the same weights; in bfloat16 compared with how far transformers' own is."""

    def logprobs(batch, hidden_states, head_weight):
        own = token_statistics(
            hidden_states,
            head_weight,
            batch.targets,
            temperature=TEMPERATURE,
            vocab_size=VOCAB,
            tp_group=tensor_group(),
        )
        return of_whole_responses(own.logprobs, batch, context_group()).tolist()

    parts = broadcast_from_last_stage(session.policy.forward(_micro_batches(session), logprobs))
    found = torch.tensor([value for part in parts for value in part], dtype=torch.float64)
    exact = _transformers_logprobs(session.config.model.path, torch.float64, torch.device("cpu"))
    error = (found - exact).abs()
    name = f"log-probs, {products}"
    if products != "bfloat16":
        return within(name, {"largest": error.max().item()}, {"largest": LOGPROB_BOUNDS[products]}, "float64")
    theirs = _transformers_logprobs(session.config.model.path, torch.bfloat16, torch.cuda.current_device())
    mean = (theirs - exact).abs().mean().item()
    errors = {"mean": error.mean().item(), "transformers": mean}
    return within(name, errors, {"mean": TIMES_TRANSFORMERS * mean}, "float64")


@torch.no_grad()
def _transformers_logprobs(path: Path, dtype: torch.dtype, device: torch.device | int) -> torch.Tensor:
    """[N] float64, of the rows' response tokens one after another."""
    from transformers import AutoModelForCausalLM

    # Experts one by one: the grouped product does not take float64.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").to(device)
    found = []
    for prompt, response, _, _ in _rows():
        logits = model(torch.tensor([[*prompt, *response]], device=device)).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.double().cpu() / TEMPERATURE, -1)
        found.append(logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def _step(session: Session, products: str) -> Line:
    """Loss and all gradients of one DGPO step."""
    config = session.config
    reference = Reference(config, session.architecture)
    micro_batches = reference.attach(_micro_batches(session))
    objective = Objective(config, VOCAB, reference.head_weight, tensor_group(), context_group())
    result = session.policy.step(micro_batches, objective)
    oracle = dense_step(config.model.path, config.model.reference, _rows(), config.algorithm, TEMPERATURE, VOCAB)
    errors = {
        "loss": abs(result.metrics["loss"] / result.metrics["normaliser"] - oracle.loss),
        "gradients": max(_gradient_errors(session, oracle)),
    }
    return within(f"training step, {products}", errors, STEP_BOUNDS[products], "float64")


def _gradient_errors(session: Session, oracle: Oracle) -> list[float]:
    """Of every Hugging Face tensor. After a step Megatron's buffers still hold the gradients: read as if weights."""
    for module in session.policy.modules:
        for parameter in module.parameters():
            parameter.data = parameter.main_grad.float()
    gradients = FullTensors(session.policy.modules, session.architecture, torch.float32)
    errors = []
    for name, gradient in gradients:
        expected = oracle.gradients[name]
        errors.append(((gradient.cpu().double() - expected).norm() / expected.norm()).item())
    return errors
