"""Every setting with its type, default and meaning, in words, as config.py says them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from megatron_dgpo.config import Config

_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
# Bounds from here on guard against overflow: they are said once, on the page.
_HUGE = 2**31


class Setting(NamedTuple):
    name: str
    """section.name"""
    type: str
    default: str
    meaning: str


def settings_of(section: str) -> list[Setting]:
    """Those of one section, in their order. Values are `quoted`."""
    kind: Any = Config.model_fields[section].annotation
    hints = get_type_hints(kind, include_extras=True)
    return [
        Setting(
            f"{section}.{name}",
            _type(hints[name], _bounds(field.metadata)),
            _default(field),
            " ".join((field.description or "").split()),
        )
        for name, field in kind.model_fields.items()
    ]


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
    if get_origin(hint) is dict:
        return f"mapping of names to {_type(get_args(hint)[1], {})}s"
    return ", ".join([_NAMES[hint], *bounds.values()])


def _bounds(metadata: list) -> dict[str, str]:
    found: dict[str, str] = {}
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
