"""What a GPU would run of the statistics, as far as it can be known without one: see gpu_branch.py."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch

# Of 65,536 a multiprocessor has: at 96 two programs of 256 threads still fit beside each other.
MOST_REGISTERS = 96
# For the reductions over a program's 8 warps, and no tile of logits.
MOST_SHARED_BYTES = 1024

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.statistics.gpu_branch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
def test_gpu_branch_takes_triton_and_float32_sums_for_every_kind_of_loss(outcomes):
    """Shapes and dtypes of what comes out, one launch of each kernel a tile, and its products."""
    assert outcomes
    for name, outcome in outcomes.items():
        case = outcome["case"]
        n, vocab, dtype = case["tokens"], case["vocab"], case["dtype"]
        with_reference = f"float32[{n}]" if case["reference"] else "none"
        assert outcome["values"] == [f"float32[{n}]"] * 2 + [with_reference] * 2, name
        assert outcome["in_main_grad"] == case["main_grad"], name
        assert outcome["gradients"]["hidden"] == f"{dtype}[{n}, 64]", name
        # A placeholder where it is in `main_grad`.
        assert outcome["gradients"]["head"] == f"{dtype}[{vocab}, 64]", name
        tiles = math.ceil(n / 4096) * math.ceil(vocab / 4096)
        assert outcome["launches"] == {"_sums": tiles, "_gradient": tiles}, name
        # Logits of the policy twice, of the reference once, and two gradients.
        products = (5 if case["reference"] else 4) * tiles
        assert outcome["products"] == (0 if dtype == "float32" else products), name


@needs_triton
def test_every_launch_compiles_for_every_gpu_without_spills(outcomes):
    compiled = [kernel for outcome in outcomes.values() for kernel in outcome["compiled"]]
    assert {kernel["architecture"] for kernel in compiled} == {80, 90, 100}
    for kernel in compiled:
        assert kernel["stack_bytes"] == kernel["local_bytes"] == 0, kernel
        assert kernel["registers"] <= MOST_REGISTERS, kernel
        assert kernel["shared_bytes"] <= MOST_SHARED_BYTES, kernel
        if kernel["aligned"]:
            assert max(kernel["loads"]) == min(4, kernel["block"] // 256), kernel


def test_pytorch_has_the_product_of_low_precision_factors_into_float32():
    """Its kernel is CUDA's alone: no test without a GPU reaches it."""
    schema = str(torch.ops.aten.addmm.dtype_out._schema)
    assert "Tensor self" in schema and "ScalarType out_dtype" in schema and "Tensor(a!) out" in schema
