import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dgpo.config import Reward
from megatron_dgpo.errors import UsageError
from megatron_dgpo.rewards.pool import GraderPool, Score

_USER = "tests.rewards.graders:by_response"
_ROOT = Path(__file__).parents[2]
# Of the answer's form, and nothing that math-verify's own time limit could end.
_HANGS_MATH_VERIFY = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def pool():
    with GraderPool(Reward(grader=_USER, timeout_s=1.5)) as pool:
        yield pool


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        ("hang", "timeout: took longer than 1.5 s (reward.timeout_s)"),
        ("hang in C", "timeout: took longer than 1.5 s (reward.timeout_s)"),
        ("exit", "crash: ended (exit status 0)"),
        ("segfault", "crash: ended (SIGSEGV)"),
        ("sys.exit", "error: raised SystemExit: 3"),
        ("raise", "error: raised ZeroDivisionError: division by zero"),
        ("none", "not_a_number: returned None, not a finite number"),
        ("text", "not_a_number: returned '1.0', not a finite number"),
        ("nan", "not_a_number: returned nan, not a finite number"),
        ("inf", "not_a_number: returned inf, not a finite number"),
        ("complex", "not_a_number: returned 1j, not a finite number"),
        ("rude", "not_a_number: returned <_Rude instance at "),
        (
            "several",
            "not_a_number: returned {'brief': 0.5, 'right': 1.0}, not a finite number; several need reward.weights",
        ),
    ],
)
def test_a_failing_grader_costs_its_own_sample_only(pool, behaviour, failure, caplog):
    before = pool.failures.copy()
    items = [("good", "", {"reward": reward / 8}) for reward in range(8)]
    items[3:3] = [(behaviour, "", {})]
    scores = pool.score(items, prompt_indices=range(100, 109))
    bad = scores.pop(3)
    assert scores == [Score(reward / 8) for reward in range(8)]
    assert bad.reward == 0 and bad.failure.startswith(failure)
    assert pool.failures - before == {bad.failure_kind: 1}
    assert f"prompt 103: reward 0, grader {failure}" in caplog.text


@pytest.fixture(scope="module")
def pool_of_several():
    with GraderPool(Reward(grader="tests.rewards.graders:several", weights={"right": 1, "brief": 0.5})) as pool:
        yield pool


def test_several_rewards_and_their_weighted_sum(pool_of_several):
    items = [("good", "7777", {"right": right}) for right in (1, 0, -2.5)]
    scores = pool_of_several.score(items)
    assert scores == [Score(right + 0.125, None, {"right": right, "brief": 0.25}) for right in (1.0, 0.0, -2.5)]
    # In the order of the weights, which is not the grader's.
    assert [list(score.components) for score in scores] == [["right", "brief"]] * 3


@pytest.mark.parametrize(
    ("behaviour", "found"),
    [
        ("one number", "1.0"),
        ("one missing", "{'right': 1.0}"),
        ("one too many", "{'brief': 0.5, 'polite': 1.0, 'right': 1.0}"),
        ("other name", "{'brif': 0.5, 'right': 1.0}"),
        ("nan", "{'brief': nan, 'right': 1.0}"),
        ("none", "{'brief': None, 'right': 1.0}"),
        ("a list", "[1.0, 0.5]"),
        ("number for a name", "{1: 1.0, 'brief': 0.5}"),
        ("rude", "{'brief': <_Rude instance at "),
        ("beyond float64", "{'right': 1.5e+308, 'brief': 1.5e+308}, whose weighted sum is inf"),
    ],
)
def test_rewards_other_than_the_ones_with_weights_are_a_failure(pool_of_several, behaviour, found, caplog):
    before = pool_of_several.failures.copy()
    good = ("good", "1", {"right": 1})
    scores = pool_of_several.score([good, (behaviour, "1", {}), good], prompt_indices=[7, 8, 9])
    assert scores[0] == scores[2] == Score(1.5, None, {"right": 1.0, "brief": 1.0})
    assert scores[1].reward == 0 and scores[1].components == {"right": 0.0, "brief": 0.0}
    assert scores[1].failure.startswith(f"not_a_number: returned {found}")
    if behaviour != "beyond float64":
        assert scores[1].failure.endswith(", not a finite number for each of right, brief (reward.weights)")
    assert pool_of_several.failures - before == {"not_a_number": 1}
    assert f"prompt 8: reward 0, grader not_a_number: returned {found}" in caplog.text


