import itertools
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import time

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dgpo.metrics import MetricsLog, pass_at_k, read_metrics
from megatron_dgpo.plot import plot_run
from tests.layouts import make_config
from tests.ranks import run_ranks

_RUN = """
import sys
from pathlib import Path
from megatron_dgpo.metrics import MetricsLog
with MetricsLog(Path(sys.argv[1]), "train", visible=True) as log:
    log.start(0, 3)
    log.write(0, {"eval/accuracy": 0.25})
    for step in (1, 2, 3):
        with log.phase("rollout"):
            pass
        log.write(step, {"rollout/reward": step / 4, "rollout/tokens": 100})
    log.warn("weights are [all but] uniform")
"""


def _events(run_dir) -> dict[str, dict[int, float]]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard" / "train"))
    accumulator.Reload()
    names = accumulator.Tags()["scalars"]
    scalars = {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in names}
    assert all(len(dict(points)) == len(points) for points in scalars.values()), "a step was drawn twice"
    return {name: dict(points) for name, points in scalars.items()}


def _run(run_dir, steps, done=0, value=0.0):
    if (run_dir / "tensorboard").exists():
        # Of one process's files of one second TensorBoard reads .10 before .9.
        time.sleep(1.1)
    with MetricsLog(run_dir, "train", visible=True) as log:
        log.start(done, 10)
        for step in steps:
            log.write(step, {"rollout/reward": value + step, "policy/entropy": 0.5})


def test_what_is_waited_for_before_the_first_step_is_told_and_is_no_part_of_it(tmp_path, capsys):
    with MetricsLog(tmp_path, "train", visible=True) as log:
        log.start(0, 1)
        with log.startup("waiting for the servers"):
            told = capsys.readouterr().out
            time.sleep(0.5)
        log.write(1, {"policy/loss": 0.5})
    assert re.fullmatch(r"train: waiting for the servers \(\d+:\d\d since the start\)\n", told)
    [row] = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert row.keys() == {"step", "policy/loss", "time/step_s"} and row["time/step_s"] < 0.5


def test_both_files_hold_the_same_metrics(tmp_path, capsys):
    with MetricsLog(tmp_path, "train", visible=True) as log:
        log.start(0, 2)
        log.write(0, {"eval/accuracy": 0.25})
        log.write(1, {"rollout/reward": 0.5, "policy/grad_norm": math.nan, "policy/loss": math.inf})
        log.write(2, {"rollout/reward": 0.75, "policy/grad_norm": 2.0})
    rows = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/accuracy"] == 0.25 and rows[2]["policy/grad_norm"] == 2.0
    # Strict JSON readers know no NaN; nobody should overlook one.
    assert rows[1]["policy/grad_norm"] is rows[1]["policy/loss"] is None
    assert "loss inf" in capsys.readouterr().out
    events = _events(tmp_path)
    assert events.keys() == {name for row in rows for name in row} - {"step"}
    for row in rows:
        for name in row.keys() - {"step"}:
            value = events[name][row["step"]]
            assert value == pytest.approx(row[name], rel=1e-6) if row[name] is not None else not math.isfinite(value)


def test_phases_add_up_within_a_step_and_start_anew(tmp_path):
    with MetricsLog(tmp_path, "train", visible=True) as log:
        log.start(0, 2)
        for _ in range(2):
            with log.phase("policy"):
                time.sleep(0.02)
        with pytest.raises(ZeroDivisionError), log.phase("rollout"):
            _ = 1 / 0
        time.sleep(0.05)
        log.write(1, {"rollout/tokens": 1000})
        log.write(2, {})
    first, second = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert 0.04 <= first["time/policy_s"] < 0.09 <= first["time/step_s"]
    assert "time/rollout_s" in first
    assert first["time/tokens_per_s"] == pytest.approx(1000 / first["time/step_s"])
    assert second.keys() == {"step", "time/step_s"}


def test_a_checkpoint_is_of_the_step_before_it(tmp_path, capsys):
    with MetricsLog(tmp_path, "train", visible=True) as log:
        log.start(0, 2)
        log.write(0, {})
        log.write(1, {"rollout/tokens": 10})
        with log.phase("checkpoint"):
            time.sleep(0.3)
        log.saved({"memory/checkpoint_gib": 1.5})
        log.write(2, {"rollout/tokens": 10})
    rows = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["time/checkpoint_s"] > 0.29 and "time/checkpoint_s" not in rows[2]
    # Nor is it in anybody's tokens/s.
    assert max(row["time/step_s"] for row in rows) < 0.25
    assert _events(tmp_path)["time/checkpoint_s"] == {1: pytest.approx(rows[1]["time/checkpoint_s"], rel=1e-6)}
    assert rows[1]["memory/checkpoint_gib"] == 1.5 and "memory/checkpoint_gib" not in rows[2]
    assert "train 1/2: GiB saved 1.5, checkpoint 0.3" in capsys.readouterr().out


