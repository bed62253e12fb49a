"""Checkpoints: the same run after a kill, whatever was half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_dgpo.config import Run
from megatron_dgpo.data import PromptOrder
from megatron_dgpo.manifest import candidates
from megatron_dgpo.metrics import read_metrics
from megatron_dgpo.stop import STOPPED
from tests.commands import run_on_ranks
from tests.layouts import LAYOUTS
from tests.leftovers import left_in_shared_memory
from tests.test_docs import undocumented
from tools.tiny_models import make_tiny_model

STEPS = 4
RECORDED_STEPS = 12
RESPONSES = 4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A tiny model, problems, and rollouts of a pretended earlier run: replay needs no server."""
    folder = tmp_path_factory.mktemp("recorded")
    make_tiny_model(folder / "model", "qwen2", num_hidden_layers=4)
    make_tiny_model(folder / "mixture", "qwen3_moe", num_hidden_layers=2)
    problems = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(8)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    generator = torch.Generator().manual_seed(0)
    (folder / "rollouts").mkdir()
    order = PromptOrder(8, Run().seed, shuffle=True)
    for step in range(1, RECORDED_STEPS + 1):
        rows = []
        for position in range(8 * (step - 1), 8 * step):
            prompt = order.row(position)
            for place in range(RESPONSES):
                length = 3 + (prompt + place + step) % 6
                tokens = torch.randint(3, 131, (length,), generator=generator).tolist()
                rows.append(
                    dict(
                        position=position,
                        prompt=prompt,
                        token_ids=tokens,
                        logprobs=[-4.0] * length,
                        finish_reason="stop",
                        versions=[[step - 1, 0, length]],
                        text="",
                        reward=float((prompt + place) % 3 == 0),
                        failure=None,
                    )
                )
        (folder / "rollouts" / f"step_{step:08d}.0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def write_config(recorded: Path, run_dir: Path, parallel: dict, **sections) -> Path:
    settings = {
        "run": {"dir": str(run_dir), "steps": STEPS},
        "model": {"path": str(recorded / "model"), "dtype": "float32"},
        "parallel": parallel,
        "batch": {"micro_batch_tokens": 40, "minibatches": 2},
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 1},
        "algorithm": {"tau": 0.02},
        "rollout": {
            "prompts_per_step": 8,
            "group_size": RESPONSES,
            "context_tokens": 32,
            "max_response_tokens": 16,
            "replay": str(recorded / "rollouts"),
        },
        "data": {"train": str(recorded / "problems.jsonl")},
        "reward": {"grader": "exact", "workers": 1},
        "checkpoint": {"every": 1, "keep": 2},
    }
    for name, values in sections.items():
        settings[name] |= values
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def command(config: Path, *overrides: str, name: str = "train") -> list[str]:
    return [sys.executable, "-m", "megatron_dgpo.cli", name, str(config), *overrides]


def run(config: Path, *overrides: str) -> str:
    """All of it, without the launcher; returns what its ranks said."""
    run_on_ranks("train", config, *overrides)
    return "".join(path.read_text() for path in (config.with_suffix("") / "logs").glob("*.log"))


def weights(config: Path) -> dict[str, torch.Tensor]:
    return load_file(config.with_suffix("") / "hf" / "model.safetensors")


def assert_identical(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


RESUMED = {
    "tp1": ("model", {}),
    "tp2-pp2": ("model", LAYOUTS["tp2-pp2"][1]),
    "cp2-dp2-distributed-optimizer": ("model", {"context": 2, "data": 2, "distributed_optimizer": True}),
    "ep2-distributed-optimizer": ("mixture", {"data": 2, "expert": 2, "distributed_optimizer": True}),
}


@pytest.mark.parametrize("layout", RESUMED)
def test_resumed_run_is_bit_identical(recorded, tmp_path, layout):
    model, parallel = RESUMED[layout]
    # Written while the next step is made, or before it.
    sections = {"model": {"path": str(recorded / model)}, "checkpoint": {"asynchronous": "pp2" in layout}}
    whole = write_config(recorded, tmp_path / "whole", parallel, **sections)
    run(whole)
    assert [path.name for path in candidates(tmp_path / "whole" / "checkpoints")] == ["step_00000004", "step_00000003"]

    # Stopped after step 3; then the newest checkpoint turns out damaged, and one was never finished.
    parts = write_config(recorded, tmp_path / "parts", parallel, model={"path": str(recorded / model)})
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "parts" / "checkpoints")
    newest = tmp_path / "parts" / "checkpoints" / "step_00000004"
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    half_written = tmp_path / "parts" / "checkpoints" / "step_00000005"
    half_written.mkdir()
    (half_written / "common.pt").write_bytes(b"cut")
    logs = run(parts)
    assert "step_00000004 is passed over" in logs and shard.name in logs
    assert "step_00000005 is passed over" in logs
    assert_identical(weights(whole), weights(parts))
    rows = read_metrics(tmp_path / "parts" / "metrics" / "train.jsonl")
    assert [row["step"] for row in rows][-1] == 4


