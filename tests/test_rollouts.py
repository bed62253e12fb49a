"""Groups in flight of real runs on two real servers: the same prompts, each once and in time, whatever is killed."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from megatron_dgpo.config import Run
from megatron_dgpo.data import PromptOrder
from megatron_dgpo.metrics import read_metrics
from megatron_dgpo.stop import STOPPED
from tests.test_docs import undocumented
from tests.test_resume import processes, wait_until_gone
from tools.tiny_models import make_tiny_model

PROMPTS, STALENESS = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("rollouts")
    rows = [{"question": f"{i}+{j}=", "answer": str(i + j)} for i in range(5) for j in range(5)]
    (found / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found / "graders.py").write_text(
        "def parity(response, answer, row):\n    return float(sum(map(ord, response)) % 2)\n"
    )
    make_tiny_model(found / "model", "qwen2")
    return found


def write_config(folder, run_dir, steps, **sections):
    settings = {
        "run": {"dir": str(run_dir), "steps": steps},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "batch": {"micro_batch_tokens": 256},
        "optimizer": {"lr": 1e-3},
        "algorithm": {"tau": 0.05},
        "rollout": {
            "prompts_per_step": PROMPTS,
            "group_size": 4,
            "context_tokens": 160,
            "max_response_tokens": 120,
            "record": True,
            "max_staleness": STALENESS,
        },
        "servers": {"count": 2, "stall_timeout_s": 60},
        "data": {"train": str(folder / "problems.jsonl")},
        "reward": {"grader": "graders:parity", "workers": 1},
        "checkpoint": {"every": 2},
    }
    for section, values in sections.items():
        settings[section] = settings.get(section, {}) | values
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(config, folder):
    run_dir = Path(yaml.safe_load(config.read_text())["run"]["dir"])
    run_dir.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "megatron_dgpo.cli", "train", str(config)]
    # Children inherit the working folder, by which they are found.
    return subprocess.Popen(
        command,
        cwd=run_dir,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def recorded(run_dir, step):
    rows = [
        json.loads(line)
        for file in (run_dir / "rollouts").glob(f"step_{step:08d}.*.jsonl")
        for line in file.read_text().splitlines()
    ]
    return sorted(rows, key=lambda row: row["position"])


def check_steps(run_dir, steps):
    """Each step has the next prompts in order, and its tokens are of weights within the bound."""
    order = PromptOrder(25, Run().seed, True)
    for step in range(1, steps + 1):
        rows = recorded(run_dir, step)
        positions = range(PROMPTS * (step - 1), PROMPTS * step)
        assert [row["position"] for row in rows] == [position for position in positions for _ in range(4)]
        assert all(row["prompt"] == order.row(row["position"]) for row in rows)
        versions = {version for row in rows for version, _, _ in row["versions"]}
        assert versions <= set(range(max(0, step - 1 - STALENESS), step)), step


def ended(process, timeout_s=400):
    _, errors = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, errors
    return errors


def begun(process, metrics, begin, steps):
    """Wait until the run has made so many steps more than those it goes on from."""
    deadline, wanted = time.monotonic() + 400, math.inf
    while process.poll() is None and len(read_metrics(metrics)) < wanted:
        if wanted == math.inf and metrics.exists() and metrics.stat().st_mtime > begin:
            wanted = len(read_metrics(metrics)) + steps
        assert time.monotonic() < deadline, "training did not begin within 400 s"
        time.sleep(0.05)


def kill_everything(process, run_dir, before_start):
    for pid in [process.pid, *processes(run_dir)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_until_gone(run_dir)
    # With nobody left to remove it.
    for left in temporary_folders() - before_start:
        shutil.rmtree(left)


def temporary_folders():
    return set(Path(tempfile.gettempdir()).glob("dgpo-*"))


def test_killed_at_any_moment_no_prompt_is_lost_or_trained_twice(folder):
    """MEGATRON_DGPO_KILLS: how often."""
    kills = int(os.environ.get("MEGATRON_DGPO_KILLS", 1))
    steps = 8 if kills == 1 else 6 * kills
    run_dir = folder / "killed"
    config, generator = write_config(folder, run_dir, steps), random.Random(0)
    before: dict[int, dict] = {}
    reached = []
    for _ in range(kills):
        metrics, begin, before_start = run_dir / "metrics" / "train.jsonl", time.time(), temporary_folders()
        process = start(config, folder)
        # Some time after it began, or after some new steps, in whatever it does then.
        begun(process, metrics, begin, generator.choice((0, 2, 4)))
        time.sleep(generator.uniform(0, 3))
        assert process.poll() is None or kills == 1, "it ended before it was killed"
        kill_everything(process, run_dir, before_start)
        before |= {row["step"]: row for row in read_metrics(metrics)}
        reached.append(max(before, default=0))
    print(f"killed after steps {reached}")
    ended(start(config, folder), timeout_s=400 + 10 * steps)
    check_steps(run_dir, steps)
    after = {row["step"]: row for row in read_metrics(run_dir / "metrics" / "train.jsonl")}
    assert sorted(after) == list(range(steps + 1)) and not undocumented(after[steps])
    # Steps that were repeated trained on the same groups, read from the journal, from the same weights.
    for step in before.keys() & after.keys() - {0}:
        for name in ("rollout/reward", "rollout/tokens", "policy/loss", "policy/grad_norm", "policy/entropy"):
            assert before[step][name] == after[step][name], (step, name)


def test_a_killed_run_goes_on_with_more_replicas(folder):
    """What one replica's journal has, two train on; nothing is lost or asked for twice."""
    run_dir, steps = folder / "resized", 6
    # No checkpoint: every step comes again.
    config = write_config(folder, run_dir, steps, checkpoint={"every": 100})
    before_start, begin = temporary_folders(), time.time()
    process = start(config, folder)
    begun(process, run_dir / "metrics" / "train.jsonl", begin, 4)
    kill_everything(process, run_dir, before_start)
    done = read_metrics(run_dir / "metrics" / "train.jsonl")[-1]["step"]
    before = {step: recorded(run_dir, step) for step in range(1, done + 1)}
    ended(start(write_config(folder, run_dir, steps, checkpoint={"every": 100}, parallel={"data": 2}), folder))
    check_steps(run_dir, steps)
    assert len(list((run_dir / "rollouts").glob(f"step_{steps:08d}.*.jsonl"))) == 2
    for step, rows in before.items():
        assert [(row["token_ids"], row["logprobs"]) for row in recorded(run_dir, step)] == [
            (row["token_ids"], row["logprobs"]) for row in rows
        ], step


