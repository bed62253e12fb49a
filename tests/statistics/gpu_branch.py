"""Runs the statistics' GPU branch without a GPU, and compiles each of its kernel launches for real ones.

    python -m tests.statistics.gpu_branch       # JSON of `Outcome`s; a process of its own, without Triton's interpreter

Tensors are on PyTorch's meta device and say that they are on a GPU: every operation checks shapes and dtypes and
computes nothing. A launch compiles the kernel from the arguments that it is given, as a GPU's would, and runs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megatron_dgpo.statistics import fused, token_statistics
from megatron_dgpo.statistics.vocab_parallel import TILE_BYTES

ARCHITECTURES = (80, 90, 100)
HIDDEN = 64


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    """One rank's share."""
    dtype: str = "bfloat16"
    reference: bool = True
    entropy: bool = False
    """Whether the loss has an entropy bonus."""
    main_grad: bool = True
    alpha: float | None = 0.5
    """Of the deviation; None: KL."""


# Vocabularies: 152,064 of Qwen2.5-7B and larger, whole and over 8 ranks; 151,936 of Qwen3; 128,256 of Llama 3 over 4
# ranks; 32,000 of Mistral; 50,257, whose last tile is 1,105 columns wide, which no vector divides.
CASES = {
    "paper": Case(4096 + 904, 152_064),
    "entropy bonus": Case(4096, 152_064 // 8, entropy=True),
    "one token": Case(1, 151_936),
    "no tokens": Case(0, 151_936),
    "GRPO": Case(100, 128_256 // 4, reference=False),
    "float32": Case(100, 32_000, dtype="float32", entropy=True, main_grad=False),
    "float16": Case(100, 32_000, dtype="float16", main_grad=False),
    "odd vocabulary": Case(100, 50_257, entropy=True),
    "KL": Case(100, 152_064 // 8, alpha=None),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compilers made of one kernel for one architecture."""

    kernel: str
    arguments: str
    architecture: int
    block: int
    """Columns of a row that the 256 threads of a program hold."""
    registers: int
    stack_bytes: int
    """Spilled registers are there."""
    local_bytes: int
    shared_bytes: int
    loads: list[int]
    """32-bit words of each load a thread makes."""
    aligned: bool
    """Rows start at multiples of 16 elements."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one case; shapes and dtypes as text."""

    case: Case
    values: list[str]
    gradients: dict[str, str]
    in_main_grad: bool
    products: int
    """Of low-precision factors into float32: addmm with out_dtype."""
    launches: dict[str, int]
    compiled: list[Compiled]


class _Target:
    """A Triton driver with a device of each architecture, numbered by it; nothing is ever launched."""

    current = ARCHITECTURES[0]

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.current, 32)


class _Launches:
    """Stands for a kernel, counts its launches and compiles each for every architecture (once: Triton remembers)."""

    def __init__(self, kernel, target: _Target) -> None:
        self._kernel, self._target = kernel, target
        self.name = kernel.fn.__name__
        self.count, self.compiled = 0, {}

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.count += 1
            for self._target.current in ARCHITECTURES:
                binary = self._kernel.warmup(*args, grid=grid, **options)
                self.compiled[binary.hash] = (binary, self._target.current, args, options)

        return launch


def run(case: Case, target: _Target) -> Outcome:
    """Statistics and gradients of `case`, forward and backward."""
    dtype = getattr(torch, case.dtype)

    def tensor(*shape, dtype=dtype, grad=False):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

    hidden, head = tensor(case.tokens, HIDDEN, grad=True), tensor(case.vocab, HIDDEN, grad=True)
    if case.main_grad:
        head.main_grad, head.grad_added_to_main_grad = tensor(case.vocab, HIDDEN, dtype=torch.float32), False
    reference = (tensor(case.tokens, HIDDEN), tensor(case.vocab, HIDDEN)) if case.reference else (None, None)
    kernels = [_Launches(fused._sums, target), _Launches(fused._gradient, target)]
    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)),
        mock.patch.object(fused, "_sums", kernels[0]),
        mock.patch.object(fused, "_gradient", kernels[1]),
        mock.patch.object(torch, "addmm", _counted(torch.addmm)) as addmm,
    ):
        values = token_statistics(
            hidden,
            head,
            tensor(case.tokens, dtype=torch.int64),
            temperature=0.7,
            vocab_size=case.vocab,
            reference_hidden_states=reference[0],
            reference_head_weight=reference[1],
            alpha=case.alpha,
            tile_bytes=TILE_BYTES["cuda"],
        )
        (values.logprobs.sum() + (values.entropy.sum() if case.entropy else 0)).backward()
    leaves = {"hidden": hidden, "head": head}
    return Outcome(
        case=case,
        values=[_described(value) for value in values],
        gradients={name: _described(leaf.grad) for name, leaf in leaves.items()},
        in_main_grad=getattr(head, "grad_added_to_main_grad", False),
        products=addmm.count,
        launches={kernel.name: kernel.count for kernel in kernels},
        compiled=[_inspect(kernel.name, *found) for kernel in kernels for found in kernel.compiled.values()],
    )


def _counted(function):
    @functools.wraps(function)
    def call(*args, **options):
        call.count += 1
        return function(*args, **options)

    call.count = 0
    return call


def _described(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _inspect(name: str, binary, architecture: int, args: tuple, options: dict) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    shapes = [str(list(a.shape) if torch.is_tensor(a) else a) for a in args]
    return Compiled(
        kernel=name,
        arguments=f"{', '.join(shapes)}, {options}",
        architecture=architecture,
        block=options["COLUMNS"],
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        local_bytes=int(usage["LOCAL"]),
        shared_bytes=binary.metadata.shared,
        loads=[int(words or 1) for words in re.findall(r"ld\.global(?:\.v(\d))?\.b32", binary.asm["ptx"])],
        aligned=args[0].stride(0) % 16 == 0,
    )


def main() -> None:
    target = _Target()
    driver.set_active(target)
    json.dump({name: dataclasses.asdict(run(case, target)) for name, case in CASES.items()}, sys.stdout)


if __name__ == "__main__":
    main()