def test_a_grader_that_raises_or_hangs_has_none_of_several_rewards():
    weights = {"right": 1, "brief": 0.5}
    with GraderPool(Reward(grader=_USER, weights=weights, timeout_s=0.5, workers=1)) as pool:
        scores = pool.score([(name, "", {}) for name in ("raise", "hang", "exit", "several")])
    assert [score.failure_kind for score in scores] == ["error", "timeout", "crash", None]
    assert [score.components for score in scores] == [{"right": 0.0, "brief": 0.0}] * 3 + [{"right": 1.0, "brief": 0.5}]


@pytest.mark.parametrize("grader", ["math", "exact"])
def test_a_built_in_grader_gives_one_number(grader):
    with pytest.raises(UsageError, match=f"reward.grader={grader} gives one number, and reward.weights are for a, b"):
        GraderPool(Reward(grader=grader, weights={"a": 1, "b": 1}))


def test_numbers_of_other_types_and_printing_are_fine(pool, capfd):
    scores = pool.score([(name, "", {}) for name in ("bool", "numpy", "print", "slow")])
    assert scores == [Score(1.0), Score(0.5), Score(1.0), Score(1.0)]
    assert capfd.readouterr().out == ""


def test_all_workers_hanging_at_once_cost_one_time_limit_and_the_rest_is_graded(pool, caplog):
    start = time.monotonic()
    items = [("hang", "", {})] * 2 + [("good", "", {"reward": 1})] * 20 + [("raise", "", {})] * 8
    scores = pool.score(items)
    assert time.monotonic() - start < 1.5 + 3
    assert [score.failure_kind for score in scores] == ["timeout"] * 2 + [None] * 20 + ["error"] * 8
    # A broken grader must not fill the log.
    assert len(caplog.records) == 6
    assert "10 of 30 responses got reward 0 without being graded: 2 timeout, 8 error" in caplog.text


def test_a_replacement_that_starts_takes_no_time_from_another_worker():
    # While the first worker is killed and replaced, the other goes on with slow but good graders.
    with GraderPool(Reward(grader=_USER, timeout_s=0.5)) as pool:
        scores = pool.score([("hang", "", {})] + [("slow", "", {})] * 8)
    assert [score.failure_kind for score in scores] == ["timeout"] + [None] * 8


def test_a_grader_that_waits_for_a_processor_has_the_time_that_it_computes():
    # It shares one processor with three others and computes for less than the limit, which takes longer than that.
    processor = min(os.sched_getaffinity(0))
    hog = f"import os; os.sched_setaffinity(0, [{processor}])\nwhile True: pass"
    with GraderPool(Reward(grader=_USER, timeout_s=0.8, workers=1)) as pool, contextlib.ExitStack() as others:
        for _ in range(3):
            other = others.enter_context(subprocess.Popen([sys.executable, "-c", hog]))
            others.callback(other.kill)
        scores = pool.score([("starve", seconds, {"processor": processor}) for seconds in ("0.5", "60")])
    assert scores[0] == Score(1.0)
    assert scores[1].failure == "timeout: took longer than 0.8 s (reward.timeout_s)"


def test_answers_that_no_response_could_meet_are_found(caplog):
    answers = ["18", r"\boxed{\frac{1}{2}}", "", "see (the figure", "$x = 1$,\n$y = 2$", "work\n#### 5", "", "}{", "18"]
    with GraderPool(Reward(grader="math")) as pool:
        assert pool.unusable(answers) == {
            2: "error: raised ValueError: the data's answer '' is empty",
            3: "error: raised ValueError: math-verify finds no expression in the data's answer 'see (the figure'",
            7: "error: raised ValueError: the data's answer '}{' is empty",
        }
    with GraderPool(Reward(grader="exact", workers=1)) as pool:
        assert list(pool.unusable(answers)) == [2, 7]
    with GraderPool(Reward(grader=_USER, workers=1)) as pool:
        assert pool.unusable(answers) == {}
    assert not caplog.records


def test_what_a_hanging_grader_started_is_killed_with_it(pool, tmp_path):
    note = tmp_path / "pid"
    (score,) = pool.score([("leave a child", str(note), {})])
    assert score.failure_kind == "timeout"
    _wait_for_end([int(note.read_text())])


