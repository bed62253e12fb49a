"""Problems: JSONL or Parquet rows to token ids, in an order that a restart can resume."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import sys
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dgpo.config import Config
from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.rollout.response import Prompt

if TYPE_CHECKING:
    # Imports PyTorch, for which whoever mistyped a file's name need not wait.
    from megatron_dgpo.micro_batch import TrainingSequence

_MOST_LEVELS = 100
"""Of lists and objects in a row. Graders get rows pickled, and pickle ends at about 500."""
_HINTED_FIELDS = 20
_HINTED_FILES = 1000


def load_tokenizer(model_dir: Path):
    """The tokenizer of a Hugging Face directory, exactly as its tokenizer.json describes it.

    transformers' AutoTokenizer goes by the model's type instead and, for a Qwen2 model with a tokenizer of its own,
    builds Qwen2's splitting rules around the foreign vocabulary.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_own = (model_dir / "tokenizer.json").is_file()
    try:
        tokenizer = (PreTrainedTokenizerFast if has_own else AutoTokenizer).from_pretrained(model_dir)
    except Exception as error:
        raise UsageError(f"{model_dir} has no tokenizer that transformers can load: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {model_dir} has no end token (eos_token): responses could not end")
    return tokenizer


def end_tokens(model_dir: Path, tokenizer) -> list[int]:
    """Whatever the model's own generation settings call an end."""
    found = {tokenizer.eos_token_id}
    path = model_dir / "generation_config.json"
    if path.is_file():
        ends = json.loads(path.read_text()).get("eos_token_id") or []
        found |= set(ends if isinstance(ends, list) else [ends])
    return sorted(token for token in found if token is not None)


def load_prompts(config: Config, path: Path, setting: str, tokenizer) -> list[Prompt]:
    """The problems of a file; `setting` is the one that names it.

    `answer` is the field as it is: graders take the final answer out of a worked solution themselves.
    Raises UsageError with file and line for a row that is not an object, lacks a field or is too long, and for a file
    that is missing or has no rows.
    """
    rows = _rows(path, setting)
    texts, encoded = _encode_prompts(config, tokenizer, rows)
    answers = [_field(row, config.data.answer_field, "data.answer_field", place) for place, row in rows]
    rollout = config.rollout
    longest = rollout.context_tokens - rollout.max_response_tokens
    _check_lengths(
        rows,
        [len(token_ids) for token_ids in encoded],
        longest,
        f"prompt of {{length}} tokens, but rollout.context_tokens={rollout.context_tokens} leaves {longest} beside "
        f"rollout.max_response_tokens={rollout.max_response_tokens}",
    )
    fields = zip(encoded, texts, answers, rows, strict=True)
    return [Prompt(index, ids, text, answer, row) for index, (ids, text, answer, (_, row)) in enumerate(fields)]


def place_of(path: Path, setting: str, index: int) -> str:
    """File and line of a problem of `load_prompts`. Reads the file again."""
    return _rows(path, setting)[index][0]


def load_solutions(config: Config, tokenizer) -> list[TrainingSequence]:
    """The rows of `sft.data`: prompts with their written solutions, end tokens included.

    Raises UsageError as `load_prompts` does.
    """
    from megatron_dgpo.micro_batch import TrainingSequence

    if config.sft.data is None:
        raise UsageError("sft.data is missing: give a JSONL or Parquet file with prompts and solutions")
    rows = _rows(config.sft.data, "sft.data")
    _, prompts = _encode_prompts(config, tokenizer, rows)
    responses = [_field(row, config.sft.response_field, "sft.response_field", place) for place, row in rows]
    # Prompt and response are tokenised apart, because that is what sampling does.
    encoded = tokenizer(responses, add_special_tokens=False).input_ids
    solutions = [
        TrainingSequence.of(prompt_ids, [*response_ids, tokenizer.eos_token_id])
        for prompt_ids, response_ids in zip(prompts, encoded, strict=True)
    ]
    longest = config.rollout.context_tokens
    _check_lengths(
        rows,
        [len(solution) for solution in solutions],
        longest,
        f"prompt and solution of {{length}} tokens, but rollout.context_tokens={longest}",
    )
    return solutions


