"""Time and memory of the loss's statistics against the products they cannot do without, and against others' ways.

    python tools/bench_statistics.py --json benchmarks/statistics.json

The floor is the bare matrix products: policy and reference forward, and for the backward pass the policy's logits once
more and two gradient products; 4·N·V·H and 6·N·V·H operations. What a method keeps beyond inputs and gradients is its
extra memory. Every method of a size runs in turn, several rounds, in this one process; each one's fastest round counts,
because a shared machine only ever adds to a time. `V` is
one tensor-parallel rank's share of the vocabulary: the all-gather between ranks is not part of these figures.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_dgpo.model.device import init_device
from megatron_dgpo.statistics import token_statistics

QWEN = 152_064
# (N, H, V): Qwen2.5-32B's head at TP 1, 2 and 8.
GPU_SIZES = [(n, 5120, QWEN // tp) for tp in (1, 2, 8) for n in (1024, 4096, 16384, 32768)]
# Qwen2.5-0.5B's head; 32B's at TP 8; Llama 2's vocabulary.
CPU_SIZES = [(512, 896, QWEN), (512, 5120, QWEN // 8), (1024, 2048, 32_000)]


@dataclass
class Row:
    n: int
    hidden: int
    vocab: int
    method: str
    forward_s: float | None = None
    step_s: float | None = None
    """Forward and backward."""
    of_floor: float | None = None
    """step_s over the floor's."""
    tflops: float | None = None
    """The floor's operations over step_s."""
    extra_mib: float | None = None
    note: str = ""


Backward = Callable[[], None]


@dataclass
class Inputs:
    hidden: torch.Tensor
    head: torch.Tensor
    reference_hidden: torch.Tensor
    reference_head: torch.Tensor
    targets: torch.Tensor

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden.detach().requires_grad_(), self.head.detach().requires_grad_()


