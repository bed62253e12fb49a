import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_dgpo.config import Reward
from megatron_dgpo.rewards.answer import expected_answer, given_answer, stated_answer
from megatron_dgpo.rewards.grade import exact, math
from megatron_dgpo.rewards.pool import GraderPool, Score

_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("so it is #### 4", "4"),
        (r"so \boxed{3}. No: \boxed{\frac{1}{\sqrt{2}}}, done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{4}, that is #### 5", "4"),
        (r"\boxed{\text{B}}", "B"),
        (r"\framebox{204}", "204"),
        (r"\boxed{x \in \{1, 2\}}", r"x \in \{1, 2\}"),
        (r"broken off: \boxed{4", ""),
        (r"a box \boxed{3} and one broken off: \boxed{4", "3"),
        # Boxes of one answer.
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        ("$$\\boxed{1}$$\n\n$$\\boxed{2}$$", "1, 2"),
        (r"One root is $\boxed{1}$, and the other is $\boxed{2}$.", "1, 2"),
        (r"It is \boxed{4}, I repeat: \boxed{4}", "4"),
        (r"It is \boxed{3}. Wait, it is \boxed{4}", "4"),
        ("It is \\boxed{3}\nWait, it is \\boxed{4}", "4"),
        # The last line, without Markdown and full stop.
        ("#### 3\nno:\n####  4 \n then I stop", "then I stop"),
        ("working\nThe   answer\tis 4.\n\n  ", "4"),
        ("#### Final answer\n\n**4**\n---\n", "4"),
        ("**Answer:** 4", "4"),
        ("The final answer is 4. I hope it is correct.", "4"),
        ("\\[\nx = 4\n\\]", "x = 4"),
        ("4 is not the answer", ""),
        ("4", "4"),
        ("####", ""),
        ("", ""),
    ],
)
def test_given_answer(text, answer):
    assert given_answer(text).text == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        (r"so $\boxed{1}$ and $\boxed{-2}$", "1, -2"),
        ("$x = 1$,\n$y = 2$", "$x = 1$, $y = 2$"),
        (r"\text{east}", "east"),
        ("####", ""),
        ("  ", ""),
    ],
)
def test_expected_answer(text, answer):
    assert expected_answer(text) == answer


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [
        ("So she makes $18 every day.", "$18"),
        ("She makes 9 * 2 = $<<9*2=18>>18 every day", "$18"),
        ("The value of $x$ is $18$", "$18$"),
        ("The roots are 1 and 2", "1 and 2"),
        ("Total: $3.50", "$3.50"),
        ("17, not 18, are left", "17"),
        ("x = 18", "x = 18"),
        ("I do not know. 1 2 3 16 17 18", ""),
        ("3 apples and 18 pears", ""),
        ("which is not 18", ""),
    ],
)
def test_stated_answer(sentence, answer):
    assert stated_answer(given_answer(sentence)) == answer


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("#### 18", "work\n#### 18", 1),
        ("#### 18.0", "#### 18", 0),
        ("#### 18 19", "#### 18  19", 1),
        ("#### Step 2\nsums\n#### Answer\nParis", "Paris", 1),
        ("#### Paris\nor else Rome", "Paris", 0),
        ("18", "18", 1),
        ("", "", 0),
        ("####", "18", 0),
    ],
)
def test_exact(response, answer, reward):
    assert exact(response, answer, {}) == reward


