"""A bad night, many times over: processes killed one by one, Ctrl-C, damaged checkpoints. Asked for by `-m soak`.

Each run must end with the weights, bit for bit, of one that nothing happened to; nothing may be left of it 20 seconds
after its end (`wait_until_gone`), and what happened must be named wherever somebody is left to name it.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_dgpo.metrics import read_metrics
from tests.leftovers import left_in_shared_memory
from tests.test_resume import assert_identical, processes, recorded, wait_until_gone, weights
from tests.test_resume import write_config as replayed
from tests.test_rollouts import _engine_of, _is_server, folder, write_config

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
_ = folder, recorded

TIMES = {
    name: int(os.environ.get(f"MEGATRON_DGPO_{name}", default))
    for name, default in (("KILLS", 50), ("INTERRUPTS", 20), ("DAMAGES", 20))
}


class Run:
    """The same command, as often as it takes; all that it says goes to a file."""

    def __init__(self, config: Path, *python_path: Path) -> None:
        self.config, self.output = config, config.with_suffix(".out")
        self.folder = Path(yaml.safe_load(config.read_text())["run"]["dir"])
        self.folder.mkdir(exist_ok=True)
        self._python_path = [str(path) for path in python_path]
        self.output.touch()

    def start(self) -> None:
        command = [sys.executable, "-m", "megatron_dgpo.cli", "train", str(self.config)]
        paths = os.pathsep.join([*self._python_path, os.environ.get("PYTHONPATH", "")])
        with self.output.open("a") as file:
            # Children inherit the working folder, by which they are found.
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | {"PYTHONPATH": paths}, stdout=file, stderr=file
            )

    def rows(self) -> list[dict]:
        return read_metrics(self.folder / "metrics" / "train.jsonl")

    def wait(self, condition, what: str, limit_s: float = 400) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {limit_s} s:\n{self.output.read_text()[-3000:]}"
            time.sleep(0.05)

    def wait_for_another_step(self) -> None:
        done = len(self.rows())
        self.wait(lambda: len(self.rows()) > done or self.process.poll() is not None, "step")

    def end(self) -> None:
        """It, and everything that it started."""
        self.wait(lambda: self.process.poll() is not None, "end")
        wait_until_gone(self.folder)

    def victims(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"launcher": [self.process.pid], "rank": [], "server": [], "engine": []}
        found["grader"] = []
        for pid in processes(self.folder):
            with contextlib.suppress(OSError, ValueError):
                if _is_server(pid):
                    found["server"].append(pid)
                    found["engine"].append(_engine_of(pid))
                elif b"megatron_dgpo.rewards.worker" in (line := Path(f"/proc/{pid}/cmdline").read_bytes()):
                    found["grader"].append(pid)
                elif b"megatron_dgpo.cli" in line and pid != self.process.pid:
                    found["rank"].append(pid)
        return found


def test_a_process_is_killed_again_and_again(folder):
    """MEGATRON_DGPO_KILLS: how often; launcher, rank, server, engine and grader in turn, at random moments."""
    kills, generator, before = TIMES["KILLS"], random.Random(0), set(Path("/dev/shm").iterdir())
    run_dir = folder / "killed_one_by_one"
    # More steps than can be made meanwhile; the last start is told how many it shall be.
    sections = {
        "servers": {"count": 1, "max_restarts": 100_000, "stall_timeout_s": 60},
        "rollout": {"max_staleness": 0},
        "parallel": {"tensor": 2},
        "reward": {"grader": "graders:parity", "workers": 2},
        "checkpoint": {"every": 3},
    }
    run = Run(write_config(folder, run_dir, 100_000, **sections), folder)
    run.start()
    names = ["launcher", "rank", "server", "engine", "grader"]
    for number in range(kills):
        if number % len(names) == 0:
            generator.shuffle(names)
        name = names[number % len(names)]
        run.wait_for_another_step()
        time.sleep(generator.uniform(0, 2))
        assert run.process.poll() is None, run.output.read_text()[-3000:]
        run.wait(lambda name=name: run.victims()[name], name)
        pid, said = generator.choice(run.victims()[name]), run.output.stat().st_size
        os.kill(pid, signal.SIGKILL)
        if name in ("launcher", "rank"):
            run.end()
            words = run.output.read_text()[said:]
            assert name == "launcher" or "rank" in words and "ended (SIGKILL)" in words, words
            run.start()
        elif name == "grader":
            run.wait(lambda pid=pid: len(set(run.victims()["grader"]) - {pid}) == 2, "grader in its place")
        else:
            what = "vLLM server 0 ended"
            run.wait(lambda said=said, what=what: what in run.output.read_text()[said:], "word of a server's end")
    run.wait_for_another_step()
    # Before it is told to end, so that it cannot be past that step.
    steps = run.rows()[-1]["step"] + 10
    run.process.send_signal(signal.SIGTERM)
    run.end()
    assert left_in_shared_memory(before) == []
    write_config(folder, run_dir, steps, **sections)
    run.start()
    run.end()
    assert run.process.returncode == 0, run.output.read_text()[-3000:]
    assert [row["step"] for row in run.rows()] == list(range(steps + 1))

    whole = Run(
        write_config(
            folder,
            folder / "killed_one_by_one_whole",
            steps,
            **sections | {"rollout": {"max_staleness": 0, "replay": str(run_dir / "rollouts"), "record": False}},
        ),
        folder,
    )
    whole.start()
    whole.end()
    assert whole.process.returncode == 0, whole.output.read_text()[-3000:]
    assert_identical(weights(run.config), weights(whole.config))


def replay(recorded, run_dir: Path, steps: int) -> Run:
    # A learning rate that does not depend on how many steps there will be.
    return Run(replayed(recorded, run_dir, {"tensor": 2}, run={"steps": steps}, optimizer={"schedule": "constant"}))


def whole_run(recorded, tmp_path, steps: int) -> Run:
    found = replay(recorded, tmp_path / "whole", steps)
    found.start()
    found.end()
    assert found.process.returncode == 0, found.output.read_text()
    return found


def test_ctrl_c_at_any_moment(recorded, tmp_path):
    """MEGATRON_DGPO_INTERRUPTS: how often; from the first line to within a checkpoint."""
    before, generator, slowest = set(Path("/dev/shm").iterdir()), random.Random(1), 0.0
    whole = whole_run(recorded, tmp_path, 4)
    run = replay(recorded, tmp_path / "run", 4)
    interrupted = 0
    while interrupted < TIMES["INTERRUPTS"]:
        said = run.output.stat().st_size
        run.start()
        time.sleep(generator.uniform(1.5, 12))
        if run.process.poll() is not None:
            assert run.process.returncode == 0, run.output.read_text()[said:]
            # It got to its end this time: from the start again.
            shutil.rmtree(run.folder / "checkpoints")
            continue
        interrupted += 1
        began = time.monotonic()
        run.process.send_signal(signal.SIGINT)
        run.end()
        slowest = max(slowest, time.monotonic() - began)
        words = run.output.read_text()[said:]
        assert run.process.returncode in (128 + signal.SIGINT, -signal.SIGINT), (run.process.returncode, words)
        assert "Traceback" not in words, words
    print(f"slowest end after Ctrl-C: {slowest:.1f} s")
    run.start()
    run.end()
    assert run.process.returncode == 0, run.output.read_text()[-3000:]
    assert_identical(weights(run.config), weights(whole.config))
    assert left_in_shared_memory(before) == []


def damage(checkpoint: Path, generator: random.Random) -> str:
    """One file of it, in one of the ways in which files are damaged."""
    file = generator.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    how = generator.choice(["cut", "flipped", "emptied", "removed"])
    data = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    else:
        place = generator.randrange(len(data))
        data[place] ^= 1 << generator.randrange(8)
        file.write_bytes({"cut": data[:place], "flipped": data, "emptied": b""}[how])
    return f"{file.name} {how}"


def test_damaged_checkpoints_are_passed_over(recorded, tmp_path):
    """MEGATRON_DGPO_DAMAGES: how often; the newest checkpoint of two, in any file and way."""
    generator = random.Random(2)
    whole = whole_run(recorded, tmp_path, 4)
    run = replay(recorded, tmp_path / "run", 3)
    run.start()
    run.end()
    kept = tmp_path / "kept"
    (run.folder / "checkpoints").rename(kept)
    replay(recorded, run.folder, 4)
    for _ in range(TIMES["DAMAGES"]):
        for name in ("checkpoints", "hf"):
            subprocess.run(["rm", "-rf", str(run.folder / name)], check=True)
        subprocess.run(["cp", "-r", str(kept), str(run.folder / "checkpoints")], check=True)
        newest = max((run.folder / "checkpoints").glob("step_*"))
        how, said = damage(newest, generator), run.output.stat().st_size
        run.start()
        run.end()
        logs = run.output.read_text()[said:] + (run.folder / "logs" / "rank_0.log").read_text()
        assert run.process.returncode == 0, (how, logs)
        assert f"{newest} is passed over" in logs, (how, logs)
        assert_identical(weights(run.config), weights(whole.config))
