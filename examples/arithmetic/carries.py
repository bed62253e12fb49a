"""Where a carry is due in a response: the digits that credit should find, for `inspect_credit.py --pivots`."""

from __future__ import annotations

import re
from itertools import pairwise

_LINE = re.compile(r"^\d\+\d\+(\d)=(\d{1,2})$", re.MULTILINE)


def carries(text: str) -> list[tuple[int, int]]:
    """(start, end) of the third digit of each line that follows a line whose sum is 10 or more.

    Whether it is kept or forgotten: that is where the response is decided. Lines are those of `prepare.solve`.

    >>> text = "7+8+0=15\\n3+4+1=8\\n5+5+0=10\\n#### 1085"
    >>> [text[start:end] for start, end in carries(text)]
    ['1']
    """
    lines = pairwise(_LINE.finditer(text))
    return [line.span(1) for before, line in lines if before.end() + 1 == line.start() and int(before[2]) >= 10]