def make_inputs(n: int, hidden: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    states, reference_states = (torch.randn(n, hidden, device=device, dtype=dtype) for _ in range(2))
    head = torch.randn(vocab, hidden, device=device, dtype=dtype).div_(hidden**0.5)
    reference_head = head + 0.1 * torch.randn_like(head).div_(hidden**0.5)
    return Inputs(states, head, reference_states, reference_head, torch.randint(vocab, (n,), device=device))


# Each method goes forward over the inputs and returns what goes backward.


def products(reference: bool = True) -> Callable:
    """Into memory that is kept: what a first touch of fresh pages costs is no part of a floor."""
    kept: dict[str, torch.Tensor] = {}

    def product(name: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if name not in kept:
            kept[name] = left @ right
        return torch.mm(left, right, out=kept[name])

    def run(inputs: Inputs) -> Backward:
        logits = product("logits", inputs.hidden, inputs.head.t())
        if reference:
            product("logits", inputs.reference_hidden, inputs.reference_head.t())

        def backward() -> None:
            product("logits", inputs.hidden, inputs.head.t())
            product("grad_hidden", logits, inputs.head)
            product("grad_head", logits.t(), inputs.hidden)

        return backward

    return run


def ours(tier: str, reference: bool = True) -> Callable:
    def run(inputs: Inputs) -> Backward:
        hidden, head = inputs.leaves()
        # As in the trainer: Megatron's DDP owns a float32 gradient buffer.
        head.main_grad, head.grad_added_to_main_grad = _main_grad(head), False
        values = token_statistics(
            hidden,
            head,
            inputs.targets,
            temperature=1.0,
            vocab_size=len(head),
            reference_hidden_states=inputs.reference_hidden if reference else None,
            reference_head_weight=inputs.reference_head if reference else None,
            tier=tier,
        )
        return values.logprobs.sum().backward

    return run


_buffers: dict[torch.Size, torch.Tensor] = {}


def _main_grad(head: torch.Tensor) -> torch.Tensor:
    if head.shape not in _buffers:
        _buffers.clear()
        _buffers[head.shape] = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
    return _buffers[head.shape]


def _naive(hidden, head, reference_hidden, reference_head, targets):
    log_pi = torch.log_softmax((hidden @ head.t()).float(), -1)
    log_rho = torch.log_softmax((reference_hidden @ reference_head.t()).float(), -1)
    with torch.no_grad():
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        hellinger2 = 1 - ((log_pi + log_rho) / 2).exp().sum(-1)
    chosen = log_pi.gather(-1, targets[:, None])[:, 0]
    return chosen, entropy, hellinger2, log_rho.gather(-1, targets[:, None])[:, 0]


def naive(function: Callable = _naive) -> Callable:
    def run(inputs: Inputs) -> Backward:
        hidden, head = inputs.leaves()
        chosen, *_ = function(hidden, head, inputs.reference_hidden, inputs.reference_head, inputs.targets)
        return chosen.sum().backward

    return run


def megatron(inputs: Inputs) -> Backward:
    """Megatron's vocab-parallel cross entropy, which overwrites its logits, with entropy and Hellinger beside it."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    hidden, head = inputs.leaves()
    logits = (hidden @ head.t()).float()
    with torch.no_grad():
        log_pi = torch.log_softmax(logits, -1)
        log_rho = torch.log_softmax((inputs.reference_hidden @ inputs.reference_head.t()).float(), -1)
        _ = -(log_pi.exp() * log_pi).sum(-1), 1 - ((log_pi + log_rho) / 2).exp().sum(-1)
        del log_pi, log_rho
    loss = vocab_parallel_cross_entropy(logits[None], inputs.targets[None])
    return loss.sum().backward


def pytorch(inputs: Inputs) -> Backward:
    """Cross entropy only, in PyTorch's chunks; its forward pass makes the gradients, too."""
    hidden, head = inputs.leaves()
    loss = torch.nn.functional.linear_cross_entropy(
        hidden, head, inputs.targets, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    )
    return loss.backward


def liger(inputs: Inputs) -> Backward:
    """Cross entropy only: no reference, no entropy. Its forward pass makes the gradients, too."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, head = inputs.leaves()
    loss = liger_fused_linear_cross_entropy(hidden, head, inputs.targets, reduction="sum")
    return loss.backward


def apple(inputs: Inputs) -> Backward:
    """Cut Cross-Entropy: no reference, no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, head = inputs.leaves()
    loss = linear_cross_entropy(hidden, head, inputs.targets, reduction="sum")
    return loss.backward


def methods(device: torch.device) -> dict[str, Callable | str]:
    """A string says why a method cannot run here."""

    def needs(module: str, function: Callable) -> Callable | str:
        if device.type != "cuda":
            return "needs a GPU"
        return function if importlib.util.find_spec(module) else "not installed"

    return {
        "floor: bare products": products(),
        "floor without reference": products(reference=False),
        "ours, chunked": ours("chunked"),
        "ours, triton": needs("triton", ours("triton")),
        "ours without reference (GRPO)": ours("auto", reference=False),
        "naive PyTorch": naive(),
        "naive, torch.compile": naive(torch.compile(_naive)),
        "Megatron cross entropy + naive": megatron,
        "PyTorch linear_cross_entropy (cross entropy only)": (
            pytorch if hasattr(torch.nn, "LinearCrossEntropyOptions") else "not in this PyTorch"
        ),
        "Liger (cross entropy only)": needs("liger_kernel", liger),
        "Apple CCE (cross entropy only)": needs("cut_cross_entropy", apple),
    }


class PeakMemory:
    """Bytes above the start: of the allocator on GPUs, of the process (the kernel's high-water mark) on CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._start = _status("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        end = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        self.bytes = max(0, end - self._start)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def timed(run: Callable, inputs: Inputs) -> tuple[float, float]:
    """Seconds of the forward pass, and of forward and backward."""
    synchronize = torch.cuda.synchronize if inputs.hidden.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    backward = run(inputs)
    synchronize()
    middle = time.perf_counter()
    backward()
    synchronize()
    return middle - start, time.perf_counter() - start


def measure(
    size: tuple[int, int, int], device: torch.device, dtype: torch.dtype, rounds: int, without: tuple[str, ...] = ()
) -> list[Row]:
    """without: methods to leave out."""
    n, hidden, vocab = size
    inputs = make_inputs(n, hidden, vocab, device, dtype)
    rows, runs = [], {}
    chosen = {name: run for name, run in methods(device).items() if name not in without}
    for name, run in chosen.items():
        row = Row(n, hidden, vocab, name)
        rows.append(row)
        if isinstance(run, str):
            row.note = run
            continue
        try:
            # The first call compiles and fills caches; the second shows what the method itself takes.
            run(inputs)()
            with PeakMemory(device) as memory:
                run(inputs)()
        except (RuntimeError, ImportError) as error:
            row.note = f"failed: {str(error).splitlines()[0][:80]}"
            continue
        gradients = inputs.hidden.nbytes + (0 if name.startswith("ours") else inputs.head.nbytes)
        row.extra_mib = max(0, memory.bytes - gradients) / 2**20
        runs[name] = (row, run, [])
    for _ in range(rounds):
        for _, run, times in runs.values():
            times.append(timed(run, inputs))
    for row, _, times in runs.values():
        row.forward_s, row.step_s = (min(values) for values in zip(*times, strict=True))
    floor = rows[0].step_s
    for row, _, _ in runs.values():
        row.of_floor = row.step_s / floor
        row.tflops = 10 * n * hidden * vocab / row.step_s / 1e12
    return rows


def summary(rows: list[Row]) -> dict[str, float]:
    """The goals' ratios for one size."""
    by_name = {row.method: row for row in rows if row.step_s}
    best = by_name.get("ours, triton", by_name["ours, chunked"])
    grpo, floor, product = (
        by_name[name] for name in ("ours without reference (GRPO)", "floor: bare products", "floor without reference")
    )
    naive_row = by_name.get("naive PyTorch")
    return {
        "ours_over_floor": best.step_s / floor.step_s,
        "naive_over_ours": naive_row.step_s / best.step_s if naive_row else float("nan"),
        "naive_memory_over_ours": naive_row.extra_mib / max(best.extra_mib, 1) if naive_row else float("nan"),
        # The backward passes are the same.
        "hellinger_beyond_reference_product": (best.forward_s - grpo.forward_s - product.forward_s) / grpo.step_s,
    }


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches: bytes/s of a copy (read and written), and operations/s of a large product."""
    on_gpu = device.type == "cuda"
    source = torch.empty(2**30 if on_gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 512
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / seconds(lambda: target.copy_(source), device),
        "product_flops": 2 * side**3 / seconds(lambda: torch.mm(left, right, out=out), device),
    }


def kernel_rates(device: torch.device) -> dict[str, float]:
    """Bytes/s that the Triton kernels read and write for a full tile of the policy's and the reference's logits."""
    from megatron_dgpo.statistics import fused
    from megatron_dgpo.statistics.vocab_parallel import TILE_ROWS

    n, columns = TILE_ROWS, 4096
    x, y = (torch.randn(n, columns, device=device) for _ in range(2))
    target = torch.randint(columns, (n,), device=device)
    sums = torch.empty(8, n, device=device)
    vectors = [torch.rand(n, device=device) for _ in range(4)]
    forward_s = seconds(lambda: fused.tile_sums(x, y, target, sums, None, 0.5), device)
    backward_s = seconds(lambda: fused.tile_gradient(x, target, *vectors, torch.bfloat16, None), device)
    return {
        "sums_bytes_per_s": (x.nbytes + y.nbytes + sums.nbytes) / forward_s,
        "gradient_bytes_per_s": (x.nbytes + x.nbytes // 2) / backward_s,
    }


def seconds(run: Callable, device: torch.device, calls: int = 10) -> float:
    """Of one of `calls` in a row, after one that does not count; the fastest of three such rows."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    rows = []
    for _ in range(3):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        rows.append((time.perf_counter() - start) / calls)
    return min(rows)


@contextlib.contextmanager
def one_rank():
    """Megatron's groups of a single process: its cross entropy asks for them."""
    from megatron.core import parallel_state

    init_device()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            dist.destroy_process_group()


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def show(rows: list[Row], console: Console) -> None:
    first = rows[0]
    table = Table(title=f"N = {first.n:,}, H = {first.hidden:,}, V = {first.vocab:,}")
    for column in ("method", "forward s", "forward + backward s", "of floor", "TFLOP/s", "extra MiB", ""):
        table.add_column(column, justify="left" if column in ("method", "") else "right")
    for row in rows:
        figures = ["-"] * 5
        if row.step_s:
            figures = [f"{row.forward_s:.4f}", f"{row.step_s:.4f}", f"{row.of_floor:.2f}", f"{row.tflops:.2f}"]
            figures.append(f"{row.extra_mib:,.0f}")
        table.add_row(row.method, *figures, row.note)
    console.print(table)
    console.print({name: round(value, 3) for name, value in summary(rows).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", action="append", help="N,H,V instead of the usual ones; may be repeated")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    if arguments.size:
        sizes = [tuple(int(part) for part in size.split(",")) for size in arguments.size]
    console = Console(width=None if os.isatty(1) else 140)
    header = {"machine": machine(device), "torch": torch.__version__, "dtype": str(dtype), "rounds": arguments.rounds}
    console.print(header)
    results = []
    with one_rank():
        header |= {"limits": limits(device, dtype)}
        if device.type == "cuda" and importlib.util.find_spec("triton"):
            header["limits"] |= kernel_rates(device)
        console.print(header["limits"])
        for size in sizes:
            rows = measure(size, device, dtype, arguments.rounds)
            show(rows, console)
            results += [{"rows": [asdict(row) for row in rows], "summary": summary(rows)}]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**header, "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
