"""A response's text token by token, and which of its tokens a function of the text marks."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dgpo.errors import UsageError

Spans = Callable[[str], list[tuple[int, int]]]
"""Of a response's text: (start, end) of the characters that matter."""

_UNFINISHED = "\ufffd"
# A character has at most four bytes. What is no character after so many tokens will be none.
_MOST_PARTS = 8


@dataclass(frozen=True)
class TokenText:
    shown: str
    """Empty of a token whose character ends in a later one, where it is shown."""
    start: int
    """In the response's text without special tokens, of what is shown, or of that character; as `end`."""
    end: int


def token_texts(tokenizer, token_ids: Sequence[int]) -> list[TokenText]:
    """Of each token; special tokens are shown and have no place in the text."""
    special, texts, held, place = set(tokenizer.all_special_ids), [], 0, 0
    before, read = 0, 0
    for index, token in enumerate(token_ids):
        # Decoders may treat the first token in a way of its own: what was read last goes before.
        shown = _decoded(tokenizer, token_ids[before : index + 1])[len(_decoded(tokenizer, token_ids[before:read])) :]
        following = token_ids[index + 1 : index + 2]
        last = not following or following[0] in special or index - read + 1 == _MOST_PARTS
        if shown.endswith(_UNFINISHED) and not last:
            held += 1
            continue
        end = place if token in special else place + len(shown)
        texts += [TokenText("", place, end)] * held + [TokenText(shown, place, end)]
        held, place, before, read = 0, end, read, index + 1
    return texts


def _decoded(tokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def text_of(texts: list[TokenText]) -> str:
    """Without special tokens."""
    return "".join(text.shown for text in texts if text.start < text.end)


def marked(texts: list[TokenText], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether any character of each token is in one of the spans."""
    return [any(max(text.start, start) < min(text.end, end) for start, end in spans) for text in texts]


def load_spans(name: str) -> Spans:
    """The function that `module:function` names. Raises UsageError where there is none."""
    module, _, function = name.partition(":")
    if not module or not function.isidentifier():
        raise UsageError(f"--pivots={name}: expected module:function, for example examples.arithmetic.carries:carries")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise UsageError(
            f"--pivots={name}: {type(error).__name__}: {error}; modules are looked for in the current folder, in the "
            "repository and on PYTHONPATH"
        ) from None
    if not callable(found):
        raise UsageError(f"--pivots={name}: is of type {type(found).__name__}, not a function")
    return found


def spans_of(function: Spans, name: str, text: str) -> list[tuple[int, int]]:
    """Raises UsageError where the function fails, or gives anything but spans of the text."""
    try:
        spans = [(int(start), int(end)) for start, end in function(text)]
    except Exception as error:
        raise UsageError(f"--pivots={name}: failed on {text[:80]!r}: {type(error).__name__}: {error}") from None
    for start, end in spans:
        if not 0 <= start <= end <= len(text):
            raise UsageError(f"--pivots={name}: gave the span {start} to {end} of a text of {len(text)} characters")
    return spans
