"""JSON files: those of others read so that every fault in them is one sentence, and our own replaced whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_dgpo.errors import UsageError, shown

# The index of a model of 100,000 tensors has 10 MB.
_MOST_BYTES = 64 * 2**20


class Content(BaseModel):
    """What a file must hold: numbers are numbers, not text that looks like one. Keys that are not named are left."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


T = TypeVar("T", bound=Content)


def read_object(path: Path) -> dict[str, Any]:
    """Raises UsageError when the file is missing, unreadable, larger than 64 MiB, not JSON or not an object."""
    if not path.is_file():
        raise UsageError(f"{path} is missing")
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise UsageError(f"{path} has {size} bytes, expected at most {_MOST_BYTES}")
        content = pydantic_core.from_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {shown(content)}, expected a JSON object")
    return content


def replace_text(path: Path, text: str) -> None:
    """Whoever reads the file finds what was there or all of what is; its folder must be there."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    os.replace(fresh, path)


def checked(path: Path, content: dict[str, Any], kind: type[T]) -> T:
    """`content` of a file as `kind`. Raises UsageError naming the first key that is missing or wrong."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(shown(part, plain=True) for part in problem["loc"])
        if problem["type"] == "missing":
            raise UsageError(f"{path}: key '{key}' is missing") from None
        message = problem["msg"].removeprefix("Value error, ")
        found = f"{key}={shown(problem['input'])}: {message[:1].lower()}{message[1:]}" if key else message
        raise UsageError(f"{path}: {found}") from None
