"""The whole loop with a real vLLM server, for every family: trainer, server and transformers agree throughout."""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dgpo import process
from megatron_dgpo.cluster import Node
from megatron_dgpo.config_file import load_config
from megatron_dgpo.metrics import read_metrics
from megatron_dgpo.rollout import guard, server
from megatron_dgpo.weights.convert import Job, convert
from tests.commands import run_on_ranks
from tests.leftovers import left_in_shared_memory
from tests.test_docs import undocumented
from tests.test_resume import processes, wait_until_gone
from tools.tiny_models import make_tiny_model

STEPS = 3
SECRET = secrets.token_urlsafe(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("train")
    rows = [{"question": f"{i}+{j}=", "answer": str(i + j)} for i in range(4) for j in range(4)]
    (found / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A reward that random text earns often: it must vary within groups for the weights to change.
    grader = "def parity(response, answer, row):\n    return float(sum(map(ord, response)) % 2)\n"
    (found / "graders.py").write_text(grader)
    return found


def write_config(folder, family, parallel, transport="auto", sleep=False):
    settings = {
        "run": {"dir": str(folder / family / "run"), "steps": STEPS},
        "model": {"path": str(make_tiny_model(folder / family / "model", family)), "dtype": "float32"},
        "parallel": parallel,
        "batch": {"micro_batch_tokens": 64},
        "optimizer": {"lr": 3e-3},
        "algorithm": {"tau": 0.05},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "context_tokens": 32,
            "max_response_tokens": 12,
            "temperature": 0.8,
            "record": True,
            "request_timeout_s": 120,
        },
        "servers": {"sleep": sleep},
        "weight_sync": {"transport": transport},
        "data": {"train": str(folder / "problems.jsonl"), "eval": str(folder / "problems.jsonl")},
        "reward": {"grader": "graders:parity", "workers": 1},
        "eval": {"every": 1},
    }
    path = folder / family / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@contextlib.contextmanager
def served(config, logs, modules):
    """Servers as the launcher starts them; the variables of its ranks. modules: folder of the grader's."""
    servers, addresses = server.start(load_config(config), SECRET, Node(logs))
    try:
        yield {server.ADDRESSES: ",".join(addresses), guard.SECRET: SECRET, "PYTHONPATH": str(modules)}
    finally:
        process.stop(servers)


@pytest.mark.parametrize(
    "family, parallel, transport, sleep",
    [
        ("llama", {"tensor": 2}, "memory", False),
        ("mistral", {}, "memory", True),
        ("qwen2", {"pipeline": 2, "context": 2}, "shards", False),
        ("qwen3", {"data": 2}, "shards", True),
        ("mixtral", {"context": 2, "expert": 2}, "memory", False),
        ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2}, "shards", False),
    ],
)
def test_three_steps(folder, family, parallel, transport, sleep):
    from transformers import AutoModelForCausalLM

    config = write_config(folder, family, parallel, transport, sleep)
    run = folder / family / "run"
    with served(config, run / "logs", folder) as environment:
        run_on_ranks("train", config, environment=environment, timeout_s=400)
    rows = read_metrics(run / "metrics" / "train.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert not undocumented(name for row in rows for name in row)
    for row in rows[1:]:
        # The server after the update, and the tokens sampled before it, as the trainer computes them.
        assert row["weights/canary_logprob_gap"] < 1e-4
        assert row["policy/rollout_logprob_gap"] < 1e-4
        assert row["policy/grad_norm"] > 0
        assert row["rollout/staleness_max"] == 0
    # A CPU server does all of it but freeing memory. It sleeps while the trainer starts, too.
    log = (run / "logs" / "vllm_0.log").read_text()
    assert log.count("wake up the engine with tags: ['kv_cache']") == (STEPS + 1 if sleep else 0)
    for step in range(1, STEPS + 1):
        recorded = [
            json.loads(line)
            for file in (run / "rollouts").glob(f"step_{step:08d}.*.jsonl")
            for line in file.read_text().splitlines()
        ]
        assert len(recorded) == 16
        assert {version for sample in recorded for version, _, _ in sample["versions"]} == {step - 1}
    # Greedy text of the last weights, served and by transformers from the exported model.
    model = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(folder / family / "model", dtype=torch.float32)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    from megatron_dgpo.data import load_tokenizer

    tokenizer = load_tokenizer(run / "hf")
    for line in (run / "eval" / f"step_{STEPS:08d}.jsonl").read_text().splitlines():
        sample = json.loads(line)
        ids = torch.tensor([tokenizer(sample["question"]).input_ids])
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert sample["token_ids"] == expected[0, ids.shape[1] :].tolist()


def test_eval_of_checkpoint_and_directory(folder):
    """After test_three_steps: the newest checkpoint and the exported model, of either format, are the same policy."""
    config, model = folder / "mistral" / "config.yaml", folder / "mistral" / "run" / "hf"
    convert(Job(model, folder / "megatron", "megatron"))
    few = folder / "few.jsonl"
    few.write_text("".join((folder / "problems.jsonl").read_text().splitlines(keepends=True)[:3]))
    overrides = ["eval.samples=4", "eval.temperature=0.8", "eval.top_p=0.95", "eval.problems=8"]
    overrides += [f"data.eval=[{folder / 'problems.jsonl'}, {few}]"]
    shares = r"avg@4=(\d\.\d+){} pass@2=(\d\.\d+) pass@4=(\d\.\d+)\n"
    of_set = shares.format(r" \[(\d\.\d+), (\d\.\d+)\]")
    of_mean = shares.format("")
    pattern = rf"eval/problems: problems=8 {of_set}eval/few: problems=3 {of_set}eval: mean over 2 sets {of_mean}"
    found = []
    with served(config, folder / "mistral" / "eval", folder) as environment:
        for options in ((), ("--model", str(model)), ("--model", str(folder / "megatron"))):
            log = run_on_ranks("eval", config, *overrides, options=options, environment=environment)
            found.append(re.search(pattern, log.read_text()))
    assert all(found) and len({line[0] for line in found}) == 1
    values = [float(value) for value in found[0].groups()]
    for average, low, high, two, four in (values[:5], values[5:10]):
        assert low <= average <= high and average <= two <= four
    for mean, *both in zip(values[10:], (values[0], *values[3:5]), (values[5], *values[8:10]), strict=True):
        assert mean == pytest.approx(sum(both) / 2, abs=1e-4)
    for name, count in (("problems", 8), ("few", 3)):
        rows = (folder / "mistral" / "run" / "eval" / name / f"step_{0:08d}.jsonl").read_text().splitlines()
        assert [json.loads(row)["prompt"] for row in rows] == [index for index in range(count) for _ in range(4)]


def start_training(folder, name, *overrides):
    """A run that never ends by itself, past its first step."""
    config = write_config(folder, "llama", {})
    run = folder / name
    run.mkdir()
    command = [sys.executable, "-m", "megatron_dgpo.cli", "train", str(config), f"run.dir={run}", "run.steps=1000"]
    command += overrides
    process = subprocess.Popen(command, cwd=run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics" / "train.jsonl"
    # A busy machine takes five times as long as an idle one.
    deadline = time.monotonic() + 400
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline, "training did not begin within 400 s"
        time.sleep(0.1)
    return process, run


def test_a_dead_server_ends_the_run(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(folder))
    process, run = start_training(folder, "dead", "rollout.prompts_per_step=16", "servers.max_restarts=0")
    for pid in processes(run):
        if b"vllm.entrypoints" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 60 and process.returncode != 0
    assert "vLLM server 0 ended (SIGKILL)" in errors
    wait_until_gone(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_server_and_no_shared_memory(folder, monkeypatch, number):
    """Two workers a server: they reduce through shared memory. SIGKILL: of the launcher alone."""
    monkeypatch.setenv("PYTHONPATH", str(folder))
    shared_memory = set(Path("/dev/shm").iterdir())
    process, run = start_training(folder, number.name, "servers.tensor=2")
    # Another worker of the tests takes and leaves some, too.
    assert len(processes(run)) >= 5 and set(Path("/dev/shm").iterdir()) - shared_memory
    process.send_signal(number)
    process.communicate(timeout=60)
    wait_until_gone(run)
    assert left_in_shared_memory(shared_memory) == []
