"""Problems: JSONL or Parquet rows to token ids, in an order that a restart can resume."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from megatron_dgpo.config import Config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.rollout.sample import Prompt


@dataclass(frozen=True)
class Solution:
    """A prompt with its written solution, end token included."""

    prompt_ids: list[int]
    response_ids: list[int]


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
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{model_dir} has no tokenizer that transformers can load: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {model_dir} has no end token (eos_token): responses could not end")
    return tokenizer


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


def load_solutions(config: Config, tokenizer) -> list[Solution]:
    """The rows of `sft.data`. Raises UsageError as `load_prompts` does."""
    if config.sft.data is None:
        raise UsageError("sft.data is missing: give a JSONL or Parquet file with prompts and solutions")
    rows = _rows(config.sft.data, "sft.data")
    _, prompts = _encode_prompts(config, tokenizer, rows)
    responses = [_field(row, config.sft.response_field, "sft.response_field", place) for place, row in rows]
    # Prompt and response are tokenised apart, because that is what sampling does.
    encoded = tokenizer(responses, add_special_tokens=False).input_ids
    solutions = [
        Solution(prompt_ids, [*response_ids, tokenizer.eos_token_id])
        for prompt_ids, response_ids in zip(prompts, encoded, strict=True)
    ]
    longest = config.rollout.context_tokens
    _check_lengths(
        rows,
        [len(solution.prompt_ids) + len(solution.response_ids) for solution in solutions],
        longest,
        f"prompt and solution of {{length}} tokens, but rollout.context_tokens={longest}",
    )
    return solutions


class PromptOrder:
    """Which rows are used when: a pure function of the seed and of how many were used before."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epochs: dict[int, list[int]] = {}

    def take(self, start: int, count: int, replica: int = 0, replicas: int = 1) -> list[int]:
        """Row numbers at `start` to `start + count` of the endless order; a replica's share of them, in order.

        The shares, joined in replica order, are the same whatever their number, which must divide `count`.
        """
        share, rest = divmod(count, replicas)
        if rest:
            raise ValueError(f"{count} prompts do not split evenly over {replicas} replicas")
        first = start + replica * share
        return [self._row(place) for place in range(first, first + share)]

    def _row(self, place: int) -> int:
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
        raise UsageError(f"data.template={template!r} has no {{prompt}}: every problem would be the same text")
    # Not str.format: templates and problems hold LaTeX braces.
    texts = [template.replace("{prompt}", problem) for problem in problems]
    if config.data.chat:
        if not tokenizer.chat_template:
            raise UsageError(f"data.chat=true, but the tokenizer of {config.model.path} has no chat template")
        conversations = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
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
        near = difflib.get_close_matches(name, row, n=1)
        hint = f"; did you mean {setting}={near[0]}?" if near else f"; it has {', '.join(map(str, row)) or 'none'}"
        raise UsageError(f"{place}: no field '{name}' ({setting}){hint}")
    value = row[name]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UsageError(f"{place}: field '{name}' ({setting}) holds {type(value).__name__}, expected text or a number")
    return str(value)


def _rows(path: Path, setting: str) -> list[tuple[str, dict]]:
    """(file:line, row) of every row."""
    if not path.is_file():
        raise UsageError(f"{setting}={path} {'is a folder' if path.is_dir() else 'does not exist'}{_nearest(path)}")
    rows = _parquet_rows(path, setting) if path.suffix == ".parquet" else _jsonl_rows(path, setting)
    if not rows:
        raise UsageError(f"{setting}={path} holds no rows")
    return rows


def _nearest(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"; nor does its folder {folder}"
    files = [entry.name for entry in folder.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(path.name, files, n=3, cutoff=0.5)
    near = near or sorted(name for name in files if name.endswith((".jsonl", ".parquet")))[:3]
    return f"; did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""


def _parquet_rows(path: Path, setting: str) -> list[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{setting}={path} is not a readable Parquet file: {error}") from None
    return [(f"{path}: row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def _jsonl_rows(path: Path, setting: str) -> list[tuple[str, dict]]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UsageError(f"{setting}={path} cannot be read: {error.strerror}") from None
    return [(f"{path}:{n}", _object(line, f"{path}:{n}")) for n, line in enumerate(lines, 1) if line.strip()]


def _object(line: bytes, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row