def test_servers_die_and_hang_and_the_run_goes_on(folder):
    """SIGKILL of an API process, of the other server's engine, SIGSTOP of an engine: each is replaced, and is a member
    again; no group is lost, doubled, or of weights that may not train its step."""
    run_dir = folder / "faults"
    slow = "import time\ndef slow(response, answer, row):\n    time.sleep(0.15)\n"
    (folder / "slow.py").write_text(slow + "    return float(sum(map(ord, response)) % 2)\n")
    config = write_config(
        folder,
        run_dir,
        1000,
        servers={"count": 2, "stall_timeout_s": 20, "max_restarts": 6},
        reward={"grader": "slow:slow", "workers": 1},
        checkpoint={"every": 1000},
    )
    process = start(config, folder)
    metrics = run_dir / "metrics" / "train.jsonl"

    def until(reached, what):
        deadline = time.monotonic() + 400
        while not reached(rows := read_metrics(metrics)):
            assert process.poll() is None and time.monotonic() < deadline, what
            time.sleep(0.2)
        return len(rows)

    until(lambda rows: len(rows) > 2, "training did not begin")
    for name, number in (("api", signal.SIGKILL), ("engine", signal.SIGKILL), ("engine", signal.SIGSTOP)):
        servers = [pid for pid in processes(run_dir) if _is_server(pid)]
        assert len(servers) == 2
        server = servers[number == signal.SIGKILL and name == "engine"]
        os.kill(server if name == "api" else _engine_of(server), number)
        at = len(read_metrics(metrics))
        # It is lost, and then a member again.
        until(lambda rows, at=at: any(r["weights/servers"] == 1 for r in rows[at:]), f"{name} {number.name}: not lost")
        until(lambda rows, at=at: rows[-1]["weights/servers"] == 2, f"{name} {number.name}: not replaced")
    done = len(read_metrics(metrics)) - 1
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == STOPPED, errors
    rows = read_metrics(metrics)
    check_steps(run_dir, done)
    assert sum(row.get("rollout/requests_lost", 0) for row in rows) > 0
    assert max(row["weights/canary_logprob_gap"] for row in rows[1:]) < 1e-4
    wait_until_gone(run_dir)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_soak(folder):
    """Two replicas and two servers, whose processes are killed or stopped every few seconds, and graders that hang."""
    run_dir, seconds = folder / "soak", float(os.environ.get("MEGATRON_DGPO_SOAK_S", 600))
    hanging = (
        "import random, time\ndef hanging(response, answer, row):\n    time.sleep(60 * (random.random() < 0.01))\n"
    )
    (folder / "hanging.py").write_text(hanging + "    return float(sum(map(ord, response)) % 2)\n")
    config = write_config(
        folder,
        run_dir,
        100_000,
        parallel={"data": 2},
        servers={"count": 2, "stall_timeout_s": 20, "max_restarts": 10_000},
        reward={"grader": "hanging:hanging", "workers": 2, "timeout_s": 5},
        checkpoint={"every": 50},
    )
    process, generator = start(config, folder), random.Random(0)
    metrics, end = run_dir / "metrics" / "train.jsonl", time.monotonic() + seconds
    steps, moved = 0, time.monotonic()
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(generator.uniform(5, 15))
        if (done := len(read_metrics(metrics))) > steps:
            steps, moved = done, time.monotonic()
            servers = [pid for pid in processes(run_dir) if _is_server(pid)]
            with contextlib.suppress(ProcessLookupError, ValueError, OSError):
                victim = generator.choice(servers)
                if generator.random() < 0.5:
                    os.kill(victim, signal.SIGKILL)
                else:
                    os.kill(_engine_of(victim), generator.choice([signal.SIGKILL, signal.SIGSTOP]))
        assert time.monotonic() - moved < 600, "no step for ten minutes"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == STOPPED, errors
    check_steps(run_dir, steps - 1)
    wait_until_gone(run_dir)


def _is_server(pid):
    with contextlib.suppress(OSError):
        return b"vllm.entrypoints" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _engine_of(server):
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    [engine] = [pid for pid, name in names.items() if "EngineCore" in name]
    return engine
