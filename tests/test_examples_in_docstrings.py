"""The worked examples in docstrings give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["algorithm.credit", "balance", "layout", "micro_batch", "weights.resharding"])
def test_examples(name):
    results = doctest.testmod(importlib.import_module(f"megatron_dgpo.{name}"))
    assert results.attempted and not results.failed
