"""What holds for all tests: quiet threads, Triton's interpreter, nothing left behind, the longest files first."""

import importlib
import multiprocessing.util
import os
import shutil

import pytest

# Of all that tests start, too: threads that spin while they wait for one another crawl where several tests share cores.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels, and its own library of them, run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("megatron_dgpo.statistics.fused")
    # Not for the servers that tests start.
    del os.environ["TRITON_INTERPRET"]

from tests.leftovers import nothing_left, own_temporary_folder  # noqa: E402

_TEMPORARY = own_temporary_folder()

# First, the longest at the head: a worker that begins one of these files last would be alone with it. They mostly wait,
# for SLURM and for servers and ranks that start, while another worker computes.
_LONG = (
    *("slurm/test_jobs", "test_train", "test_rollouts", "test_resume", "rollout/test_shards", "rollout/test_fleet"),
    "statistics/test_vocab_parallel",
)

# What `make check` leaves out, by what it needs; all else takes two minutes.
_TIERS = {
    "slurm": ("slurm/",),
    "server": (
        *(
            "test_train",
            "test_rollouts",
            "test_examples",
            "rollout/test_shards",
            "rollout/test_fleet",
            "rollout/test_server",
        ),
        "weights/test_convert",
    ),
    "slow": (
        *("test_resume", "test_oracle", "test_session", "test_check_gpu", "fuzz/", "model/"),
        *("statistics/", "planning/", "rollout/test_transfer", "weights/test_round_trip", "rewards/test_pool"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def module_leaves_nothing():
    """Nor what its tests share, which may replace its own processes as it likes: those are looked for here alone."""
    with nothing_left():
        yield


@pytest.fixture(autouse=True)
def test_leaves_nothing(module_leaves_nothing):
    with nothing_left(processes=False):
        yield


def pytest_collection_modifyitems(config, items):
    if "soak" not in config.option.markexpr:
        soak = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]

    def place(item) -> int:
        return next((i for i, name in enumerate(_LONG) if item.nodeid.startswith(f"tests/{name}.py")), len(_LONG))

    items.sort(key=place)
    for item in items:
        for tier, files in _TIERS.items():
            if item.nodeid.startswith(tuple(f"tests/{file}" for file in files)):
                item.add_marker(tier)


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0:
        # Its own folder among them, which it would look for later.
        multiprocessing.util._run_finalizers()
        shutil.rmtree(_TEMPORARY, ignore_errors=True)


def pytest_report_header():
    return f"temporary files: {_TEMPORARY} (kept after a failure)"