# (answer of the data, right in a box, wrong in a box).
FORMS = {
    "18": (
        [
            r"18.0",
            r"\$18",
            r"18\text{ dollars}",
            "18 dollars",
            "18 m",
            r"18\ \mathrm{km/h}",
            r"18^\circ",
            "18°",
            r"18\%",
            "018",
            "(18)",
        ]
        + [
            "x = 18",
            r"m+n = 5+13 = 18",
            r"9\cdot 2 = 18",
            r"\angle ABC = 18^\circ",
            r"x \approx 18",
            r"\frac{36}{2}",
            "1.8e1",
        ]
        + [r"1.8 \times 10^{1}", "+18"],
        [
            "17=18",
            "x=17=18",
            "2x=36",
            r"\neq 18",
            r"\geq 18",
            "x > 17",
            r"17 \lor 18",
            "17 or 18",
            "18, 19",
            "18,18",
            "18_{20}",
        ]
        + [
            r"1800\%",
            r"\{18\}",
            "17+1",
            "19-1",
            r"9 \times 2",
            "18 1",
            r"17\;1",
            "9(2)",
            r"\sum_{i=1}^{18} 1",
            r"\max(17, 18)",
        ]
        + [
            r"\int_0^{18} dx",
            "|18|",
            r"18\text{8}",
            r"18 \text{ (not 17)}",
            "18 + x - x",
            "not 18",
            "-18",
            "",
            "(18, 19)",
        ],
    ),
    "1024": ([r"2^{10}", "1,024", r"1\,024", "1 024", "1{,}024"], [r"\binom{1024}{1}", "1,025", "10 24"]),
    "120": (["120"], ["5!", r"\binom{10}{3}", "60+60"]),
    "0.5": ([r"\frac12", r"\frac{2}{4}", "1/2", ".5"], ["0.51", r"50\%", "-0.5", r"\frac14+\frac14"]),
    r"\frac{3}{2}": (["1.5", r"1\frac{1}{2}", "1 1/2"], [r"1+\frac12", "15"]),
    r"\frac13": (["0.333333", r"\dfrac{1}{3}"], ["0.33"]),
    r"25\%": ([r"25\%", "25 percent", "25", "0.25"], [r"0.25\%", r"2500\%"]),
    r"12.5\%": ([r"12.5\%", "12.5"], [r"125\%"]),
    r"60^\circ": (["60", r"60^{\circ}", r"60 \text{ degrees}"], ["61", r"\frac{\pi}{3}"]),
    "9 (apples)": (["9", "9 apples"], ["8 apples"]),
    "1, 2": (
        ["2, 1", r"\{1, 2\}", "1 and 2", "x = 1 \\text{ or } x = 2", "1; 2"],
        ["1", "1, 2, 3", "1, 2, 2", "1, 3", "x < 1, x = 2", r"\{1\}"],
    ),
    "x = 1, y = 2": (["1, 2", "y = 2, x = 1"], ["2, 1", "x = 2, y = 1", "x = 1", "x = 1, z = 2"]),
    r"3, -3": ([r"\pm 3", r"x = \pm 3"], ["3", r"\pm 4"]),
    "(1, 2)": (["(1,2)", r"\left(1, \frac{4}{2}\right)"], ["(2, 1)", "[1, 2)", "(1, 2, 3)", "3"]),
    r"(3, \infty)": (["x > 3", "3 < x", r"x \in (3, \infty)"], [r"[3, \infty)", r"x \geq 3", "x < 3", "3"]),
    "x > 3": ([r"(3, \infty)", "3 < x"], ["3", "x = 3", "y > 3", r"x \ge 3", "1 > 0"]),
    r"(-\infty, 1) \cup (2, \infty)": ([r"(2, \infty) \cup (-\infty, 1)"], [r"(-\infty, 1) \cup [2, \infty)", "1, 2"]),
    "y = 2x + 3": (["2x+3", "2x - y + 3 = 0"], ["2x", "y = 3", "0 = 0", "1 = 2"]),
    r"y = c_1 \begin{pmatrix} -1 \\ 1 \end{pmatrix} e^t": (
        [r"y = c_1 e^t \begin{bmatrix} -1 \\ 1 \end{bmatrix}"],
        ["0 = 0", "1 = 2", "y = 0", "y - y + c_1 - c_1 + t - t = 1"],
    ),
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": (
        [r"\begin{bmatrix}1\\2\end{bmatrix}"],
        [r"\begin{pmatrix}2\\1\end{pmatrix}", "1, 2"],
    ),
    "x(x+1)": (["x^2 + x", "x(1+x)"], ["x^2", "2"]),
    "3t": (["3t", r"3 \cdot t"], ["3"]),
    r"2 - \sqrt{3}": ([r"-\sqrt3 + 2", r"\sqrt 4 - \sqrt 3"], [r"2 + \sqrt 3", r"2, \sqrt 3"]),
    "2516_8": ([r"2516_{8}", "2516"], ["2516_7"]),
    "B": ([r"\text{B}", "(B)", r"\textbf{(B)}"], ["A", "A or B", "AB"]),
    r"\text{Monday}": (["Monday", "monday"], ["dMonay", "Sunday", "Monday, Sunday"]),
}


