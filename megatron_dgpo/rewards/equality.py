"""Whether a response's answer is the data's, in value and in form: math-verify's comparison behind a gate.

math-verify looks for something in a text that equals the answer. Here an answer counts only as a whole, and only when
it is written with what numbers need and what the data's answer has, too: `\\boxed{17=18}`, `\\boxed{\\geq 18}` and
`\\boxed{17+1}` are no ways to write 18.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

# Long enough for any answer; the patterns below take quadratic time.
_LONGEST = 2000

# Spelling that means nothing, in the order in which it goes.
_CLEANING: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\[\[\]()]|\*\*|\\!|\\displaystyle|\\?[$€£¥₹]", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad\b|\s+", " "),
        (r"−", "-"),
        (r"°|\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b", r"^\\circ"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\{\s*,\s*\}", ","),
        (r" ?(?:\\text ?\{ ?)?\b(?:percent(?:age)?|pct)\b(?: ?\})?", r"\\%"),
        (r"(?<!\\)%", r"\\%"),
        (r"\\(?:approx|simeq)\b|≈|:=", "="),
        (r",? ?\\(?:text|mathrm) ?\{ ?,? ?(?:and|or) ?\} ?|,? ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ?", ", "),
        (r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?!\d)", lambda match: match[1].replace(" ", "")),
        (r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?!\d|,\d)", lambda match: match[1].replace(",", "")),
        (r"^(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)$", r"\1\\times 10^{\2}"),
        (r"(?<![\d.}])(\d+) (\d+) ?/ ?(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"^[ =:+]+|[ .,;:]+$", ""),
    ]
]
_WRAPPER = r"\\(?:text|textbf|textrm|textit|textnormal|mathrm|mathbf|mathit|mbox)\s*"
# A unit: words without digits with their powers and slashes. Two letters might be two variables, unless known.
_UNIT_BEGINS = rf" ?{_WRAPPER}| [A-Za-z]{{3}}| ?\(| (?:cm|mm|km|kg|mg|ml|mL|ft|lb|hr|oz|mi|yd|am|pm)\b"
_UNIT = rf"(?: ?{_WRAPPER}\{{[^{{}}\d]*\}}| [A-Za-z]+| ?\^ ?\{{?-?[123]\}}?| ?[/.·][A-Za-z]*| ?\([A-Za-z .]+\))+"
_NUMBER_WITH_UNIT = re.compile(rf"(.*[\d}})])(?:(?={_UNIT_BEGINS}){_UNIT}|\^\\circ)")
_NUMBER_WITH_LETTERS = re.compile(r"(.*\d) ?[A-Za-z][A-Za-z /.]*(?:\^\{?\d\}?)?")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|neq?|lt|gt|leqslant|geqslant)\b")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\S")
# Numbers side by side, which parsers multiply or add, and differences: sums that are still to be worked out.
_UNWORKED = re.compile(r"\d \d|[\d)}] ?[(-]|\) ?[\d{]|(?<![\^_\d}c])\d+\{")
_POWER_OF_TEN = re.compile(r"\\(?:times|cdot) ?10(?= ?\^)")

# What answers are written with: numbers, and besides what their kind needs.
_NUMERIC = set("0123456789.,-/^{}()[]") | {r"\frac", r"\sqrt", r"\left", r"\right", r"\%", r"\circ"}
_LIST = {r"\pm", r"\{", r"\}", ";"}
_LETTERS = set(map(chr, (*range(65, 91), *range(97, 123))))
_FUNCTIONS = {rf"\{name}" for name in "sin cos tan cot sec csc arcsin arccos arctan ln log exp".split()}
_SYMBOLIC = _LETTERS | _FUNCTIONS | {"+", "*", r"\cdot", r"\times", r"\pi"}
_RELATIONAL = {"=", "<", ">", r"\le", r"\leq", r"\ge", r"\geq", r"\lt", r"\gt", r"\ne", r"\neq", r"\in", r"\infty"}
_SET = _RELATIONAL | _LIST | _SYMBOLIC | {r"\cup", r"\mathbb", r"\mid", "|", ":"}
_MATRIX = _LETTERS | {r"\begin", r"\end", "&", r"\\"}


@dataclass(frozen=True)
class _Item:
    """One element of a list; `name` is what stands before its `=`."""

    name: str | None
    value: str


@dataclass(frozen=True)
class Expected:
    """The data's answer: `items` of a list (often one), or `parsed`, a SymPy relation, or neither: words, a choice.

    allowed: the tokens that a response's answer may be written with. worked_out: it is no sum, and has no variables.
    """

    text: str
    items: tuple[_Item, ...] = ()
    parsed: object = None
    allowed: frozenset[str] = frozenset()
    symbolic: bool = False
    worked_out: bool = True


@lru_cache(maxsize=4096)
def parse_expected(answer: str) -> Expected:
    """Raises ValueError for an answer that no response could be compared with."""
    text = _clean(answer)
    if not re.search(r"\w", text):
        raise ValueError(f"the data's answer {answer[-80:]!r} is empty")
    if _is_words(text):
        return Expected(text)
    found = _items(text) or []
    if any(item.name and _symbols(item.value) for item in found):
        found = []
    items = tuple(replace(item, value=_without_unit(item.value)) for item in found)
    parsed = _parse(_joined(items) if items else text)
    if parsed is None:
        raise ValueError(f"math-verify finds no expression in the data's answer {answer[-80:]!r}")
    allowed = _tokens(text) | _allowed(parsed, items)
    worked_out = not _symbols(parsed) and "+" not in text and not _UNWORKED.search(text)
    return Expected(
        text, items, parsed, frozenset(allowed if worked_out else allowed | {"+"}), _symbols(parsed), worked_out
    )


def same(expected: Expected, answer: str) -> bool:
    """Whether a response's answer, as a whole, is the expected one. Time and memory have no bounds of their own."""
    text = _clean(answer[: _LONGEST + 1])
    if not text or len(answer) > _LONGEST:
        return False
    if _squeezed(text) == _squeezed(expected.text):
        return True
    if expected.parsed is None:
        return _plain_words(text).casefold() == _plain_words(expected.text).casefold()
    if re.search(r"\d\s*_", expected.text):
        # A number in another base: math-verify ignores the base.
        return _squeezed(text) == _squeezed(expected.text).partition("_")[0]
    items = _items(text) if expected.items else None
    if items:
        return _same_items(expected, items)
    # A set or an interval may be given by an inequality.
    return (not expected.items or _is_set(expected.parsed)) and _same_relation(expected, text)


