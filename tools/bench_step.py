"""What each rule of credit adds to a training step over GRPO with the same reference pass (paper, of DGPO: 3.6 %).

    python tools/bench_step.py --json benchmarks/step.json

One step is: reference hidden states, policy forward and backward over micro-batches, optimizer. GRPO's here computes
log π(a) and H(π) of the policy and log ρ(a) of the reference, as for its KL term; the rules' compute the deviation
beside them in the same pass (FIPO's, which would need no reference, too), and credit weights. Rollouts, which cost all
the same, are left out: the share of a whole step is smaller. All take turns on the same random responses; each one's
fastest round counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_dgpo.algorithm.objective import Objective, Signal, policy_objective
from megatron_dgpo.algorithm.resolve import resolved_algorithm
from megatron_dgpo.config import Config
from megatron_dgpo.micro_batch import TrainingSequence
from megatron_dgpo.model.device import backend, init_device
from megatron_dgpo.model.packed import pack_micro_batches
from megatron_dgpo.model.parallel import initialize_parallel
from megatron_dgpo.model.policy import Policy
from megatron_dgpo.model.reference import Reference
from megatron_dgpo.statistics import token_statistics
from megatron_dgpo.weights.architectures import read_architecture

_COLUMNS = 4096

BASELINE = "GRPO"
RULES = {
    "DGPO": {"tau": 0.02},
    "DGPO, effective share": {"tau_mode": "effective_share"},
    "DGPO, alpha 0.3": {"tau": 0.02, "deviation": "alpha", "deviation_alpha": 0.3},
    "DGPO, KL": {"tau": 0.02, "deviation": "kl"},
    "DGPO, largest entropy": {"tau": 0.02, "entropy_norm": "response_max"},
    "FIPO": {"credit": "future_kl"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    model: dict
    responses: int
    micro_batch: int
    prompt_tokens: int
    response_tokens: int


CASES = {
    # The model and the batch of examples/arithmetic.
    "demo": Case(
        dict(vocab_size=20, hidden_size=128, intermediate_size=768, num_hidden_layers=3)
        | dict(num_attention_heads=4, num_key_value_heads=2),
        256,
        256,
        8,
        40,
    ),
    "100M": Case(
        dict(vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=11)
        | dict(num_attention_heads=12, num_key_value_heads=4),
        8,
        2,
        32,
        96,
    ),
}


def reference_logprobs(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log ρ(a), [N], and nothing more, in tiles as well: what a KL term needs of the reference."""
    lse = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    for start in range(0, len(head), _COLUMNS):
        lse = torch.logaddexp(lse, torch.logsumexp((hidden @ head[start : start + _COLUMNS].t()).float(), -1))
    return (hidden * head[targets]).sum(-1).float() - lse


def grpo_loss(reference: Reference, config: Config, vocab_size: int):
    def loss(batch, hidden_states, head_weight):
        found = token_statistics(hidden_states, head_weight, batch.targets, temperature=1.0, vocab_size=vocab_size)
        with torch.no_grad():
            reference_logprobs(batch.reference_states, reference.head_weight, batch.targets)
        signal = Signal(found, found.logprobs.detach(), torch.ones_like(found.logprobs))
        return policy_objective(signal, batch, resolved_algorithm(config))

    return loss


def measure(name: str, case: Case, folder: Path, rounds: int) -> dict:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**case.model, tie_word_embeddings=True))
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder / name)
    config = Config.model_validate(
        {
            "model": {"path": folder / name, "dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
            "data": {"train": "none"},
        }
    )
    architecture = read_architecture(config.model.path)
    policy, reference = Policy(config, architecture, 1000), Reference(config, architecture)
    policy.load(config.model.path)
    vocabulary = case.model["vocab_size"]
    tokens = torch.randint(vocabulary, (case.responses, case.prompt_tokens + case.response_tokens)).tolist()
    sequences = [
        TrainingSequence.of(row[: case.prompt_tokens], row[case.prompt_tokens :], advantage)
        for row, advantage in zip(tokens, torch.randn(case.responses).tolist(), strict=True)
    ]
    parts = [sequences[first : first + case.micro_batch] for first in range(0, case.responses, case.micro_batch)]
    micro_batches = pack_micro_batches(parts, config.parallel)
    losses = {BASELINE: grpo_loss(reference, config, vocabulary)}
    for rule, settings in RULES.items():
        ruled = config.model_copy(update={"algorithm": config.algorithm.model_copy(update=settings)})
        losses[rule] = Objective(ruled, architecture.vocab_size, reference.head_weight, tp_group=None)

    def step(rule: str) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        # step() ends by reading the metrics: nothing is left in flight.
        policy.step(reference.attach(micro_batches), losses[rule])
        return time.perf_counter() - start

    times: dict[str, list[float]] = {rule: [] for rule in losses}
    for rule in (*losses, *losses):
        step(rule)
    for round_index in range(rounds):
        # Whose turn is first changes from round to round.
        order = deque(losses)
        order.rotate(round_index)
        for rule in order:
            times[rule].append(step(rule))
    fastest = {rule: min(found) for rule, found in times.items()}
    return {
        "case": name,
        "parameters": parameters,
        "tokens": case.responses * case.response_tokens,
        "seconds": fastest,
        "adds": {rule: seconds / fastest[BASELINE] - 1 for rule, seconds in fastest.items() if rule != BASELINE},
        # How far a rule's own rounds are from its fastest, as the middle one of them.
        "noise": max(statistics.median(found) / min(found) - 1 for found in times.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=list(CASES), action="append")
    arguments = parser.parse_args()
    console = Console()
    table = Table("model", "parameters", "response tokens", "rule", "s", "adds")
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init_device()
        dist.init_process_group(backend(), init_method=f"file://{folder}/group", rank=0, world_size=1)
        config = Config.model_validate({"model": {"path": "none"}, "data": {"train": "none"}})
        initialize_parallel(config.parallel, 1)
        for case in arguments.case or CASES:
            result = measure(case, CASES[case], folder, arguments.rounds)
            results.append(result)
            sizes = case, f"{result['parameters'] / 1e6:.1f} M", f"{result['tokens']:,}"
            for rule, seconds in result["seconds"].items():
                share = f"{result['adds'][rule]:.1%}" if rule in result["adds"] else ""
                table.add_row(*sizes, rule, f"{seconds:.3f}", share)
        dist.destroy_process_group()
    console.print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