def test_steps_that_come_again_after_a_crash_are_kept_once(tmp_path):
    _run(tmp_path, [0, 1, 2, 3, 4, 5])
    _run(tmp_path, [4, 5, 6], done=3, value=0.25)
    rows = read_metrics(tmp_path / "metrics" / "train.jsonl")
    expected = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4.25, 5: 5.25, 6: 6.25}
    assert {row["step"]: row["rollout/reward"] for row in rows} == expected and len(rows) == 7
    assert _events(tmp_path)["rollout/reward"] == expected


def test_a_run_that_never_saved_starts_over(tmp_path):
    _run(tmp_path, [0, 1, 2])
    _run(tmp_path, [0, 1], value=0.25)
    rows = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert [(row["step"], row["rollout/reward"]) for row in rows] == [(0, 0.25), (1, 1.25)]
    assert _events(tmp_path)["rollout/reward"] == {0: 0.25, 1: 1.25}


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    _run(tmp_path, [0, 1, 2])
    file = tmp_path / "metrics" / "train.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 3, "rollout/rew')
    _run(tmp_path, [3], done=2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]


def test_only_the_visible_rank_writes(tmp_path, capfd):
    with MetricsLog(tmp_path, "train", visible=False) as log:
        log.start(0, 2)
        with log.phase("policy"):
            log.write(1, {"rollout/reward": 0.5})
        log.warn("unheard")
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr().out == ""


def test_without_a_terminal_a_step_is_one_plain_line(tmp_path):
    run = subprocess.run([sys.executable, "-c", _RUN, tmp_path], capture_output=True, text=True, timeout=60)
    lines = run.stdout.splitlines()
    assert len(lines) == 5 and "\x1b" not in run.stdout, run.stderr
    assert re.fullmatch(r"train 0/3: held out 0.250, seconds \d+\.\d, time left unknown", lines[0])
    assert re.fullmatch(
        r"train 2/3: reward 0.500, tokens/s [\d,]+, seconds \d+\.\d, rollout \d+\.\d, \d+:\d\d left", lines[2]
    )
    assert lines[3].endswith(", done")
    assert lines[4] == "warning: weights are [all but] uniform"


def test_on_a_terminal_a_table_lives_and_the_cursor_stays(tmp_path):
    output = _on_a_terminal([sys.executable, "-c", _RUN, str(tmp_path)])
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    for part in ("reward", "held out", "0.750", "of which rollout 0.0", "train 3/3", "done", "[all but] uniform"):
        assert part in text
    # A rank that is killed cannot give the cursor back: it is never taken for long.
    hidden, shown = output.index("\x1b[?25l"), output.index("\x1b[?25h")
    assert output.count("\x1b[?25l") == 1 and "reward" not in output[hidden:shown]


