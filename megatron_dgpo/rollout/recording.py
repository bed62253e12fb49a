"""Responses in files: what a run keeps of them, and what another run trains on instead of sampling."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from megatron_dgpo.errors import UsageError
from megatron_dgpo.rollout.response import Prompt, Response


def file_of_step(folder: Path, step: int, replica: int) -> Path:
    """Where the responses of one data-parallel replica are kept."""
    return folder / f"step_{step:08d}.{replica}.jsonl"


def write_responses(file: Path, responses: list[Response]) -> None:
    """One JSON object a line; log-probs survive exactly."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        for response in responses:
            row = {field.name: getattr(response, field.name) for field in dataclasses.fields(response)}
            prompt = {"prompt": response.prompt.index, "question": response.prompt.text}
            stream.write(json.dumps(row | prompt | {"answer": response.prompt.answer}) + "\n")


def recorded_responses(
    folder: Path, step: int, prompts: list[Prompt], places: range, group_size: int
) -> list[Response]:
    """What another run recorded in a step for the prompts at `places`, whatever its data-parallel size was.

    prompts: of all replicas. Raises UsageError where a group is not there.
    """
    recorded: dict[int, list[dict]] = {}
    for file in sorted(folder.glob(f"step_{step:08d}.*.jsonl"), key=lambda file: int(file.name.split(".")[1])):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            recorded.setdefault(row["prompt"], []).append(row)
    found = []
    for place, prompt in enumerate(prompts):
        # A problem met twice in a step (at the turn of an epoch) has two groups, in order, whoever holds them.
        rows = recorded.get(prompt.index, [])
        if len(rows) < group_size:
            raise UsageError(
                f"rollout.replay={folder}: step {step} has {len(rows)} responses to problem {prompt.index}, not "
                f"{group_size}; replay needs the seed, data and rollout settings of the run that recorded"
            )
        recorded[prompt.index] = rows[group_size:]
        if place in places:
            found += [_response(prompt, row) for row in rows[:group_size]]
    return found


def _response(prompt: Prompt, row: dict) -> Response:
    names = {field.name for field in dataclasses.fields(Response)} - {"prompt"}
    return Response(prompt=prompt, **{name: row[name] for name in names})
