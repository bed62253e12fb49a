"""The sbatch files in a real SLURM: the arithmetic example on several nodes, and everything that ends a job."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dgpo.cluster import DEVICE
from megatron_dgpo.manifest import candidates
from megatron_dgpo.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = "examples/arithmetic/config.yaml"
STEPS = 15
END_S = 60


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    """The example's problems and its untrained model."""
    folder = tmp_path_factory.mktemp("arithmetic")
    prepare = [sys.executable, "examples/arithmetic/prepare.py", "--out", str(folder)]
    subprocess.run(prepare, cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return folder


class Job:
    """The example, a few small steps of it, submitted from the repository as a user would."""

    def __init__(self, slurm, arithmetic: Path, folder: Path, *overrides: str) -> None:
        self.slurm, self.run_dir, self.log = slurm, folder / "run", folder / "job.log"
        # Each node believes that the host's cores are its own.
        slurm.environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.overrides = [
            f"model.path={arithmetic / 'model'}",
            f"data.train={arithmetic / 'train.jsonl'}",
            f"data.eval={arithmetic / 'held_out.jsonl'}",
            *("eval.problems=4", "batch.micro_batch_tokens=64", "optimizer.warmup_steps=1", "checkpoint.every=1000"),
            *("rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.max_response_tokens=16"),
            # As between machines, although both nodes are this one. Responses of an untrained model are seldom right:
            # their digits make a reward that varies.
            *("weight_sync.transport=shards", "rollout.record=true", "reward.grader=tests.slurm.test_jobs:even_digits"),
            *overrides,
        ]

    def submit(self, *options: str, file: str = "slurm/separate.sbatch") -> None:
        """sbatch OPTIONS FILE CONFIG ..."""
        arguments = [f"--output={self.log}", *options, file, CONFIG, f"run.dir={self.run_dir}"]
        self.number = self.slurm.submit(*arguments, *self.overrides, cwd=ROOT)

    def launch(self, *options: str) -> None:
        """megatron-dgpo launch CONFIG OPTIONS ..."""
        command = [
            sys.executable,
            "-m",
            "megatron_dgpo.cli",
            "launch",
            CONFIG,
            *options,
            f"--sbatch=--output={self.log}",
        ]
        command += [f"--sbatch=--output={self.log}", f"run.dir={self.run_dir}", *self.overrides]
        result = subprocess.run(
            command, env=self.slurm.environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        self.number = re.fullmatch(r"submitted as job (\d+)\n", result.stdout)[1]

    @property
    def rows(self) -> list[dict]:
        return read_metrics(self.run_dir / "metrics" / "train.jsonl")

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def minutes(self) -> int:
        """Whole ones that it has run."""
        hours, minutes, _ = self.slurm.job(self.number)["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def wait(self, condition, what: str, limit_s: float = 240) -> float:
        """Seconds until the condition holds; fails with the job's log when it does not in time."""
        start = time.monotonic()
        while not (found := condition()):
            assert time.monotonic() - start < limit_s, f"no {what} within {limit_s:g} s:\n{self.text()[-5000:]}"
            assert self.state() not in ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"), self.text()[-5000:]
            time.sleep(0.2)
        return found and time.monotonic() - start

    def wait_for_end(self, state: str, limit_s: float) -> None:
        """Until SLURM has seen the last of its processes; whatever is left then was not the job's to leave."""
        start = time.monotonic()
        while self.state() != state or self.processes():
            seconds = time.monotonic() - start
            assert seconds < limit_s, f"{self.state()} after {limit_s:g} s: {self.processes()}\n{self.text()}"
            time.sleep(0.2)
        print(f"{state} after {time.monotonic() - start:.1f} s")

    def processes(self, *words: str, **variables: str) -> list[int]:
        """Of the job, by what its environment says; `words` occur in their command lines."""
        wanted = {f"{k}={v}".encode() for k, v in {"SLURM_JOB_ID": self.number, **variables}.items()}
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((entry / "environ").read_bytes().split(b"\0"))
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if wanted <= environment and all(word.encode() in line for word in words):
                found.append(int(entry.name))
        return found


def even_digits(response: str, answer: str, row: dict) -> float:
    return float(sum(character in "02468" for character in response) % 2)


def test_a_preempted_run_is_requeued_and_ends_as_the_same_run(slurm, arithmetic, tmp_path):
    """Two trainer nodes with a tensor-parallel rank each, and one that runs vLLM."""
    job = Job(slurm, arithmetic, tmp_path, "parallel.tensor=2", f"run.steps={STEPS}")
    job.submit("--nodes=3", "--time=20")
    job.wait(lambda: len(job.rows) >= 3, "second step")
    command_lines = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in job.processes())
    [secret] = {secret_of(pid) for pid in job.processes("megatron_dgpo.cli")}
    assert len(secret) == 64 and secret not in command_lines

    slurm.submit("--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1", cwd=tmp_path)
    seconds = job.wait(lambda: slurm.job(job.number)["Restarts"] == "1", "preemption", END_S)
    print(f"saved and requeued {seconds:.1f} s after the job that preempts it was submitted")
    saved = candidates(job.run_dir / "checkpoints")
    assert [path.name for path in saved] == [f"step_{job.rows[-1]['step']:08d}"]
    assert 2 <= job.rows[-1]["step"] < STEPS
    first = job.rows
    job.wait(lambda: job.state() == "COMPLETED", "end")

    rows = job.rows
    assert rows[: len(first)] == first and [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in rows[1:]:
        assert row["rollout/staleness_max"] == 0
        assert row["policy/rollout_logprob_gap"] < 1e-4
    lines = re.findall(rf"^train (\d+)/{STEPS}:.* reward", job.text(), re.MULTILINE)
    assert lines == [str(step) for step in range(1, STEPS + 1)], job.text()
    logs = {str(path.relative_to(job.run_dir / "logs")) for path in (job.run_dir / "logs").rglob("*.log")}
    assert logs == {f"{job.number}.{i}/{name}.log" for i in (0, 1) for name in ("rank_0", "rank_1", "vllm_0")}
    for file in [job.log, *(path for path in job.run_dir.rglob("*") if path.is_file())]:
        assert secret not in file.read_bytes(), file

    # The same run: trained in one piece on the responses that both parts sampled, the weights are the same bits.
    whole = tmp_path / "whole"
    replay = [f"run.dir={whole}", f"rollout.replay={job.run_dir / 'rollouts'}"]
    command = [sys.executable, "-m", "megatron_dgpo.cli", "train", CONFIG]
    command += [*job.overrides, *replay, "rollout.record=false"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240, stdout=subprocess.DEVNULL)
    ours, theirs = (load_file(run / "hf" / "model.safetensors") for run in (job.run_dir, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
    before = load_file(arithmetic / "model" / "model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], ours["model.embed_tokens.weight"])


def secret_of(pid: int) -> bytes:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(v for v in variables if v.startswith(b"MEGATRON_DGPO_SECRET=")).partition(b"=")[2]


def test_time_limit_then_a_killed_server(slurm, arithmetic, tmp_path):
    """In a heterogeneous job. At the limit's warning it saves and requeues itself; later its server is killed."""
    job = Job(slurm, arithmetic, tmp_path, "parallel.tensor=1", "run.steps=100000", "servers.max_restarts=0")
    job.submit("--time=60", "--signal=B:USR1@120", "--nodes=1", ":", "--nodes=1")
    job.wait(lambda: len(job.rows) >= 3, "second step")
    # Between one and two minutes are left then: less than the warning is given before the end.
    slurm.limit(job.number, job.minutes() + 2)
    job.wait(lambda: slurm.job(job.number)["Restarts"] == "1", "requeue at the time limit's warning")
    assert f"job {job.number} is requeued and continues the run" in job.text()
    last = job.rows[-1]["step"]
    assert candidates(job.run_dir / "checkpoints")[0].name == f"step_{last:08d}"
    # Lest the new limit ends the second part, too.
    slurm.limit(job.number, 60)
    job.wait(lambda: job.rows[-1]["step"] > last, "step of the requeued job")
    assert [row["step"] for row in job.rows] == list(range(len(job.rows)))

    [server] = job.processes("vllm.entrypoints")
    os.kill(server, signal.SIGKILL)
    job.wait_for_end("FAILED", END_S)
    text = job.text()
    assert "vLLM server 0 ended (SIGKILL)" in text
    assert text.count("first error:") <= 1, text
    assert slurm.job(job.number)["Restarts"] == "1"


def test_a_killed_rank(slurm, arithmetic, tmp_path):
    """Before vLLM is up: whatever a node is doing, it ends. The other node's rank fails of it, and is not shown."""
    job = Job(slurm, arithmetic, tmp_path, "parallel.tensor=2", "run.steps=100000")
    job.launch("--nodes=2", "--rollout-nodes=1", "--time=20")
    job.wait(lambda: job.processes(RANK="1") and job.processes("vllm.entrypoints"), "rank 1 and a server")
    time.sleep(3)
    os.kill(job.processes("megatron_dgpo", RANK="1")[0], signal.SIGKILL)
    job.wait_for_end("FAILED", END_S)
    assert "rank 1 ended (SIGKILL)" in job.text()
    assert "Traceback" not in job.text()


def test_a_job_that_failed_begins_again_elsewhere_and_only_so_often(slurm, arithmetic, tmp_path):
    job = Job(slurm, arithmetic, tmp_path, "run.steps=100000", "run.restarts=1", "checkpoint.every=1")
    job.submit("--time=20", "--exclude=third", file="slurm/shared.sbatch")
    for start, node in enumerate(("first", "second")):
        job.wait(lambda start=start: slurm.job(job.number)["Restarts"] == str(start), f"start {start}")
        before = len(job.rows)
        job.wait(lambda before=before: len(job.rows) > before + 2, "step")
        assert slurm.job(job.number)["NodeList"] == node, job.text()
        os.kill(job.processes("megatron_dgpo", RANK="0")[0], signal.SIGKILL)
    job.wait_for_end("FAILED", END_S)
    assert job.text().count("rank 0 ended (SIGKILL)") == 2
    assert f"job {job.number} avoids what failed: first" in job.text()
    assert slurm.job(job.number)["ExcNodeList"] == "first,third"
    assert [row["step"] for row in job.rows] == list(range(len(job.rows)))
    assert not list(ROOT.glob(f"slurm-{job.number}.*"))


def test_two_nodes_share_with_their_servers_and_one_evaluates(slurm, arithmetic, tmp_path):
    job = Job(slurm, arithmetic, tmp_path, "run.steps=2", "parallel.tensor=2")
    job.submit("--nodes=2", file="slurm/shared.sbatch")
    job.wait(lambda: job.state() == "COMPLETED", "end of training")
    assert len(job.rows) == 3, job.text()
    assert [row["weights/servers"] for row in job.rows[1:]] == [2, 2]
    assert {log.name for log in job.run_dir.glob("logs/*/vllm_*.log")} == {"vllm_0.log", "vllm_1.log"}
    assert re.search(r"^\w+ 2/2: reward", job.text(), re.MULTILINE)
    job.submit(file="slurm/eval.sbatch")
    job.wait(lambda: job.state() == "COMPLETED", "end of the evaluation")
    assert "eval: problems=4 avg@1=" in job.text(), job.text()


def test_a_job_that_has_gpus_and_sees_none_says_so(slurm, arithmetic, tmp_path):
    """With generic resources: the files ask for GPUs, and SLURM gives them to the job's step."""
    job = Job(slurm, arithmetic, tmp_path)
    del slurm.environment[DEVICE]
    try:
        job.submit(file="slurm/shared.sbatch")
        job.wait_for_end("FAILED", END_S)
    finally:
        slurm.environment[DEVICE] = "cpu"
    assert re.search(r"PyTorch sees no GPU, but SLURM gave this job some \(SLURM_\w+=", job.text()), job.text()


def test_conversion(slurm, arithmetic, tmp_path):
    target, log = tmp_path / "megatron", tmp_path / "job.log"
    slurm.environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    options = ["--wait", "--cpus-per-task=1", f"--output={log}"]
    slurm.submit(*options, "slurm/convert.sbatch", str(arithmetic / "model"), str(target), cwd=ROOT)
    assert (target / "metadata.json").exists() or list(target.glob("*.distcp")), log.read_text()
