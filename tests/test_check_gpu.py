"""tools/check_gpu.py: what it runs on a CPU, what it leaves out, and what a crash costs."""

import json
import os
import subprocess
import sys

import pytest

from tests.ranks import run_ranks
from tools import check_gpu
from tools.check_gpu import FAILED, ROOT, Check
from tools.gpu_checks import models
from tools.gpu_checks.line import PASSED, Task

PATIENCE = "10"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of the smallest checks of two kinds, with some that a CPU cannot run."""
    folder = tmp_path_factory.mktemp("check_gpu")
    only = ("statistics float32", "model mixtral", "IPC")
    command = [sys.executable, "tools/check_gpu.py", "--device", "cpu", "--json", str(folder / "report.json")]
    command += ["--patience", PATIENCE, *(part for name in only for part in ("--only", name))]
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(folder / "tmp") == []
    return done.stdout, json.loads((folder / "report.json").read_text())


def test_report_has_a_line_for_each_result_and_a_reason_for_each_that_is_missing(report):
    printed, found = report
    lines = {f"{entry['check']}: {line['name']}": line for entry in found["checks"] for line in entry["lines"]}
    passed = {name for name, line in lines.items() if line["status"] == "passed"}
    assert {"model mixtral portable: log-probs, float32", "model mixtral portable: training step, float32"} <= passed
    assert "statistics float32: chunked: the paper's loss" in passed
    assert lines["statistics float32: Triton kernels"]["detail"] == "they need a GPU"
    assert lines["server, weights by CUDA IPC: all"]["detail"] == "needs a GPU"
    assert (found["passed"], found["failed"], found["skipped"]) == (len(passed), 0, len(lines) - len(passed))
    assert all(name in printed for name in lines)


def test_report_says_of_which_machine_and_versions(report):
    _, found = report
    assert found["device"] == "cpu" and found["gpus"] == [] and found["processor"] and found["date"]
    assert found["packages"]["megatron-core"].startswith("megatron-core ")
    # It is to be committed.
    assert str(ROOT) not in json.dumps(found) and sys.prefix not in json.dumps(found)


def both_dtypes(folder):
    return list(models.model(Task("cuda", folder), "qwen2", "portable"))


def test_a_model_is_compared_in_both_dtypes_by_one_process(tmp_path):
    """As on a GPU, in which a CPU run compares float32 alone."""
    [lines] = run_ranks(both_dtypes, 1, tmp_path, joined=False)
    assert [line.status for line in lines] == [PASSED] * 4, lines
    assert {f"log-probs, {dtype}" for dtype in ("float32", "bfloat16")} < {line.name for line in lines}


@pytest.mark.parametrize(
    "how, name, detail",
    [
        ("crash", "process", "SIGSEGV"),
        ("error", "process", "exit status 1: no such file: CHECK/weights"),
        ("hang", "time limit", "not done after 5 s"),
    ],
)
def test_a_crash_or_a_hang_costs_what_was_not_said_yet(tmp_path, how, name, detail):
    found = check_gpu.run(Check("bad", "tests.crashing_check:check", (how,), 5), "cpu", tmp_path / "bad")
    if how == "hang":
        # On a busy machine the time may be up before it says anything.
        found = [line for line in found if line.name != "before"]
    else:
        assert found.pop(0).name == "before"
    [line] = found
    assert line.status == FAILED and line.name == name and detail in line.detail


@pytest.mark.parametrize(
    "check, device, gpus, reason",
    [
        (Check("te", "", needs=("no_such_module",)), "cuda", 1, "no_such_module is not installed"),
        (Check("two", "", ranks=2), "cuda", 1, "needs 2 GPUs, this machine has 1"),
        (Check("two", "", ranks=2), "cuda", 2, None),
        (Check("two", "", ranks=2), "cpu", 0, None),
        (Check("nccl", "", gpus=2), "cpu", 0, "needs 2 GPUs"),
        (Check("gloo", "", only_cpu=True), "cuda", 8, "is for CPUs"),
    ],
)
def test_what_a_machine_cannot_run_is_skipped_with_the_reason(check, device, gpus, reason):
    assert check_gpu.obstacle(check, device, gpus) == reason


def test_a_gpu_that_pytorch_does_not_see_is_an_error():
    with pytest.raises(SystemExit, match="sees no GPU here; --device cpu"):
        check_gpu.choose_device("cuda", {"gpus": [], "torch": "2.13.0", "cuda": None})
