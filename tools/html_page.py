"""Parts of the pages that tools write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(names: Sequence[str], lines: Iterable[Sequence], plain: bool = True) -> str:
    """plain: cells are text, whoever wrote it, and not HTML."""

    def row(cells: Iterable, kind: str) -> str:
        texts = (escape(str(cell)) if plain or kind == "th" else str(cell) for cell in cells)
        return "<tr>" + "".join(f"<{kind}>{text}</{kind}>" for text in texts) + "</tr>"

    return "\n".join(["<table>", row(names, "th"), *(row(line, "td") for line in lines), "</table>"]) + "\n"


def note(text: str) -> str:
    """A paragraph about what stands beside it."""
    return f'<p class="note">{escape(text)}</p>'