def _same_items(expected: Expected, items: list[_Item]) -> bool:
    items = [replace(item, value=_without_unit(item.value, any_letters=not expected.symbolic)) for item in items]
    if all(item.name for item in (*expected.items, *items)):
        if sorted(str(item.name) for item in items) != sorted(str(item.name) for item in expected.items):
            return False
        places = {item.name: place for place, item in enumerate(expected.items)}
        items.sort(key=lambda item: places[item.name])
    values = [item.value for item in expected.items]
    given = [item.value for item in items]
    if not all(_has_form(value, expected) for value in given):
        return False
    ordered = len({item.name for item in expected.items}) > 1
    # A percentage is a number with a unit and, if the data has one, also its hundredth.
    numbers = [[value.replace(r"\%", "") for value in both] for both in (values, given)]
    return _equal_lists(numbers[0], numbers[1], ordered) or (
        r"\%" in expected.text and numbers[1] == given and _equal_lists(values, given, ordered)
    )


def _equal_lists(expected: list[str], given: list[str], ordered: bool) -> bool:
    """`ordered`: the elements of x = 1, y = 2, unlike those of 1, 2, have their places."""
    if ordered and len(expected) == len(given):
        return all(_equal(_parse(e), _parse(g)) for e, g in zip(expected, given, strict=True))
    expected, given = (_parse(_listing(values)) for values in (expected, given))
    return _listed(expected) == _listed(given) and _equal(expected, given)


def _same_relation(expected: Expected, text: str) -> bool:
    """Relations equal those of as many parts and sets; an equation with a name equals its right side, too."""
    from sympy import Basic, Eq, solve

    wanted, given = expected.parsed, _parse(text)
    if given is None or not _has_form(text, expected):
        return False
    parts = _relations(wanted), _relations(given)
    if parts[0] != parts[1] and not (_is_set(wanted) or _is_set(given) or parts == (1, 0)):
        return False
    if not _equal(wanted, given):
        return False
    if not (isinstance(wanted, Eq) and isinstance(given, Eq)) or wanted == given:
        return True
    if _equal(wanted.lhs, given.lhs) and _equal(wanted.rhs, given.rhs):
        return True
    # To math-verify all equations that it cannot solve are equal, such as those of matrices and 0 = 1.
    return all(isinstance(e, Basic) and e.free_symbols and solve(e, e.free_symbols) for e in (wanted, given))


def _items(text: str) -> list[_Item] | None:
    """The elements of a list with their values; None if one has none.

    `name = value` and true equations such as 9 · 2 = 18 have the value at their end, 17 = 18 and inequalities none.
    """
    items = []
    for element in _split(text, ",;"):
        members = [part.strip() for part in _split(re.sub(r"^ ?[A-Za-z] ?\\in\b", "x=", element), "=")]
        if _RELATION.search(element) or not all(members):
            return None
        named = len(members) > 1 and re.search(r"[A-Za-z]", re.sub(r"\\(?:frac|sqrt|cdot|times)", "", members[0]))
        name = _squeezed(members.pop(0)) if named else None
        if not all(_equal(_parse(_without_unit(a)), _parse(_without_unit(b))) for a, b in pairwise(members)):
            return None
        items.append(_Item(name, members[-1]))
    return items


