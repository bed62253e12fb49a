"""Problems: JSONL or Parquet rows to token ids, in an order that a restart can resume."""

from __future__ import annotations

import difflib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from megatron_dgpo.config import Config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.rollout.sample import Prompt


@dataclass(frozen=True)
class Solution:
    """A prompt with its written solution, end token included."""

    prompt_ids: list[int]
    response_ids: list[int]


def load_prompts(config: Config, path: Path, setting: str, tokenizer) -> list[Prompt]:
    """The problems of a file; `setting` is the one that names it.

    Raises UsageError with file and line for a row that is not an object, lacks a field or is too long, and for a file
    without rows.
    """
    longest = config.rollout.context_tokens - config.rollout.max_response_tokens
    prompts = []
    for index, (place, row) in enumerate(_rows(path, setting)):
        text = _field(row, config.data.prompt_field, "data.prompt_field", place)
        answer = _field(row, config.data.answer_field, "data.answer_field", place)
        token_ids = _prompt_ids(config, tokenizer, text)
        if len(token_ids) > longest:
            raise UsageError(
                f"{place}: the prompt has {len(token_ids)} tokens, but rollout.context_tokens="
                f"{config.rollout.context_tokens} leaves {longest} beside rollout.max_response_tokens="
                f"{config.rollout.max_response_tokens}; raise the former or shorten the prompt"
            )
        prompts.append(Prompt(index, token_ids, text, answer, row))
    return prompts


def load_solutions(config: Config, tokenizer) -> list[Solution]:
    """The rows of `sft.data`. Raises UsageError as `load_prompts` does."""
    if config.sft.data is None:
        raise UsageError("sft.data is missing: give a JSONL or Parquet file with prompts and solutions")
    solutions = []
    for place, row in _rows(config.sft.data, "sft.data"):
        text = _field(row, config.data.prompt_field, "data.prompt_field", place)
        response = _field(row, config.sft.response_field, "sft.response_field", place)
        response_ids = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        solution = Solution(_prompt_ids(config, tokenizer, text), response_ids)
        length = len(solution.prompt_ids) + len(response_ids)
        if length > config.rollout.context_tokens:
            raise UsageError(
                f"{place}: prompt and solution have {length} tokens, more than rollout.context_tokens="
                f"{config.rollout.context_tokens}"
            )
        solutions.append(solution)
    return solutions


class PromptOrder:
    """Which rows are used when: a pure function of the seed and of how many were used before."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epochs: dict[int, list[int]] = {}

    def take(self, start: int, count: int, replica: int = 0, replicas: int = 1) -> list[int]:
        """Row numbers `start` to `start + count` of the endless order; a replica's share of them, in order.

        The shares of all replicas together are the same whatever their number, which must divide `count`.
        """
        share = count // replicas
        first = start + replica * share
        return [self._row(place) for place in range(first, first + share)]

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, self._size)
        if not self._shuffle:
            return offset
        if epoch not in self._epochs:
            order = list(range(self._size))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            # The order of an epoch that is over is not needed again.
            self._epochs = {e: o for e, o in self._epochs.items() if e >= epoch - 1} | {epoch: order}
        return self._epochs[epoch][offset]


def _prompt_ids(config: Config, tokenizer, text: str) -> list[int]:
    text = config.data.template.replace("{prompt}", text)
    if config.data.chat:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return tokenizer(text).input_ids


def _field(row: dict, name: str, setting: str, place: str) -> str:
    if name not in row:
        near = difflib.get_close_matches(name, row, n=1)
        hint = f"; did you mean {setting}={near[0]}?" if near else f"; it has {', '.join(map(str, row))}"
        raise UsageError(f"{place}: no field '{name}' ({setting}){hint}")
    value = row[name]
    if not isinstance(value, str | int | float):
        raise UsageError(f"{place}: field '{name}' holds {type(value).__name__}, expected text")
    return str(value)


def _rows(path: Path, setting: str) -> list[tuple[str, dict]]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UsageError(f"{setting}={path} does not exist{hint}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path).to_pylist()
        except Exception as error:
            raise UsageError(f"{setting}={path} is not a readable Parquet file: {error}") from None
        rows = [(f"{path}: row {number}", row) for number, row in enumerate(table, 1)]
    else:
        rows = [
            (f"{path}:{number}", _object(line, f"{path}:{number}"))
            for number, line in enumerate(path.read_text().split("\n"), 1)
            if line.strip()
        ]
    if not rows:
        raise UsageError(f"{setting}={path} holds no rows")
    return rows


def _object(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row
