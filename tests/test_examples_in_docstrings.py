"""The worked examples in docstrings give what they say."""

import doctest
import importlib

import pytest

MODULES = ["algorithm.credit", "balance", "layout", "micro_batch", "planning.hardware", "throughput"]


@pytest.mark.parametrize("name", [*MODULES, "weights.resharding"])
def test_examples(name):
    results = doctest.testmod(importlib.import_module(f"megatron_dgpo.{name}"))
    assert results.attempted and not results.failed