def _split(text: str, separators: str) -> list[str]:
    """Split at separators that no bracket encloses; half-open intervals close with the other kind."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in separators:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _has_form(text: str, expected: Expected) -> bool:
    if not _tokens(_POWER_OF_TEN.sub("10", text)) <= expected.allowed:
        return False
    return not expected.worked_out or not _UNWORKED.search(text)


def _allowed(parsed, items: tuple[_Item, ...]) -> set[str]:
    from sympy import MatrixBase, MatrixExpr

    allowed = set(_NUMERIC)
    if _listed(parsed) > 1:
        allowed |= _LIST
    if not items:
        allowed |= _RELATIONAL
    if _is_set(parsed):
        allowed |= _SET
    if isinstance(parsed, MatrixBase | MatrixExpr):
        allowed |= _MATRIX
    return allowed | _SYMBOLIC if _symbols(parsed) else allowed


def _symbols(value) -> bool:
    """Whether a SymPy object, or the text of one, has variables."""
    parsed = _parse(_without_unit(value)) if isinstance(value, str) else value
    return bool(getattr(parsed, "free_symbols", None))


def _is_set(parsed) -> bool:
    from sympy import FiniteSet, Set

    return isinstance(parsed, Set) and not isinstance(parsed, FiniteSet)


def _listed(parsed) -> int:
    """How many elements are written, equal ones too; an interval is written as a pair is."""
    from sympy import FiniteSet, Interval, Tuple

    if isinstance(parsed, FiniteSet):
        return len(getattr(parsed, "_unsorted_args", parsed.args))
    if isinstance(parsed, Interval):
        return 2
    return len(parsed.args) if isinstance(parsed, Tuple) else 1


def _relations(parsed) -> int:
    from sympy import And
    from sympy.core.relational import Relational

    if isinstance(parsed, And):
        return len(getattr(parsed, "_unsorted_args", parsed.args))
    return int(isinstance(parsed, Relational))


def _equal(expected, given) -> bool:
    from math_verify import verify

    if expected is None or given is None:
        return False
    # Its time limits use signals and hang all the same: the worker has a limit of its own.
    return verify(expected, given, timeout_seconds=None, allow_set_relation_comp=True)


@lru_cache(maxsize=256)
def _parse(text: str):
    """The SymPy object of a whole text, or None."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    # Its units would cut 3t to 3.
    config = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none")
    normal = normalize_latex(text, config)
    try:
        real = not should_treat_as_complex(normal)
        return latex2sympy(normal, is_real=real, convert_degrees=False, normalization_config=None)
    except Exception:
        return None


def _clean(text: str) -> str:
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    while text.startswith("{") and text.endswith("}") and len(_split(text[1:-1], "}")) == 1:
        text = text[1:-1].strip()
    return text


def _without_unit(text: str, any_letters: bool = False) -> str:
    """The number before a unit, else the text; any_letters: whatever letters follow a number are one."""
    text = text.strip()
    for pattern in (_NUMBER_WITH_UNIT, _NUMBER_WITH_LETTERS)[: 1 + any_letters]:
        if found := pattern.fullmatch(text):
            return found[1].strip()
    return text


def _is_words(text: str) -> bool:
    words = _plain_words(text)
    shortest = 2 if re.match(_WRAPPER, text) else 3
    return bool(_CHOICE.fullmatch(words)) or (
        re.fullmatch(r"[A-Za-z'’ .-]+", words) is not None and re.search(rf"[A-Za-z]{{{shortest}}}", words) is not None
    )


def _plain_words(text: str) -> str:
    """Words without \\text{}, a choice's letter without parentheses."""
    text = " ".join(re.sub(rf"{_WRAPPER}\{{([^{{}}]*)\}}", r" \1 ", text).split())
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def _squeezed(text: str) -> str:
    return re.sub(rf"{_WRAPPER}(?=\{{)|\\left(?![a-z])|\\right(?![a-z])|[{{}}]|(?<!\d)\s|\s(?!\d)", "", text)


def _tokens(text: str) -> set[str]:
    return set(_TOKEN.findall(text))


def _joined(items: tuple[_Item, ...]) -> str:
    return _listing([item.value for item in items])


def _listing(values: list[str]) -> str:
    # With the space: 1,000 is a number.
    return ", ".join(values)
