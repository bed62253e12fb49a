"""Which part of a text is its answer. Pure text: what that part means is for `equality.py` to say."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BRACE = re.compile(r"\\(?:boxed|framebox|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|framebox|fbox)\b")
_WHOLE_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
# Between the boxes of one answer: no word but `and` and `or`, or the rest of a sentence that joins them.
_NO_WORD = re.compile(r"(?:[^\w{}]|\\(?:text|mathrm)\s*\{|\}|\\q?quad\b|\b(?:and|or)\b)*")
_JOINING_WORDS = re.compile(r"(?!.*[.!?:]\s)(?=.*(?:[,;]|\band\b|\bor\b)).*")
_LONGEST_JOIN = 70
_MARK = re.compile(r"####|\banswers?\b(?:\s+(?:is|are)\b)?(?:\s*\*+)?\s*[:=]?", re.IGNORECASE)
_NEXT_SENTENCE = re.compile(r"(?<=\S)[.!]\s+[A-Z].*")
# The calculations that GSM8K's solutions have beside their results.
_CALCULATION = re.compile(r"<<[^<>]*>>")
# Markdown's headings, quotes, bullets and bold type.
_DECORATION = re.compile(r"^[\s#>*_]+|^-\s+|[\s*_#]+$")

_NUMBER = r"-?[$€£¥₹]?-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?(?!\w|[.,]\d)(?:\s?\\?%)?"
_EXPRESSION = rf"(?:\$(?!\d[^$\\]*\s[A-Za-z]{{3}})[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]|(?<![\w.]){_NUMBER})"
_LIST = re.compile(rf"\s*\**({_EXPRESSION}(?:\s*(?:,|,?\s*\b(?:and|or)\b)\s*{_EXPRESSION})*)")
_STATED = re.compile(rf"(?<!\bnot ){_EXPRESSION}")
_COPULA = re.compile(r":\s|\b(?:is|are|was|were|equals?)\b")


@dataclass(frozen=True)
class Answer:
    """`text` of the answer; `marked` when the writer said that it is one, and it is therefore nothing else."""

    text: str
    marked: bool


def given_answer(response: str) -> Answer:
    """What a response gives as its answer.

    - Its last \\boxed{}; boxes side by side, or in a sentence that joins them by a comma, `and` or `or`, are one list.
    - Without a box its last line that holds a letter or digit: what follows `####` or "answer (is)" there, or all of it
      if it has neither. Headings, bold type and the full stop are not part of the answer.

    Whatever stands elsewhere does not count. Empty for a response that breaks off within a box.
    """
    boxed = _boxed(response)
    if boxed is not None:
        return Answer(boxed, marked=True)
    line = _last_line(response)
    if _BOX.search(line):
        return Answer("", marked=True)
    marks = list(_MARK.finditer(line))
    if not marks:
        return Answer(_bare(line), marked=False)
    return Answer(_bare(_NEXT_SENTENCE.sub("", line[marks[-1].end() :])), marked=True)


def expected_answer(answer: str) -> str:
    """What the data's answer is: the last \\boxed{} or the last line's `####` of a worked solution, else all of it."""
    boxed = _boxed(answer)
    if boxed is not None:
        return boxed
    _, mark, rest = answer.rstrip().rpartition("####")
    return _bare(rest) if mark and "\n" not in rest else unwrapped(" ".join(answer.split()))


def stated_answer(answer: Answer) -> str:
    """The mathematics of an answer: of a sentence without a mark its only expression, or what its last `=` or "is"
    is followed by if that is the only one there; empty if a sentence has several, none of which is the answer.
    """
    line = answer.text
    words = re.search(r"[A-Za-z]{2,}|[A-Za-z]:\s", re.sub(rf"{_EXPRESSION}|\\[A-Za-z]+", " ", line))
    stated = {found[0] for found in _STATED.finditer(line)}
    if answer.marked or not words or not re.search(r"\d|\$", line):
        return line
    if len(stated) == 1:
        return stated.pop()
    copulas = list(re.finditer("=", line)) or list(_COPULA.finditer(line))
    rest = line[copulas[-1].end() :] if copulas else ""
    found = _LIST.match(rest)
    return found[1] if found and not _STATED.search(rest, found.end()) else ""


def unwrapped(text: str) -> str:
    """The content of a \\text{} that is all of the text, else the text."""
    whole = _WHOLE_TEXT.fullmatch(text.strip())
    return whole[1].strip() if whole else text.strip()


def _boxed(text: str) -> str | None:
    boxes = _boxes(text)
    if not boxes:
        return None
    contents = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[end:start]
        if len(between) > _LONGEST_JOIN or not (_NO_WORD.fullmatch(between) or _JOINING_WORDS.fullmatch(between)):
            break
        # The same answer twice, as a last line repeats it, is one.
        if content != contents[0]:
            contents.insert(0, content)
    return ", ".join(contents) if len(contents) > 1 else unwrapped(contents[0])


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every box that is closed, outer ones only, in one pass."""
    boxes: list[tuple[int, int, str]] = []
    opened: list[re.Match] = []
    for brace in _BRACE.finditer(text):
        if brace[0].endswith("{") and brace[0] != "\\{":
            opened.append(brace)
        elif brace[0] == "}" and opened:
            box = opened.pop()
            if box[0] != "{":
                while boxes and boxes[-1][0] > box.start():
                    boxes.pop()
                boxes.append((box.start(), brace.end(), text[box.end() : brace.start()].strip()))
    return boxes


def _last_line(text: str) -> str:
    for line in reversed(text.splitlines()):
        if re.search(r"\w", line) and not line.lstrip().startswith("\\end{"):
            return _CALCULATION.sub("", line)
    return ""


def _bare(text: str) -> str:
    text = " ".join(text.split())
    previous = None
    while text != previous:
        previous, text = text, _DECORATION.sub("", text).removesuffix(".").strip()
    return unwrapped(text)
