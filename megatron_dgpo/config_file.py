"""Settings as files and arguments: a YAML file with dotted overrides (`algorithm.tau=0.3`) to a Config, and back."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError

from megatron_dgpo.config import Config, Section
from megatron_dgpo.errors import UsageError, shown

_MOST_FILE_BYTES = 256 * 2**10
"""A file of every setting has 5 KiB. What is larger is something else, and PyYAML would take minutes to say so."""
_MOST_LEVELS = 20
_MOST_PROBLEMS = 5
_NULL = ("", "~", "null", "Null", "NULL")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply overrides, later ones over earlier ones; relative paths in a file are relative to it.

    An override is `section.name=value`, or another file of some of the settings (`is_file_of_settings`). Texts, paths
    and choices in overrides are taken as they are: no quotes, no escapes; `null` is an optional path's absence, and
    several paths are a list in brackets. Other values are YAML. In either, scalars are text until their setting says
    what they are. Raises UsageError naming the file or setting, the value found and, for an unknown name, the nearest
    one.
    """
    path = Path(path)
    settings: dict = {name: {} for name in Config.model_fields}
    _apply_file(settings, path)
    for override in overrides or []:
        if is_file_of_settings(override):
            _apply_file(settings, Path(override))
        else:
            _apply_override(settings, override)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UsageError(f"{shown(path)}: {_explain(error)}") from None


def is_file_of_settings(override: str) -> bool:
    """Whether an argument behind the config's is a further file, such as those of examples/algorithms."""
    return "=" not in override and override.endswith((".yaml", ".yml"))


def plain_settings(config: Config) -> dict[str, dict[str, Any]]:
    """{section: {name: value}} of every setting, as YAML and JSON have values: paths are text, and absolute."""
    settings: dict = {}
    for name, section in config:
        settings[name] = {key: [*map(_plain, v)] if isinstance(v, tuple) else _plain(v) for key, v in section}
    return settings


def config_text(config: Config) -> str:
    """Every setting with its value, as a file that `load_config` reads wherever it is put."""
    return yaml.safe_dump(plain_settings(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    return str(value.absolute()) if isinstance(value, Path) else value


class _Loader(yaml.BaseLoader):
    """Every scalar as it is written, null excepted.

    YAML would make a date of 2024-01-01, 90 of 1:30 and 8 of 010, each a folder's name somewhere, but text of 1e-5;
    and merge keys (<<) and Python's tags can make a short file a large one, or worse.
    """

    def fetch_flow_collection_start(self, token_class):
        # Beyond a few levels PyYAML spends seconds on each further bracket.
        if self.flow_level >= _MOST_LEVELS:
            raise yaml.scanner.ScannerError(None, None, "nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def construct_scalar(self, node):
        value = super().construct_scalar(node)
        return None if node.style is None and value in _NULL else value


def _parse(text: str) -> Any:
    """Raises ValueError with the place and what is wrong there."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{error.reason}: U+{error.character:04X} at character {error.position + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read(path: Path) -> dict:
    try:
        settings = _parse(_content(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown(path)}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except ValueError as error:
        raise UsageError(f"{shown(path)}: not valid YAML: {error}") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UsageError(f"{shown(path)}: expected sections such as 'model:' and 'data:', found {shown(settings)}")
    return settings


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{shown(path)}: no such config file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{shown(path)}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(content) > _MOST_FILE_BYTES:
        raise UsageError(f"{shown(path)}: larger than {_MOST_FILE_BYTES // 2**10} KiB, which no file of settings is")
    return content


def _apply_file(settings: dict, path: Path) -> None:
    """Put what the file says over `settings`."""
    found = _read(path)
    _anchor_paths(found, Config, path.parent)
    for name, values in found.items():
        if isinstance(values, dict) and isinstance(settings.get(name), dict):
            settings[name] |= values
        # None: a section all of whose settings are commented out.
        elif values is not None or name not in Config.model_fields:
            settings[name] = values


def _anchor_paths(settings: dict, section: type[Section], folder: Path) -> None:
    """Make the paths written in a config file relative to that file."""
    for name, field in section.model_fields.items():
        value = settings.get(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if isinstance(value, dict):
                _anchor_paths(value, field.annotation, folder)
        elif value and Path in _kinds(section)[name]:  # type: ignore[arg-type]
            several = isinstance(value, list)
            settings[name] = [_anchored(path, folder) for path in value] if several else _anchored(value, folder)


def _anchored(path: Any, folder: Path) -> Any:
    return str(folder / path) if isinstance(path, str) and path and path[0] != "~" else path


@functools.cache
def _kinds(section: type) -> dict[str, set[type]]:
    """The types that each setting may be of, NoneType among them; str for a choice, tuple for several of them, and dict
    whatever it holds."""
    found = {}
    for name, hint in get_type_hints(section).items():
        several = {tuple: (tuple, *get_args(hint)[:1]), dict: (dict,)}
        kinds = several.get(get_origin(hint)) or get_args(hint) or (hint,)
        found[name] = {str if isinstance(kind, str) else kind for kind in kinds}
    return found


def _apply_override(settings: dict, override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or len(keys) != 2 or not all(keys):
        raise UsageError(f"override {shown(override)}: expected section.name=value, for example algorithm.tau=0.3")
    section = settings.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise UsageError(f"override {shown(override)}: {shown(keys[0])} is not a section of settings")
    field = Config.model_fields.get(keys[0])
    kinds = _kinds(field.annotation).get(keys[1], set()) if field else set()
    is_null = text == "null" and bool(kinds & {tuple, type(None)})
    is_list = text.startswith("[") and tuple in kinds
    if kinds & {str, Path} and not (is_null or is_list):
        section[keys[1]] = text
        return
    try:
        section[keys[1]] = _parse(text)
    except ValueError as error:
        raise UsageError(f"{name}={shown(text)}: not valid YAML: {error}") from None


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    lines = [_explain_one(problem) for problem in problems[:_MOST_PROBLEMS]]
    more = len(problems) - _MOST_PROBLEMS
    return "; ".join([*lines, *([f"and {more} more"] if more > 0 else [])])


def _explain_one(problem: dict) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown setting {shown(place)}{_nearest(place)}"
    if problem["type"] == "missing":
        return f"setting '{place}' is missing: give it in the file or as {place}=VALUE"
    if problem["type"] == "model_type":
        return f"{place}={shown(problem['input'])}: expected a section of settings"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}={shown(problem['input'])}: {message[0].lower()}{message[1:]}"


def setting_names() -> list[str]:
    """Every `section.name`."""
    return [f"{section}.{name}" for section, f in Config.model_fields.items() for name in f.annotation.model_fields]


def _nearest(place: str) -> str:
    candidates = setting_names() if "." in place else list(Config.model_fields)
    matches = difflib.get_close_matches(place[:100], candidates, n=1, cutoff=0.5)
    if not matches and "." in place:
        leaf = place.rsplit(".", 1)[1]
        matches = [name for name in candidates if name.rsplit(".", 1)[1] == leaf][:1]
    return f"; did you mean '{matches[0]}'?" if matches else f"; expected one of {', '.join(candidates)}"