@pytest.mark.parametrize("answer", FORMS)
def test_form_and_value_of_a_boxed_answer(answer):
    right, wrong = FORMS[answer]
    assert [r for r in [answer, *right] if math(rf"so $\boxed{{{r}}}$.", answer, {}) != 1] == []
    assert [w for w in wrong if math(rf"so $\boxed{{{w}}}$.", answer, {}) != 0] == []


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("#### 70,000", "#### 70000", 1),
        ("#### $70,000.00", "#### 70000", 1),
        ("#### 70000.5", "#### 70000", 0),
        ("The final answer is $2^{10}$.", "1024", 1),
        ("The answer is B.", "B", 1),
        # Only what is the answer counts, not what stands around it.
        ("#### 2\nwhich is not 18", "18", 0),
        (r"18 \boxed{2} 18", "18", 0),
        ("#### Step 2\n$x=18$\n#### Final Answer\n$$\\boxed{18}$$", "18", 1),
        ("#### 3. Check\nSo \\boxed{99}", "3", 0),
        ("#### 3\nSo there are 99 of them.", "3", 0),
        # Naming several answers is no way to the reward.
        ("#### 17 or 18", "18", 0),
        ("answer: 18 or 19", "18", 0),
        ("18 is not the answer", "18", 0),
        (r"\boxed{18} \boxed{17}", "18", 0),
        ("I do not know. 1 2 3 16 17 18", "18", 0),
        # All boxes of the data's answer are asked for.
        (r"\boxed{-2} and \boxed{1}", r"so $\boxed{1}$ and $\boxed{-2}$", 1),
        (r"\boxed{-2}", r"so $\boxed{1}$ and $\boxed{-2}$", 0),
        # So are all of its lines.
        (r"\boxed{x = 1, y = 2}", "$x = 1$,\n$y = 2$", 1),
        (r"\boxed{2}", "$x = 1$,\n$y = 2$", 0),
        ("", "18", 0),
        ("####", "18", 0),
        ("no idea", "18", 0),
    ],
)
def test_math(response, answer, reward):
    assert math(response, answer, {}) == reward


@pytest.mark.parametrize(
    ("answer", "reason"), [("", "is empty"), ("####", "is empty"), ("see (the figure", "no expression")]
)
def test_math_refuses_an_answer_that_is_no_expression(answer, reason):
    # Otherwise a wrong data.answer_field would show as a policy that is always wrong.
    with pytest.raises(ValueError, match=reason):
        math("#### 18", answer, {})


def _decimal(value: Fraction) -> str | None:
    """Its exact decimal if six digits after the point are enough."""
    digits = value * 10**6
    return f"{float(value):.6f}" if digits.denominator == 1 else None


