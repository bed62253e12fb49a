"""The loss's statistics: against their definition in float64, and against the time that they cannot do without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from megatron_dgpo.statistics import dense_statistics, token_statistics
from tools.gpu_checks.line import PASSED, SKIPPED, Line, Task, within

TEMPERATURE = 0.7
# float32: rounding of sums over the hidden size. bfloat16: values are made of the same rounded inputs, with float32
# sums, while gradients are rounded to 8 bits before their products.
BOUNDS = {
    "float32": {"values": 1e-4, "gradients": 1e-4},
    "bfloat16": {"values": 1e-4, "gradients": 1e-2},
}
# Qwen2.5-32B's head: on one rank, and one of 8's.
SPEED_SIZES = {"cuda": [(4096, 5120, 152_064 // 8), (16384, 5120, 152_064 // 8), (4096, 5120, 152_064)]}
SPEED_SIZES["cpu"] = [(256, 64, 4000)]


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    vocab: int
    reference: bool = True
    entropy: bool = True
    """Whether the loss has an entropy bonus."""
    logits: float = 1.0
    """Their standard deviation, about."""
    alpha: float | None = 0.5
    """Of the deviation; None: KL."""


# Tiles of 4,096 tokens by 4,096 columns: several, whole and cut.
CASES = {
    "cuda": {
        "the paper's loss": Case(4200, 512, 152_064 // 8),
        "no reference, no entropy bonus": Case(1000, 512, 32_000, reference=False, entropy=False),
        "one token": Case(1, 512, 152_064),
        "KL": Case(1000, 512, 32_000, alpha=None),
        "odd vocabulary, large logits": Case(500, 512, 50_257, logits=100.0),
    },
    "cpu": {
        "the paper's loss": Case(50, 32, 5000),
        "no reference, no entropy bonus": Case(50, 32, 5000, reference=False, entropy=False),
        "one token": Case(1, 32, 5000),
        "KL": Case(50, 32, 5000, alpha=None),
        "odd vocabulary, large logits": Case(50, 32, 4999, logits=100.0),
    },
}


def against_float64(task: Task, dtype: str) -> Iterator[Line]:
    device = torch.device(task.device)
    for tier in ("chunked", "triton"):
        if tier == "triton" and not task.on_gpu:
            yield Line("Triton kernels", SKIPPED, "they need a GPU")
            continue
        for name, case in CASES[task.device].items():
            errors = compare(case, tier, device, getattr(torch, dtype))
            scale = {"values": case.logits, "gradients": 1.0}
            bounds = {what: bound * scale[what] for what, bound in BOUNDS[dtype].items()}
            yield within(f"{tier}: {name}", errors, bounds, "float64")


def compare(case: Case, tier: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of a value, and of a gradient relative to its norm."""
    tensors, targets = _inputs(case, device, dtype)
    found, gradients = _fast(case, tier, tensors, targets)
    expected, expected_gradients = _dense(case, tensors, targets)
    pairs = zip(found, expected, strict=True)
    values = [(a - b).abs().max().item() for a, b in pairs if b is not None]
    relative = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(gradients, expected_gradients, strict=True)]
    return {"values": max(values), "gradients": max(relative)}


def _inputs(case: Case, device: torch.device, dtype: torch.dtype):
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device)

    head = random(case.vocab, case.hidden) * case.logits / case.hidden**0.5
    hidden = random(case.tokens, case.hidden)
    tensors = {
        "hidden": hidden,
        "head": head,
        "reference_hidden": hidden + 0.3 * random(case.tokens, case.hidden),
        "reference_head": head + 0.1 * case.logits * random(case.vocab, case.hidden) / case.hidden**0.5,
    }
    targets = torch.randint(case.vocab, (case.tokens,), generator=generator, device=device)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}, targets