def _on_a_terminal(command: list[str]) -> str:
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=theirs, env=environment) as process:
        os.close(theirs)
        chunks = []
        try:
            while chunk := os.read(ours, 65536):
                chunks.append(chunk)
        except OSError:
            pass  # How Linux tells that the other end is closed.
        assert process.wait(60) == 0
    os.close(ours)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_a_plot_of_any_length(tmp_path, steps):
    rows = [{"step": 0, "eval/accuracy": 0.3}] if steps else []
    for step in range(1, steps + 1):
        names = ("rollout/reward", "rollout/accuracy", "policy/entropy", "policy/deviation", "credit/effective_share")
        rows.append({"step": step} | {name: step / 50 for name in names})
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = imread(plot_run(file, tmp_path / "plots" / "train.png", "a run"))
    assert picture.shape[:2] == (605, 1210)
    # The reward's line is there, in its colour, exactly when there are two points to join.
    blue = (abs(picture[:270, :400, :3] - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(-1).sum()
    assert (blue > 100) == (steps > 1)


def test_pass_at_k_is_the_mean_over_all_choices():
    for samples in range(1, 7):
        for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            outcomes = [True] * correct + [False] * (samples - correct)
            choices = [any(choice) for choice in itertools.combinations(outcomes, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(1000, 0, 500) == 0 and pass_at_k(1000, 501, 500) == 1
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5)


def merged_on_a_rank(parallel):
    """What a step of two micro-batches reports there; its largest gap is the rank's number and a half."""
    import torch
    import torch.distributed as dist

    from megatron_dgpo.config import Parallel
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import _over_replicas

    init_device()
    initialize_parallel(Parallel(**parallel), 1)
    gaps = torch.tensor(dist.get_rank() + 0.5), torch.tensor(0.25)
    return _over_replicas([{"tokens": torch.tensor(3.0), "largest_logprob_gap": gap} for gap in gaps])


def test_sums_and_largest_values_over_replicas():
    assert run_ranks(merged_on_a_rank, 2, {}) == [{"tokens": 12.0, "largest_logprob_gap": 1.5}] * 2


def test_sums_and_largest_values_over_optimizer_steps():
    from megatron_dgpo.model.policy import StepResult
    from megatron_dgpo.step_metrics import totals

    steps = [{"tokens": 3.0, "largest_logprob_gap": gap} for gap in (0.5, 2.0, 1.0)]
    results = [StepResult(metrics, 1.0, 1e-6, False) for metrics in steps]
    assert totals(results) == {"tokens": 9.0, "largest_logprob_gap": 2.0}


def test_a_sampler_with_another_policy_is_said_once(tmp_path, capfd):
    from megatron_dgpo.step_metrics import Warnings, policy_metrics

    sums = dict.fromkeys(("effective_share", "max_weight", "top1_share", "top10_share", "entropy"), 0.0)
    sums |= {"tokens": 10.0, "responses": 2.0, "loss": 0.0, "normaliser": 10.0, "rollout_kl": 0.04}
    sums |= {"rollout_ratio": 10.0, "rollout_ratio_squared": 10.0, "corrected": 0.0, "counted_tokens": 10.0}
    with MetricsLog(tmp_path, "train", visible=True) as log:
        log.start(0, 3)
        warnings = Warnings(log, make_config("none"))
        for gap in (0.3, 0.7, 0.9):
            metrics = policy_metrics(sums | {"logprob_gap": gap, "largest_logprob_gap": 2.0})
            warnings.look(metrics)
    assert metrics["policy/rollout_kl"] == pytest.approx(0.004)
    assert metrics["policy/rollout_ratio_max"] == pytest.approx(math.exp(2))
    printed = capfd.readouterr().out
    assert printed.count("warning:") == 1 and "0.07 from the trainer's on average" in printed


def test_the_gap_of_rounding_is_that_of_the_tokens_of_the_weights_that_are_trained():
    from megatron_dgpo.step_metrics import policy_metrics

    sums = dict.fromkeys(("effective_share", "max_weight", "top1_share", "top10_share", "entropy", "corrected"), 0.0)
    sums |= {"tokens": 10.0, "responses": 2.0, "loss": 0.0, "normaliser": 10.0, "rollout_kl": 0.04, "logprob_gap": 5.0}
    sums |= {"rollout_ratio": 10.0, "rollout_ratio_squared": 10.0, "counted_tokens": 10.0, "largest_logprob_gap": 1.0}
    assert policy_metrics(sums)["policy/rollout_logprob_gap"] == 0.5
    ages = {"tokens_at_lag_0": 4.0, "tokens_at_lag_1": 0.0, "tokens_at_lag_2": 6.0}
    gaps = {"logprob_gap_at_lag_0": 0.004, "logprob_gap_at_lag_1": 0.0, "logprob_gap_at_lag_2": 4.8}
    found = policy_metrics(sums | ages | gaps)
    assert found["policy/rollout_logprob_gap"] == found["policy/logprob_gap_at_lag_0"] == pytest.approx(0.001)
    assert found["policy/logprob_gap_at_lag_2"] == pytest.approx(0.8) and "policy/logprob_gap_at_lag_1" not in found
    # All tokens are older: nothing tells how the servers round.
    found = policy_metrics(sums | ages | gaps | {"tokens_at_lag_0": 0.0})
    assert "policy/rollout_logprob_gap" not in found


@pytest.mark.parametrize(
    "waits, ahead, text",
    [(0.4, 0.2, "ranks wait for the servers 40% of the time"), (0.0, 1.0, "servers wait for the ranks"), (0, 0.5, "")],
)
def test_who_waits_for_whom_is_said(tmp_path, capfd, waits, ahead, text):
    from megatron_dgpo.step_metrics import Warnings

    metrics = {"policy/rollout_effective_share": 1.0, "credit/effective_share": 0.9, "rollout/response_length": 9.0}
    with MetricsLog(tmp_path, "train", visible=True) as log:
        log.start(0, 3)
        warnings = Warnings(log, make_config("none"))
        for _ in range(5):
            assert "warning" not in capfd.readouterr().out
            warnings.look(metrics | {"rollout/wait_share": waits, "rollout/finished_ahead": ahead})
        warnings.look(metrics | {"rollout/wait_share": waits, "rollout/finished_ahead": ahead})
    printed = capfd.readouterr().out
    assert printed.count("warning:") == bool(text) and text in printed
