"""Before anything imports Triton: without a GPU its kernels, and its own library of them, run in its interpreter."""

import importlib
import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("megatron_dgpo.statistics.fused")
    # Not for the servers that tests start.
    del os.environ["TRITON_INTERPRET"]

from tests.leftovers import nothing_left, own_temporary_folder  # noqa: E402

_TEMPORARY = own_temporary_folder()


@pytest.fixture(scope="module", autouse=True)
def module_leaves_nothing():
    """Nor what its tests share, which may replace its own processes as it likes: those are looked for here alone."""
    with nothing_left():
        yield


@pytest.fixture(autouse=True)
def test_leaves_nothing(module_leaves_nothing):
    with nothing_left(processes=False):
        yield


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0:
        shutil.rmtree(_TEMPORARY, ignore_errors=True)


def pytest_report_header():
    return f"temporary files: {_TEMPORARY} (kept after a failure)"
