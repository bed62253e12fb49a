"""Finished groups on disk, before the trainer may have them: whatever ends a run, none of them is sampled again."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dgpo.config import Config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.json_file import read_object, replace_text
from megatron_dgpo.rollout.recording import as_row, of_row
from megatron_dgpo.rollout.response import Key, Prompt, Response

_SETTINGS, _STARTS = "settings.json", "starts.json"
_NEVER = 2**31
# Positions of a file, so that those of steps long done can be removed.
_BLOCK = 64

# A third of the bytes of their digits, and a tenth of the time. The servers' log-probs are float32.
_ARRAYS = {"token_ids": "<i4", "logprobs": "<f4"}


class Journal:
    """The groups of one run by their positions in its order of prompts; each replica's leader appends to its own files.

    A line a group, after a checksum: what a kill cut short does not count. A run that is begun again makes the same
    weights as before as long as it trains on what the journal has. From the first step that it samples for, its
    versions are its own, and groups that those of an earlier start made are of other weights.
    """

    def __init__(self, folder: Path, replica: int, start: int = 1) -> None:
        """start: how often the run was begun, this time included (`open_journal`)."""
        self._folder, self._replica, self._start = folder, replica, start
        # Whoever else begins writes of its own start alone.
        self._own_from = _starts(folder)
        self._end = (max(map(_block_of, folder.glob("groups_*.jsonl")), default=-1) + 1) * _BLOCK

    def append(self, position: int, responses: list[Response]) -> None:
        """Returns when they are on disk."""
        rows = [
            as_row(response) | {name: _packed(getattr(response, name), kind) for name, kind in _ARRAYS.items()}
            for response in responses
        ]
        text = json.dumps({"position": position, "start": self._start, "responses": rows})
        # After a line that was cut short this begins another; else it leaves an empty one.
        line = f"\n{zlib.crc32(text.encode()):08x} {text}\n".encode()
        file = self._folder / f"groups_{position // _BLOCK:08d}.{self._replica}.jsonl"
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{file}: a group was written in part only: is the disk full?")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, prompts: Mapping[Key, Prompt], group_size: int) -> dict[Key, list[Response]]:
        """The groups at these positions that earlier starts finished, whichever replica wrote them, the last start's.

        prompts: what the run asks at each position.
        """
        found: dict[Key, tuple[int, list[Response]]] = {}
        wanted = {key for key in prompts if isinstance(key, int) and key < self._end}
        for block in sorted({key // _BLOCK for key in wanted}):
            for file in sorted(self._folder.glob(f"groups_{block:08d}.*.jsonl")):
                for row in filter(None, map(_row, file.read_bytes().split(b"\n"))):
                    position, start = row["position"], row["start"]
                    if position not in wanted or len(row["responses"]) != group_size or start == self._start:
                        continue
                    responses = [
                        of_row(prompts[position], row | {name: _unpacked(row[name], _ARRAYS[name]) for name in _ARRAYS})
                        for row in row["responses"]
                    ]
                    if self._has_its_weights(start, responses) and (
                        position not in found or found[position][0] < start
                    ):
                        found[position] = start, responses
        return {position: responses for position, (_, responses) in found.items()}

    def _has_its_weights(self, start: int, responses: list[Response]) -> bool:
        newest = max(response.newest for response in responses)
        return all(newest < version for later, version in self._own_from.items() if later > start)

    def versions_are_own_from(self, version: int, first: bool) -> None:
        """From now on. first: this process tells those that begin later."""
        self._own_from[self._start] = version
        if first:
            _write(self._folder / _STARTS, {str(start): found for start, found in self._own_from.items()})


def forget(folder: Path, before: int) -> None:
    """Remove the files of positions that no run will ask for again. One process of a run calls it."""
    for file in folder.glob("groups_*.jsonl"):
        if _block_of(file) < before // _BLOCK:
            file.unlink(missing_ok=True)


def _block_of(file: Path) -> int:
    return int(file.name.split("_")[1].split(".")[0])


def open_journal(folder: Path, config: Config, prompts: Sequence[Prompt]) -> tuple[int, list[str]]:
    """Make the folder, for all replicas, and empty it where what is there would not be what this run samples or trains.

    Returns how often the run was begun, and the settings for which it was emptied. One process of a run calls it.
    """
    ours = _settings(config, prompts)
    had = any(folder.glob("groups_*.jsonl"))
    try:
        theirs = read_object(folder / _SETTINGS) if had else ours
        starts = _starts(folder)
    except (UsageError, ValueError):
        theirs, starts = {}, {}
    differ = sorted(name for name in ours.keys() | theirs.keys() if theirs.get(name) != ours.get(name))
    folder.mkdir(parents=True, exist_ok=True)
    if differ:
        for file in folder.glob("groups_*.jsonl"):
            file.unlink()
    _write(folder / _SETTINGS, ours)
    # Of a start that samples for no step nothing is its own.
    start = max(starts, default=0) + 1
    _write(folder / _STARTS, {str(number): version for number, version in (starts | {start: _NEVER}).items()})
    return start, differ


def _starts(folder: Path) -> dict[int, int]:
    """{start: first version whose weights are its own}"""
    found = read_object(folder / _STARTS) if (folder / _STARTS).exists() else {}
    return {int(start): int(version) for start, version in found.items()}


def _write(file: Path, content: dict) -> None:
    replace_text(file, json.dumps(content, indent=1))


def _settings(config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides responses, their rewards, and the weights of later versions, whose responses may be there, too.

    Not the sizes of any layout.
    """
    groups = config.model_dump(mode="json")
    kept: dict[str, tuple[str, ...]] = {
        "run": ("seed",),
        "model": ("path", "reference", "start", "dtype"),
        "optimizer": tuple(groups["optimizer"]),
        "algorithm": tuple(groups["algorithm"]),
        "batch": ("minibatches",),
        "rollout": ("prompts_per_step", "group_size", "temperature", "max_response_tokens", "context_tokens")
        + ("dynamic_sampling", "dynamic_limit"),
        "data": ("shuffle",),
        "reward": ("grader", "weights", "overlong", "overlong_buffer_tokens"),
    }
    if config.optimizer.schedule != "constant":
        kept["run"] = ("seed", "steps")
    settings = {f"{section}.{name}": groups[section][name] for section, names in kept.items() for name in names}
    content = zlib.crc32(json.dumps([[p.token_ids, p.answer, p.row] for p in prompts], default=str).encode())
    return settings | {"data.train": f"{len(prompts)} problems, {content:08x}"}


def _row(line: bytes) -> dict | None:
    checksum, _, text = line.partition(b" ")
    return json.loads(text) if text and f"{zlib.crc32(text):08x}".encode() == checksum else None


def _packed(values: list, kind: str) -> str:
    return base64.b64encode(np.asarray(values, kind).tobytes()).decode()


def _unpacked(text: str, kind: str) -> list:
    return np.frombuffer(base64.b64decode(text), kind).tolist()
