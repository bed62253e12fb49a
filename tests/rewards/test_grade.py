import json
import re
from pathlib import Path

import pytest

from megatron_dgpo.config import Reward
from megatron_dgpo.rewards.grade import exact, final_answer, math
from megatron_dgpo.rewards.pool import GraderPool

_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 3\nno:\n####  4 \n then I stop", "4"),
        (r"so \boxed{3}, no, \boxed{\frac{1}{\sqrt{2}}}, done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{4} #### 5", "5"),
        (r"\boxed{\text{B}}", "B"),
        (r"\framebox{204}", "204"),
        (r"never closed: \boxed{4", r"never closed: \boxed{4"),
        ("working\nthe   answer\tis 4\n\n  ", "the answer is 4"),
        ("4", "4"),
        ("####", ""),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("#### 18", "work\n#### 18", 1),
        ("#### 18.0", "#### 18", 0),
        ("#### 18 19", "#### 18  19", 1),
        ("18", "18", 1),
        ("", "", 0),
        ("####", "18", 0),
    ],
)
def test_exact(response, answer, reward):
    assert exact(response, answer, {}) == reward


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("#### 70,000", "#### 70000", 1),
        ("#### $70,000.00", "#### 70000", 1),
        ("#### 70000.5", "#### 70000", 0),
        (r"\boxed{\frac{2}{4}}", "0.5", 1),
        (r"\boxed{-7}", "7", 0),
        ("The final answer is $2^{10}$.", "1024", 1),
        # The mark decides, not what stands around it.
        ("#### 2\nwhich is not 18", "18", 0),
        (r"18 \boxed{2} 18", "18", 0),
        # Naming several answers is no way to the reward.
        (r"\boxed{17, 18, 19}", "18", 0),
        ("#### 17 or 18", "18", 0),
        (r"\boxed{18} \boxed{17}", "18", 0),
        (r"\boxed{2^{10}}", "2", 0),
        ("", "18", 0),
        ("####", "18", 0),
        ("no idea", "18", 0),
    ],
)
def test_math(response, answer, reward):
    assert math(response, answer, {}) == reward


def test_math_refuses_an_answer_that_is_no_expression():
    # Otherwise a wrong data.answer_field would show as a policy that is always wrong.
    with pytest.raises(ValueError, match="no expression in the data's answer"):
        math("#### 18", "", {})


@pytest.fixture(scope="module")
def gsm8k():
    solutions = [row["answer"] for name in ("train", "test") for row in _rows(_DATA / "gsm8k" / f"{name}.jsonl")]
    assert len(solutions) == 8792
    return solutions


@pytest.mark.parametrize("grader", ["math", "exact"])
def test_every_gsm8k_solution_is_right_and_wrong_with_its_final_number_changed(grader, gsm8k):
    with GraderPool(Reward(grader=grader)) as pool:
        right = pool.score([(solution, solution, {}) for solution in gsm8k])
        wrong = pool.score([(_with_another_number(solution), solution, {}) for solution in gsm8k])
    assert [s for s, score in zip(gsm8k, right, strict=True) if score.reward != 1] == []
    assert [s for s, score in zip(gsm8k, wrong, strict=True) if score.reward != 0 or score.failure] == []


@pytest.mark.parametrize("written", ["N", "the answer is N", r"Thus $x = \boxed{N}$.", "#### N", "$N$"])
def test_every_aime_answer_is_right_and_wrong_when_changed(written):
    answers = [row["answer"] for row in _rows(_DATA / "aime24" / "test.jsonl")]
    assert len(answers) == 30
    with GraderPool(Reward(grader="math")) as pool:
        # 073 is 73: the competition writes three digits, a model need not.
        for digits in ("03d", "d"):
            right = pool.score([(written.replace("N", f"{int(answer):{digits}}"), answer, {}) for answer in answers])
            wrong = pool.score(
                [(written.replace("N", f"{int(answer) + 1:{digits}}"), answer, {}) for answer in answers]
            )
            assert [score.reward for score in right] == [1] * 30
            assert [score.reward for score in wrong] == [0] * 30


def test_every_written_aime_solution_is_right_and_wrong_for_another_answer():
    rows = _rows(_DATA / "aime24" / "test.jsonl")
    with GraderPool(Reward(grader="math")) as pool:
        right = pool.score([(row["solution"], row["answer"], {}) for row in rows])
        wrong = pool.score([(row["solution"], str(int(row["answer"]) + 1), {}) for row in rows])
    assert [score.reward for score in right] == [1] * 30
    assert [score.reward for score in wrong] == [0] * 30


def _with_another_number(solution: str) -> str:
    working, mark, number = solution.rpartition("####")
    value = int(re.sub(r"[,\s]", "", number))
    return f"{working}{mark} {value + 1}"


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        pytest.skip(f"{path} is not there: the real problems are not part of the repository")
    return [json.loads(line) for line in path.read_text().splitlines()]
