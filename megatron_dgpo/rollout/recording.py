"""Responses in files: what a run keeps of its steps to be looked at, and what another trains on instead of sampling."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path

from megatron_dgpo.errors import UsageError
from megatron_dgpo.rewards.grade import weighted_sum
from megatron_dgpo.rollout.response import Prompt, Response

_FIELDS = [field.name for field in dataclasses.fields(Response) if field.name not in ("prompt", "components")]


def file_of_step(folder: Path, step: int, replica: int) -> Path:
    """Where the responses of one data-parallel replica are kept."""
    return folder / f"step_{step:08d}.{replica}.jsonl"


def remove_beyond(folder: Path, step: int, replicas: int) -> None:
    """What more replicas than these have recorded of the step, responses and credit."""
    for file in folder.glob(f"step_{step:08d}.*.*"):
        if int(file.name.split(".")[1]) >= replicas:
            file.unlink()


def as_row(response: Response) -> dict:
    """All of it but its prompt, as JSON holds it; log-probs survive exactly."""
    several = {"components": response.components} if response.components else {}
    return {name: getattr(response, name) for name in _FIELDS} | several


def of_row(prompt: Prompt, row: dict) -> Response:
    values = {name: row[name] for name in _FIELDS}
    return Response(prompt=prompt, **values, components=row.get("components", {}))


def write_responses(file: Path, responses: list[Response], positions: Iterable[int] | None = None) -> None:
    """One JSON object a line. positions: of each response's group in the run's order of prompts, if it has one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    places: Iterable[dict] = ({"position": position} for position in positions) if positions else repeat({})
    with file.open("w") as stream:
        for response, place in zip(responses, places, strict=False):
            prompt = response.prompt
            row = {"prompt": prompt.index, "question": prompt.text, "answer": prompt.answer}
            stream.write(json.dumps(place | as_row(response) | row) + "\n")


def recorded_groups(
    folder: Path, step: int, prompt_at: Callable[[int], Prompt], group_size: int, expected: range | None
) -> dict[int, list[Response]]:
    """What another run recorded of a step, by position, whatever its data-parallel size was.

    prompt_at: of each position. expected: the positions, where they are known before. Raises UsageError where it
    recorded something else.
    """
    recorded: dict[int, list[dict]] = {}
    for file in folder.glob(f"step_{step:08d}.*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            recorded.setdefault(row["position"], []).append(row)
    advice = "replay needs the seed, data and rollout settings of the run that recorded"
    if expected and recorded.keys() != set(expected) or not recorded:
        found = f"prompts {min(recorded)} to {max(recorded)} of the run's order" if recorded else "no responses"
        wanted = f", not {expected.start} to {expected.stop - 1}" if expected else ""
        raise UsageError(f"rollout.replay={folder}: step {step} has {found}{wanted}; {advice}")
    groups = {}
    for position, rows in sorted(recorded.items()):
        prompt = prompt_at(position)
        if {row["prompt"] for row in rows} != {prompt.index} or len(rows) != group_size:
            raise UsageError(
                f"rollout.replay={folder}: step {step} has {len(rows)} responses to problem {rows[0]['prompt']}, not "
                f"{group_size} to problem {prompt.index}; {advice}"
            )
        groups[position] = [of_row(prompt, row) for row in rows]
    return groups


def weighed_anew(response: Response, weights: dict[str, float]) -> Response:
    """With the sum by these weights for its reward, where it has several. Raises UsageError where their names are
    others."""
    names = response.components
    if names.keys() != weights.keys():
        has = f"has the rewards {', '.join(names)}" if names else "has one reward without a name"
        asked = f"reward.weights names {', '.join(weights) or 'none'}"
        advice = "give these a weight each" if names else "set it to null"
        raise UsageError(f"rollout.replay: a recorded response {has}, and {asked}; {advice}")
    if not weights:
        return response
    components = {name: names[name] for name in weights}
    return dataclasses.replace(response, reward=weighted_sum(components, weights), components=components)
