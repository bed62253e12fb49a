"""The one exception that is shown to the user as a sentence instead of a traceback, and what its sentences quote."""

from __future__ import annotations

import reprlib
from pathlib import Path

_MOST_CHARACTERS = 2000
_PLAIN_CHARACTERS = 300

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 80, 80
_repr.maxdict = _repr.maxlist = _repr.maxtuple = 3


class UsageError(Exception):
    """Bad input: names the setting or the file and line, what was found, and what to do.

    One line of at most 2,000 characters, whatever the parts it was made of: libraries explain themselves in several.
    """

    def __init__(self, message: object = "") -> None:
        line = " ".join(part.strip() for part in str(message).splitlines() if part.strip())
        super().__init__(line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 2] + " …")


def shown(value: object, plain: bool = False) -> str:
    """A value found in the input, as an error quotes it: on one line and short. A path is plain, anything else quoted
    unless it is to be `plain`."""
    if plain or isinstance(value, Path):
        text = str(value)
        half = _PLAIN_CHARACTERS // 2
        return text if len(text) <= _PLAIN_CHARACTERS else f"{text[:half]}…{text[-half:]}"
    return _repr.repr(value)