def _objective(case: Case, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A different weight for every token."""
    weights = torch.linspace(0.5, 1.5, len(logprobs), dtype=logprobs.dtype, device=logprobs.device)
    return (logprobs * weights).sum() + (0.3 * (entropy * weights).sum() if case.entropy else 0)


def _fast(case: Case, tier: str, tensors: dict, targets: torch.Tensor):
    hidden, head = (tensors[name].clone().requires_grad_() for name in ("hidden", "head"))
    # As in training: Megatron owns the head's gradient, in float32.
    head.main_grad, head.grad_added_to_main_grad = torch.zeros(head.shape, device=head.device), False
    values = token_statistics(
        hidden,
        head,
        targets,
        temperature=TEMPERATURE,
        vocab_size=case.vocab,
        reference_hidden_states=tensors["reference_hidden"] if case.reference else None,
        reference_head_weight=tensors["reference_head"] if case.reference else None,
        alpha=case.alpha,
        tier=tier,
    )
    _objective(case, values.logprobs, values.entropy).backward()
    return values, [hidden.grad, head.main_grad]


def _dense(case: Case, tensors: dict, targets: torch.Tensor):
    hidden, head = (tensors[name].double().requires_grad_() for name in ("hidden", "head"))
    x = hidden @ head.t()
    y = tensors["reference_hidden"].double() @ tensors["reference_head"].double().t() if case.reference else None
    values = dense_statistics(x / TEMPERATURE, targets, None if y is None else y / TEMPERATURE, case.alpha)
    _objective(case, *values[:2]).backward()
    values = [None if value is None else value.detach() for value in values]
    return values, [hidden.grad, head.grad]


def speed(task: Task) -> Iterator[Line]:
    """Never fails by its figures: what they should be is known for no GPU yet."""
    from tools import bench_statistics as bench

    device = torch.device(task.device)
    dtype = torch.bfloat16 if task.on_gpu else torch.float32
    with bench.one_rank():
        limits = bench.limits(device, dtype)
        found = f"copies {limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s, products {limits['product_flops'] / 1e12:,.2f} "
        yield Line("limits of this device", PASSED, f"{found}TFLOP/s in {str(dtype)[6:]}", limits)
        yield _kernels(task, device, limits)
        for size in SPEED_SIZES[task.device]:
            # Compiling takes longer than everything else.
            rows = bench.measure(size, device, dtype, 5 if task.on_gpu else 1, without=("naive, torch.compile",))
            yield _compared(size, rows, limits)


def _kernels(task: Task, device: torch.device, limits: dict) -> Line:
    from tools import bench_statistics as bench

    if not task.on_gpu:
        return Line("Triton kernels", SKIPPED, "they need a GPU")
    rates = bench.kernel_rates(device)
    shares = {name.removesuffix("_bytes_per_s"): rate / limits["copy_bytes_per_s"] for name, rate in rates.items()}
    found = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return Line("Triton kernels", PASSED, f"of the copy's bytes/s: {found}", rates)


def _compared(size: tuple[int, int, int], rows: list, limits: dict) -> Line:
    """The floor and ours beside what others take, all over the floor; the rest of the table is in the JSON file."""
    by_name = {row.method: row for row in rows}
    best = min((row for row in rows if row.step_s and row.method in ("ours, chunked", "ours, triton")), key=_step)
    parts = [f"ours {best.of_floor:.2f} × the bare products ({best.tflops * 1e12 / limits['product_flops']:.0%} of the"]
    parts[0] += f" product limit, {best.extra_mib:,.0f} MiB extra)"
    for method, row in by_name.items():
        if method.startswith(("naive PyTorch", "PyTorch", "Liger")):
            took = f"{row.of_floor:.2f} ×, {row.extra_mib:,.0f} MiB" if row.step_s else row.note
            parts.append(f"{method}: {took}")
    name = "N = {:,}, H = {:,}, V = {:,}".format(*size)
    return Line(name, PASSED, "; ".join(parts), {"rows": [asdict(row) for row in rows]})


def _step(row) -> float:
    return row.step_s
