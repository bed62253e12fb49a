"""docs/settings.md, made from megatron_dgpo/config.py: every setting with its type, default and meaning.

python tools/settings_page.py             # write the page
python tools/settings_page.py --check     # exit status 1 if the page is not what config.py says
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from megatron_dgpo import config
from megatron_dgpo.config import Config, Section

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

_INTRODUCTION = """# Settings

Made by `python tools/settings_page.py` from [megatron_dgpo/config.py](../megatron_dgpo/config.py); a test fails when it
is not current, so change the docstrings there and run the command again.

A config is a YAML file with these sections, and the command line overrides it by `section.name=value`. Relative paths
in the file are relative to the file. `null` switches an optional setting off, or leaves the choice to the program, as
its line says. Integers are below 2^31, bytes below 2^63. Names that end in `_s` are in seconds, in `_bytes` in bytes,
in `_tokens` in tokens.
"""

_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
# Bounds from here on guard against overflow: they are said once, at the top.
_HUGE = 2**31


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is stale")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/settings.md")
    options = parser.parse_args(arguments)
    wanted = page()
    if not options.check:
        options.page.write_text(wanted, encoding="utf-8")
    elif not options.page.is_file() or options.page.read_text(encoding="utf-8") != wanted:
        print(f"{options.page} is not what config.py says: run python tools/settings_page.py", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    """The whole page, as Markdown."""
    docstrings = attribute_docstrings(inspect.getsource(config))
    parts = [_INTRODUCTION]
    for name, field in Config.model_fields.items():
        parts.append(_section(name, field.annotation, docstrings[field.annotation.__name__]))
    return "\n".join(parts)


def attribute_docstrings(source: str) -> dict[str, dict[str, str]]:
    """{class: {attribute: the string literal below it}} of a module's classes."""
    return {node.name: _docstrings_of(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _docstrings_of(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(following, ast.Expr):
            continue
        if isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
            found[statement.target.id] = inspect.cleandoc(following.value.value)
    return found


def _section(name: str, section: type[Section], docstrings: dict[str, str]) -> str:
    hints = get_type_hints(section, include_extras=True)
    rows = [f"## {name}\n", "| setting | type | default | meaning |", "|---|---|---|---|"]
    for setting, field in section.model_fields.items():
        cells = [
            f"`{name}.{setting}`",
            _type(hints[setting], _bounds(field.metadata)),
            _default(field),
            " ".join(docstrings.get(setting, "").split()),
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(hint: Any, bounds: dict[str, str]) -> str:
    """In words. bounds: what is known of the value beside its type."""
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        return _type(kind, _bounds(extras) | bounds)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type(part, {} if part is type(None) else bounds) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0], {})}s"
    return ", ".join([_NAMES[hint], *bounds.values()])


def _bounds(metadata: list) -> dict[str, str]:
    found = {}
    for extra in metadata:
        if isinstance(extra, FieldInfo):
            found |= _bounds(extra.metadata)
        for name, sign in _BOUNDS.items():
            value = getattr(extra, name, None)
            if value is not None and value < _HUGE:
                found[name] = f"{sign} {value:,}"
    return found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if value == ():
        return "`[]`"
    if isinstance(value, int) and value and value % 2**20 == 0:
        return f"`{value}` ({value // 2**20} MiB)"
    return f"`{value}`"


if __name__ == "__main__":
    sys.exit(main())