def test_a_worker_that_died_between_two_calls_costs_nothing():
    with GraderPool(Reward(grader="tests.rewards.graders:process_id")) as pool:
        pids = {int(score.reward) for score in pool.score([("", "", {})] * 50)}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        scores = pool.score([("", "", {})] * 50)
    assert all(score.failure is None for score in scores)
    assert not pids & {int(score.reward) for score in scores}


def test_workers_have_no_part_of_the_trainer(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MEGATRON_DGPO_SECRET", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.set_inheritable(True)
        with GraderPool(Reward(grader="tests.rewards.graders:environment")) as pool:
            assert pool.score([("", "", {})] * 4) == [Score(1.0)] * 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent_even_while_they_hang(number):
    script = (
        "from megatron_dgpo.config import Reward\n"
        "from megatron_dgpo.rewards.pool import GraderPool\n"
        f"pool = GraderPool(Reward(grader={_USER!r}, timeout_s=60))\n"
        "print(*(worker._process.pid for worker in pool._workers), flush=True)\n"
        "pool.score([('hang in C', '', {}), ('hang', '', {})])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=_ROOT) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.3)
        assert len(pids) == 2 and all(map(_alive, pids))
        os.kill(pids[0], signal.SIGINT)
        os.kill(pids[1], signal.SIGINT)
        time.sleep(0.2)
        assert all(map(_alive, pids)), "Ctrl-C is the trainer's business"
        parent.send_signal(number)
        parent.wait(10)
    _wait_for_end(pids)


def test_close_leaves_no_process():
    with GraderPool(Reward(grader=_USER)) as pool:
        pids = [worker._process.pid for worker in pool._workers]
        assert all(map(_alive, pids))
    assert not any(map(_alive, pids))


def test_an_expression_that_hangs_math_verify_costs_its_sample():
    with GraderPool(Reward(grader="math", timeout_s=1.5)) as pool:
        scores = pool.score([(_HANGS_MATH_VERIFY, "4", {}), (r"\boxed{4}", "4", {}), (r"\boxed{5}", "4", {})])
    assert scores[0].failure_kind == "timeout" and [s.reward for s in scores] == [0, 1, 0]


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("maht", "reward.grader=maht: unknown grader; did you mean 'math'? Use math, exact, or write module:function"),
        ("my rewards", "unknown grader. Use math, exact, or write module:function"),
        ("tests.rewards.graders", "or write module:function"),
        ("no_such_module:score", "No module named 'no_such_module'; modules are looked for in the current folder"),
        ("tests.rewards.graders:by_respons", "did you mean tests.rewards.graders:by_response?"),
        ("tests.rewards.graders:NOT_A_FUNCTION", "type int, not a function"),
        ("tests.rewards.exits_on_import:score", "SystemExit: 7"),
        ("tests.rewards.dies_on_import:score", "its process ended (exit status 9)"),
    ],
)
def test_a_bad_grader_is_named_before_anything_starts(grader, message):
    with pytest.raises(UsageError) as error:
        GraderPool(Reward(grader=grader, workers=1))
    assert message in str(error.value)


def test_the_wrong_parser_runtime_is_noticed_at_the_start(tmp_path, monkeypatch):
    # math-verify asks the installed distribution's version and takes the parser generated for it: here it is told
    # 4.9.3, whose parser tables the 4.13 runtime cannot read.
    (tmp_path / "antlr4_python3_runtime-4.9.3.dist-info").mkdir()
    metadata = tmp_path / "antlr4_python3_runtime-4.9.3.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: antlr4-python3-runtime\nVersion: 4.9.3\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"reward.grader=math does not work here.*antlr4-python3-runtime==4.13.2"):
        GraderPool(Reward(grader="math", workers=1))


def test_a_parser_that_fails_in_silence_is_noticed_at_the_start(tmp_path, monkeypatch):
    # math-verify swallows whatever its LaTeX parser raises, and grades 0.
    (tmp_path / "sitecustomize.py").write_text(
        "from latex2sympy2_extended import latex2sympy2\n"
        "def broken(*_, **__):\n"
        "    raise RuntimeError('Could not deserialize ATN')\n"
        "latex2sympy2.latex2sympy = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"grader=math does not work here: ValueError: math-verify finds no expr.*; install"
    ):
        GraderPool(Reward(grader="math", workers=1))


def _wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)):
        assert time.monotonic() < deadline, f"{pids} did not end"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level(logging.WARNING)