def test_killed_run_continues_with_the_same_command(recorded, tmp_path):
    whole, killed = (write_config(recorded, tmp_path / name, {"tensor": 2}) for name in ("whole", "killed"))
    run(whole)
    process = subprocess.Popen(command(killed), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 300
    while not candidates(checkpoints):
        assert time.monotonic() < deadline and process.poll() is None, "no checkpoint within 300 s"
        time.sleep(0.02)
    # The launcher alone, while its ranks' checkpoint writers may be at work.
    process.kill()
    process.wait()
    wait_until_gone(tmp_path)
    result = subprocess.run(command(killed), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_identical(weights(whole), weights(killed))
    steps = [row["step"] for row in read_metrics(tmp_path / "killed" / "metrics" / "train.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def test_a_dead_rank_ends_the_run_with_its_name(recorded, tmp_path):
    config = write_config(recorded, tmp_path / "run", {"tensor": 2}, run={"steps": STEPS})
    process = subprocess.Popen(
        command(config), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    rank = wait_for_process(tmp_path, RANK="1")
    time.sleep(2)
    os.kill(rank, signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    assert "rank 1 ended (SIGKILL)" in errors
    wait_until_gone(tmp_path)


def test_a_run_asked_to_stop_saves_and_continues(recorded, tmp_path):
    """A signal to every process, as SLURM sends it, and to the launcher alone, as a user does."""
    sections = dict(run={"steps": RECORDED_STEPS}, checkpoint={"every": 100})
    whole, asked = (write_config(recorded, tmp_path / name, {"tensor": 2}, **sections) for name in ("whole", "asked"))
    metrics = tmp_path / "asked" / "metrics" / "train.jsonl"
    run(whole)
    for number, everyone in ((signal.SIGTERM, True), (signal.SIGUSR1, False)):
        process = subprocess.Popen(command(asked), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        rows = len(read_metrics(metrics))
        wait_for_rows(metrics, rows + 1)
        for pid in processes(tmp_path) if everyone else [process.pid]:
            os.kill(pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == STOPPED, errors
        assert b"the same command continues the run" in errors
        [newest, *_] = candidates(tmp_path / "asked" / "checkpoints")
        last = read_metrics(metrics)[-1]["step"]
        assert newest.name == f"step_{last:08d}" and rows <= last < RECORDED_STEPS
        assert not (tmp_path / "asked" / "hf").exists()
        wait_until_gone(tmp_path)
    run(asked)
    assert_identical(weights(whole), weights(asked))


def wait_for_rows(metrics: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(read_metrics(metrics)) < count:
        assert time.monotonic() < deadline, f"{metrics} has not got {count} rows within 300 s"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_run_leaves_nothing(recorded, tmp_path, number):
    shared_memory = set(Path("/dev/shm").iterdir())
    config = write_config(recorded, tmp_path / "run", {"tensor": 2})
    process = subprocess.Popen(
        command(config), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_process(tmp_path, RANK="1")
    time.sleep(1 if number == signal.SIGINT else 5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}" in errors
    wait_until_gone(tmp_path)
    assert left_in_shared_memory(shared_memory) == []


def test_non_finite_steps_are_skipped_and_then_stop_the_run(recorded, tmp_path):
    """Old log-probs of minus infinity make every ratio infinite."""
    rollouts = tmp_path / "rollouts"
    shutil.copytree(recorded / "rollouts", rollouts)
    for file in rollouts.iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        # A NaN reward cannot come from a grader; it stands for whatever poisons a loss.
        file.write_text("".join(json.dumps(row | {"reward": float("nan")}) + "\n" for row in rows))
    config = write_config(
        recorded, tmp_path / "run", {}, rollout={"replay": str(rollouts)}, optimizer={"max_skipped_steps": 3}
    )
    result = subprocess.run(command(config), capture_output=True, text=True, timeout=240)
    assert result.returncode != 0
    assert "3 optimizer steps in a row had a non-finite loss or gradient" in result.stderr
    assert "skipped" in result.stdout
    assert not (tmp_path / "run" / "hf").exists()


def test_several_rewards_are_trained_for(recorded, tmp_path):
    """Replayed on two replicas, and weighed anew."""
    rollouts = tmp_path / "rollouts"
    shutil.copytree(recorded / "rollouts", rollouts)
    for file in rollouts.iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for place, row in enumerate(rows):
            row["components"] = {"right": row["reward"], "brief": (5 * place % 8) / 8}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = dict(
        run={"steps": 1},
        rollout={"replay": str(rollouts)},
        algorithm={"credit": "uniform", "advantage": "decoupled", "conflict": 0.2, "group_weight": "difficulty"},
        reward={"grader": "tests.rewards.graders:several", "weights": {"brief": 0.5, "right": 1}},
    )
    config = write_config(recorded, tmp_path / "run", {"data": 2}, **sections)
    run(config)
    [_, row] = read_metrics(tmp_path / "run" / "metrics" / "train.jsonl")
    right, brief = row["rollout/reward/right"], row["rollout/reward/brief"]
    # Of 32 responses, whose numbers the halves of 8 divide evenly.
    assert brief == pytest.approx(7 / 16) and row["rollout/accuracy"] == right
    assert row["rollout/reward"] == pytest.approx(right + brief / 2)
    assert row["policy/grad_norm"] > 0 and 0 < row["policy/counted_share"] < 1
    assert not undocumented(row)
    # A run whose rewards have other names is refused in a sentence.
    result = subprocess.run(
        command(config, "reward.weights={wrong: 1}", f"run.dir={tmp_path / 'other'}"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 2
    assert "has the rewards right, brief, and reward.weights names wrong" in result.stderr


def test_fine_tuning_stops_after_skipped_steps_too(recorded, tmp_path):
    """A NaN weight: no step can be made, and what comes out would be the model that went in."""
    poison(recorded / "model", tmp_path / "model", ("model.norm.weight", 3))
    solutions = [{"question": "1+1", "response": "2"}] * 8
    (tmp_path / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solutions))
    config = write_config(recorded, tmp_path / "run", {}, model={"path": str(tmp_path / "model")})
    sft = [f"sft.data={tmp_path / 'solutions.jsonl'}", "sft.steps=6", "sft.batch_size=4"]
    result = subprocess.run(command(config, *sft, name="sft"), capture_output=True, text=True, timeout=240)
    assert result.returncode != 0
    assert "3 optimizer steps in a row had a non-finite loss or gradient" in result.stderr
    assert "skipped" in result.stdout and "loss nan" in result.stdout
    rows = read_metrics(tmp_path / "run" / "metrics" / "sft.jsonl")
    assert [(row["policy/loss"], row["policy/skipped_steps"]) for row in rows] == [(None, 1), (None, 1)]
    assert not (tmp_path / "run" / "hf").exists()


def test_a_run_continues_with_new_settings_and_not_with_other_weights(recorded, tmp_path):
    config = write_config(recorded, tmp_path / "run", {}, run={"steps": 2})
    run(config)
    other = make_tiny_model(tmp_path / "other", "qwen2", num_hidden_layers=4, seed=1)
    for changed, sentence in {
        f"model.path={other}": f"model.path={other} holds other weights than {recorded / 'model'}, the starting policy",
        f"model.reference={other}": f"model.reference={other} holds other weights",
        "run.steps=1": "run.steps=1, but this run has done 2 steps",
        "run.seed=2": "run.seed=2, but it is 1 in the run",
    }.items():
        result = subprocess.run(command(config, changed), capture_output=True, text=True, timeout=120)
        assert result.returncode == 2 and sentence in result.stderr, result.stderr
    moved = tmp_path / "moved"
    shutil.copytree(recorded / "model", moved)
    said = run(config, f"model.path={moved}", "run.steps=3", "optimizer.lr=0.5", "optimizer.schedule=constant")
    told = [line for line in said.splitlines() if "with other settings" in line]
    paths = [f"{name} {recorded / 'model'} → {moved}" for name in ("model.path", "model.reference")]
    assert len(told) == 1 and told[0].startswith("warning: resumed at step 2 with other settings: ")
    assert set(told[0].split(": ", 2)[2].split(", ")) == {
        "run.steps 2 → 3", "optimizer.lr 0.001 → 0.5", "optimizer.schedule cosine → constant", *paths
    }  # fmt: skip
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["steps_done"] for start in starts] == [0, 2]
    rows = read_metrics(tmp_path / "run" / "metrics" / "train.jsonl")
    rates = [row["policy/lr"] for row in rows if row["step"]]
    assert rates[-1] == 0.5 > max(rates[:-1])


def poison(model: Path, target: Path, place: tuple) -> None:
    """Copy a model and make one value, (name of its tensor, *index), NaN."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    tensors[place[0]][place[1:]] = torch.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_check_finite_names_what_is_not(recorded, tmp_path):
    model = tmp_path / "model"
    poison(recorded / "model", model, ("model.embed_tokens.weight", 1, 3))
    config = write_config(
        recorded, tmp_path / "run", {"tensor": 2}, run={"check_finite": True}, model={"path": str(model)}
    )
    result = subprocess.run(command(config), capture_output=True, text=True, timeout=240)
    assert result.returncode != 0
    assert "head_weight holds nan at vocabulary row 1 (" in result.stderr


def processes(folder: Path) -> list[int]:
    """Of a command started in `folder`: its children inherit that, whatever they call themselves."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def wait_for_process(folder: Path, **environment: str) -> int:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for pid in processes(folder):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if all(f"{name}={value}".encode() in variables for name, value in environment.items()):
                return pid
        time.sleep(0.1)
    raise TimeoutError(f"no process with {environment} within 240 s")


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while processes(folder):
        assert time.monotonic() < deadline, f"processes are left running: {processes(folder)}"
        time.sleep(0.1)
