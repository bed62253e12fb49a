"""Graders: (response, answer, row) -> reward. They run in worker processes (`worker.py`), never in the trainer.

One of the user's own may return several rewards, {name: number} with the names of `reward.weights`.

The answer of a response is its last \\boxed{} (boxes side by side are one list) or else its last line, of which what
follows `####` or "answer (is)" counts. Of a last line that is a sentence without such a mark, `math` takes the only
expression, or the one after its `=` or "is". Nothing else in the response counts, and headings change nothing.

To `math` that text is right when the whole of it, but for units, is what the data has in value, by math-verify, and is
written in the data's form: with numbers, their fractions, powers and roots, and otherwise only what the data's answer
needs. Lists have as many elements as the data's, relations and sets count only if the data has one, sums are worked
out unless the data's is none, and a percentage is a number with a unit. `x = 18` and true equations are their right
side. Two different answers are none.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Collection

from megatron_dgpo.errors import UsageError
from megatron_dgpo.rewards.answer import expected_answer, given_answer, stated_answer
from megatron_dgpo.rewards.equality import parse_expected, same

Grader = Callable[[str, str, dict], float | dict[str, float]]


def exact(response: str, answer: str, row: dict) -> float:
    """1 when the response's answer is the data's, letter by letter but for white space."""
    expected = " ".join(expected_answer(answer).split())
    return float(bool(expected) and " ".join(given_answer(response).text.split()) == expected)


def math(response: str, answer: str, row: dict) -> float:
    """1 when the response's answer is the data's in value and form. Raises ValueError when the data's is none."""
    expected = parse_expected(expected_answer(answer))
    return float(same(expected, stated_answer(given_answer(response))))


GRADERS: dict[str, Grader] = {"math": math, "exact": exact}


def weighted_sum(rewards: dict[str, float], weights: dict[str, float]) -> float:
    """The one number that several rewards are where one is asked for. Both have the same names."""
    return sum(weight * rewards[name] for name, weight in weights.items())


def check_grader_name(name: str, weights: Collection[str] = ()) -> None:
    """Raises UsageError for a name that is neither built in nor written module:function, and for a built-in one where
    several rewards have `weights`. Imports nothing."""
    module, separator, function = name.partition(":")
    if name in GRADERS and weights:
        raise UsageError(
            f"reward.grader={name} gives one number, and reward.weights are for {', '.join(weights)}: give a grader of "
            "your own that returns these (module:function), or set reward.weights=null"
        )
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
