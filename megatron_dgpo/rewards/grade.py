"""Graders: (response, answer, row) -> reward. They run in worker processes (`worker.py`), never in the trainer."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable

from megatron_dgpo.errors import UsageError

Grader = Callable[[str, str, dict], float]

_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf)\{([^{}]*)\}")


def final_answer(text: str) -> str:
    """What a solution gives as its answer, white space made single: the line after the last `####`, else what the
    last \\boxed{} holds, else the last line that is not empty; empty if there is none.
    """
    answer = marked_answer(text)
    if answer is None:
        lines = [line for line in text.splitlines() if line.strip()]
        answer = lines[-1] if lines else ""
    return " ".join(answer.split())


def marked_answer(text: str) -> str | None:
    """The line after the last `####`, else the content of the last \\boxed{}, else None."""
    _, mark, rest = text.rpartition("####")
    if mark:
        return rest.strip().partition("\n")[0]
    start = max(text.rfind(box) for box in ("\\boxed{", "\\framebox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for stop in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[stop], 0)
        if depth == 0:
            content = text[start:stop].strip()
            whole = _TEXT.fullmatch(content)
            return whole[1] if whole else content
    return None


def exact(response: str, answer: str, row: dict) -> float:
    """1 when the response's final answer is the given one's, letter by letter but for white space."""
    expected = final_answer(answer)
    return float(bool(expected) and final_answer(response) == expected)


def math(response: str, answer: str, row: dict) -> float:
    """1 when math-verify finds the response's final answer equal to the given one (`1,000.0` is `1000`).

    A marked answer (`####`, \\boxed{}) is taken as the answer; without a mark math-verify looks for the likeliest
    expression of the response. Its time limits are off: they use signals, hang all the same, and the worker has a
    limit of its own. Raises ValueError when `answer` holds no expression.
    """
    from math_verify import parse, verify

    expected = parse(f"${final_answer(answer)}$", parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify finds no expression in the data's answer {answer[-80:]!r}")
    marked = marked_answer(response)
    given = parse(response if marked is None else f"${marked}$", parsing_timeout=None)
    return float(verify(expected, given, timeout_seconds=None))


GRADERS: dict[str, Grader] = {"math": math, "exact": exact}


def check_grader_name(name: str) -> None:
    """Raises UsageError for a name that is neither built in nor written module:function. Imports nothing."""
    module, separator, function = name.partition(":")
    if name in GRADERS or (module and function.isidentifier()):
        return
    near = difflib.get_close_matches(name, GRADERS, n=1)
    hint = f"; did you mean '{near[0]}'?" if near and not separator else "."
    raise UsageError(
        f"reward.grader={name}: unknown grader{hint} Use {', '.join(GRADERS)}, or write module:function for one of "
        "your own, for example my_rewards:score"
    )


def load_grader(name: str) -> Grader:
    """The grader of that name, imported and, if it is built in, tried on known pairs.

    Raises UsageError when it cannot be imported, is not a function, or a built-in one misjudges a known pair.
    """
    check_grader_name(name)
    if name in GRADERS:
        _check_known_pairs(name)
        return GRADERS[name]
    module, _, function = name.partition(":")
    try:
        grader = getattr(importlib.import_module(module), function)
    except AttributeError as error:
        found = [key for key, value in vars(importlib.import_module(module)).items() if callable(value)]
        near = difflib.get_close_matches(function, found, n=1)
        hint = f"; did you mean {module}:{near[0]}?" if near else ""
        raise UsageError(f"reward.grader={name}: {error}{hint}") from None
    except BaseException as error:
        raise UsageError(
            f"reward.grader={name}: {type(error).__name__}: {error}; modules are looked for in the current folder "
            "and on PYTHONPATH"
        ) from None
    if not callable(grader):
        raise UsageError(f"reward.grader={name}: type {type(grader).__name__}, not a function")
    return grader


def _check_known_pairs(name: str) -> None:
    # Fractions need math-verify's LaTeX parser: where it fails, every fraction not written alike grades 0 without a
    # word, while plain numbers still pass.
    answer, right, wrong = {"exact": ("18", "18", "17"), "math": (r"\frac{1}{2}", r"\frac{2}{4}", r"\frac{2}{5}")}[name]
    remedy = "install math-verify==0.9.0 with antlr4-python3-runtime==4.13.2"
    try:
        judged = [GRADERS[name](rf"so it is \boxed{{{response}}}", answer, {}) for response in (right, wrong)]
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise UsageError(f"reward.grader={name} does not work here: {found}; {remedy}") from None
    if judged != [1.0, 0.0]:
        raise UsageError(
            f"reward.grader={name} does not work here: for the answer {answer} the responses {right} and {wrong} get "
            f"{judged[0]:g} and {judged[1]:g} instead of 1 and 0; {remedy}"
        )