class PromptOrder:
    """Which rows are used when: a pure function of the seed and of how many were used before."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epochs: dict[int, list[int]] = {}

    def take(self, start: int, count: int) -> list[int]:
        """Row numbers at `start` to `start + count` of the endless order."""
        return [self.row(place) for place in range(start, start + count)]

    def row(self, place: int) -> int:
        """Row number at this place of the endless order."""
        epoch, offset = divmod(place, self._size)
        if not self._shuffle:
            return offset
        if epoch not in self._epochs:
            # The order of an epoch that is over is not needed again.
            self._epochs = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = sorted(range(self._size), key=lambda row: self._rank(epoch, row))
        return self._epochs[epoch][offset]

    def _rank(self, epoch: int, row: int) -> bytes:
        # A hash, not a random generator, whose sequence another version of its library may change.
        return blake2b(f"{self._seed}/{epoch}/{row}".encode(), digest_size=8).digest()


def _encode_prompts(config: Config, tokenizer, rows: list[tuple[str, dict]]) -> tuple[list[str], list[list[int]]]:
    """The problems as they stand in the data, and the token ids of each in its template."""
    problems = [_field(row, config.data.prompt_field, "data.prompt_field", place) for place, row in rows]
    template = config.data.template
    if "{prompt}" not in template:
        raise UsageError(f"data.template={shown(template)} has no {{prompt}}: every problem would be the same text")
    # Not str.format: templates and problems hold LaTeX braces.
    texts = [template.replace("{prompt}", problem) for problem in problems]
    if config.data.chat:
        if not tokenizer.chat_template:
            raise UsageError(f"data.chat=true, but the tokenizer of {config.model.path} has no chat template")
        conversations = [[{"role": "user", "content": text}] for text in texts]
        try:
            texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            # The template is a program of the model's.
            raise UsageError(
                f"data.chat=true: the chat template of {config.model.path} refuses a user message alone: "
                f"{_first_line(error)}"
            ) from None
    # A chat template writes the special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not config.data.chat).input_ids
    for (place, _), token_ids in zip(rows, encoded, strict=True):
        if not token_ids:
            raise UsageError(f"{place}: field '{config.data.prompt_field}' (data.prompt_field) is empty")
    return problems, encoded


def _check_lengths(rows: list[tuple[str, dict]], lengths: list[int], longest: int, problem: str) -> None:
    long = [(place, length) for (place, _), length in zip(rows, lengths, strict=True) if length > longest]
    if long:
        place, length = long[0]
        others = f" ({len(long)} rows are too long, up to {max(n for _, n in long)} tokens)" if len(long) > 1 else ""
        raise UsageError(
            f"{place}: {problem.format(length=length)}{others}; raise rollout.context_tokens or take such rows out"
        )


def _field(row: dict, name: str, setting: str, place: str) -> str:
    if name not in row:
        fields = [str(field)[:100] for field in itertools.islice(row, _HINTED_FIELDS)]
        near = difflib.get_close_matches(name[:100], fields, n=1)
        hint = f"; did you mean {setting}={near[0]}?" if near else f"; it has {', '.join(fields) or 'none'}"
        raise UsageError(f"{place}: no field {shown(name)} ({setting}){hint}")
    value = row[name]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UsageError(
            f"{place}: field {shown(name)} ({setting}) holds {type(value).__name__}, expected text or a number"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{place}: field {shown(name)} ({setting}) holds {value}, expected text or a finite number")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can write half of a pair, \ud83d alone; no tokenizer takes it.
        raise UsageError(
            f"{place}: field {shown(name)} ({setting}) holds half a character, {text[error.start]!r} at character "
            f"{error.start + 1}"
        ) from None
    return text


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def check_file(path: Path, setting: str) -> None:
    """Raises UsageError where there is no such file, and names one that may have been meant."""
    try:
        if path.is_dir():
            raise UsageError(f"{setting}={path} is a folder{_nearest(path)}")
        path.stat()
    except FileNotFoundError:
        raise UsageError(f"{setting}={path} does not exist{_nearest(path)}") from None
    except OSError as error:
        raise UsageError(f"{setting}={path} cannot be read: {error.strerror or error}") from None


def _rows(path: Path, setting: str) -> list[tuple[str, dict]]:
    """(file:line, row) of every row."""
    check_file(path, setting)
    try:
        rows = _parquet_rows(path, setting) if path.suffix == ".parquet" else _jsonl_rows(path)
    except OSError as error:
        raise UsageError(f"{setting}={path} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UsageError(f"{setting}={path} holds no rows")
    for place, row in rows:
        if _is_deep(row):
            raise UsageError(f"{place}: nested more than {_MOST_LEVELS} levels deep")
    return rows


def _is_deep(row: dict) -> bool:
    level: list = [row]
    for _ in range(_MOST_LEVELS):
        children = (child for value in level for child in (value.values() if isinstance(value, dict) else value))
        level = [child for child in children if isinstance(child, dict | list | tuple)]
        if not level:
            return False
    return True


def _nearest(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"; nor does its folder {folder}"
    with os.scandir(folder) as entries:
        files = [entry.name for entry in itertools.islice(entries, _HINTED_FILES) if entry.is_file()]
    near = difflib.get_close_matches(path.name, files, n=3, cutoff=0.5)
    near = near or sorted(name for name in files if name.endswith((".jsonl", ".parquet")))[:3]
    return f"; did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""


def _parquet_rows(path: Path, setting: str) -> list[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UsageError(f"{setting}={path} is not a readable Parquet file: {_first_line(error)}") from None
    return [(f"{path}: row {number}", row) for number, row in enumerate(rows, 1)]


def _jsonl_rows(path: Path) -> list[tuple[str, dict]]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(f"{path}:{n}", _object(line, f"{path}:{n}")) for n, line in enumerate(lines, 1) if line.strip()]


def _object(line: bytes, place: str) -> dict:
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise UsageError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except RecursionError:
        raise UsageError(f"{place}: nested more than {_MOST_LEVELS} levels deep") from None
    except ValueError:
        # Python's limit, against the quadratic time that reading one takes.
        raise UsageError(f"{place}: holds an integer of more than {sys.get_int_max_str_digits():,} digits") from None
    if not isinstance(row, dict):
        raise UsageError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row