@st.composite
def numbers(draw):
    """(a number, a way to write it)."""
    value = Fraction(draw(st.integers(-99999, 99999)), draw(st.sampled_from([1, 1, 1, 2, 3, 4, 7, 8, 10, 100])))
    sign, size = "-" * (value < 0), abs(value)
    top, bottom = size.numerator, size.denominator
    k = draw(st.integers(1, 5))
    ways = [rf"{sign}\frac{{{top * k}}}{{{bottom * k}}}", f"{sign}{top * k}/{bottom * k}"]
    if bottom == 1:
        ways += [f"{sign}{top}", f"{sign}{top:,}", f"{sign}{top:,}".replace(",", r"\,"), f"{sign}{top}.00"] * 2
    elif top > bottom:
        ways.append(rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    if decimal := _decimal(value):
        ways.append(decimal)
    return value, draw(st.sampled_from(ways))


_DRESS = st.sampled_from(
    ["N", "x = N", r"N \text{ apples}", "N apples", r"N^\circ", r"N \text{ cm}^2", r"\left(N\right)", "{N}"]
)
_PLACE = st.sampled_from(
    [r"so $\boxed{N}$.", r"\[ \boxed{N} \]", "**Answer:** N", "The answer is $N$.", "#### N", "$N$"]
)
_HEADING = st.sampled_from(["#### 7. Check", "#### Step 3", "### 12", "###### 5", "#### Answer", "# $x = 4$", "#### 8"])


@given(numbers(), numbers(), _DRESS, _PLACE, st.lists(_HEADING, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_number_is_right_in_any_form_and_place_and_another_is_not(this, other, dress, place, headings):
    (value, written), (other_value, other_written) = this, other
    response = "\n".join([*headings, "Some words.", place.replace("N", dress.replace("N", written))])
    assert math(response, str(value), {}) == 1
    assert math(response, f"sums\n#### {written}", {}) == 1
    # Two decimals that agree in six digits after the point are equal to math-verify.
    assert math(response, str(other_value), {}) == (abs(value - other_value) < 1e-6)
    hedge = place.replace("N", f"{written} \\text{{ or }} {other_written}")
    assert math(hedge, str(value), {}) == 0


@given(st.lists(numbers(), min_size=2, max_size=4, unique_by=lambda number: number[0]), st.randoms(), st.data())
@settings(max_examples=20, deadline=None)
def test_a_list_is_right_in_any_order_and_only_when_complete(members, random, data):
    expected = ", ".join(str(value) for value, _ in members)
    shuffled = [written for _, written in members]
    random.shuffle(shuffled)
    joined = data.draw(st.sampled_from([", ", " and ", r" \text{ or } ", "; "])).join(shuffled)
    form = data.draw(st.sampled_from([r"\boxed{N}", r"\boxed{\{N\}}"])).replace("N", joined)
    assert math(form, expected, {}) == 1
    assert math(" and ".join(rf"\boxed{{{member}}}" for member in shuffled), expected, {}) == 1
    assert math(r"\boxed{N}".replace("N", ", ".join(shuffled[1:])), expected, {}) == 0
    assert math(r"\boxed{N}".replace("N", ", ".join([*shuffled, shuffled[0]])), expected, {}) == 0
    assert math(form, str(members[0][0]), {}) == 0


@given(numbers(), numbers(), st.sampled_from("[("), st.sampled_from("])"))
@settings(max_examples=20, deadline=None)
def test_an_interval_is_right_with_its_own_brackets_only(low, high, left, right):
    assume(low[0] + 1e-3 < high[0])
    expected = f"{left}{low[0]}, {high[0]}{right}"
    assert math(rf"\boxed{{{left}{low[1]}, {high[1]}{right}}}", expected, {}) == 1
    assert math(rf"\boxed{{x \in \left{left}{low[1]}, {high[1]}\right{right}}}", expected, {}) == 1
    turned = {"[": "(", "(": "["}[left]
    assert math(rf"\boxed{{{turned}{low[1]}, {high[1]}{right}}}", expected, {}) == 0
    assert math(rf"\boxed{{{left}{low[1]}, {high[0] + 1}{right}}}", expected, {}) == 0


# What made patterns of other graders take quadratic or exponential time.
_LONG = [
    r"\boxed{" * 50_000,
    r"\boxed{1} and \boxed{2} " * 10_000,
    r"\boxed{18" + " abc" * 480 + " 5}",
    "18 " * 300_000,
]
_LONG += [r"\boxed{18 abc" + "/ km" * 480 + "5}", r"\(" * 100_000, "$ " * 100_000, "#### " * 50_000, "answer " * 50_000]
_LONG += [
    "the total is " + "= 1 " * 50_000,
    "the answer is " + "1, " * 50_000,
    "1,000," * 50_000 + "a b",
    "9" * 200_000,
]
_LONG += [
    r"\boxed{" + "{" * 20_000 + "18" + "}" * 20_000 + "}",
    "<<" * 100_000,
    "it is not " * 50_000 + "17",
    "\n" * 300_000,
]


def test_long_responses_are_graded_within_the_limit():
    with GraderPool(Reward(grader="math")) as pool:
        assert pool.score([(response, "18", {}) for response in _LONG]) == [Score(0.0)] * len(_LONG)


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
