"""What a checkpoint says of itself; readable without loading torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from megatron_dgpo.errors import UsageError
from megatron_dgpo.json_file import Content, checked, read_object
from megatron_dgpo.weights.architectures import Architecture

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands. `step` training steps are done, `prompts` were taken from the data, and the policy's
    weights are version `weight_version`."""

    step: int = 0
    prompts: int = 0
    weight_version: int = 0


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step_????????"), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint with a readable manifest and files of the right size; checksums are not read."""
    for candidate in candidates(folder):
        manifest = read_manifest(candidate)
        if manifest and not wrong_sizes(candidate, manifest):
            return candidate
    return None


def read_manifest(path: Path) -> dict | None:
    """None where it is missing, was cut short or holds something else."""
    try:
        content = read_object(path / MANIFEST)
        progress = checked(path / MANIFEST, content, _Manifest).progress
    except UsageError:
        return None
    return content | {"progress": dataclasses.asdict(Progress(**progress))}


class _Manifest(Content):
    """What every manifest has; newer ones have more."""

    progress: dict[Literal["step", "prompts", "weight_version"], NonNegativeInt]
    architecture: dict
    files: dict[str, Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]
    """{name: [bytes, CRC-32]}"""
    layout: dict[str, int] = {}
    origins: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]] = {}


def wrong_sizes(path: Path, manifest: dict) -> list[str]:
    """Files that are missing or of another size than when they were written."""
    return [
        name
        for name, (size, _) in manifest["files"].items()
        if not (path / name).is_file() or (path / name).stat().st_size != size
    ]


def check_architecture(path: Path, manifest: dict, architecture: Architecture) -> None:
    """Raise UsageError naming what differs when the checkpoint at `path` is of another model."""
    ours = json.loads(json.dumps(dataclasses.asdict(architecture)))
    theirs = manifest["architecture"]
    different = [
        f"{name} is {theirs.get(name)} there and {ours.get(name)} in model.path"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        raise UsageError(
            f"{path} is a checkpoint of another model: {'; '.join(different)}. "
            "Choose another run.dir, or the model.path that this run was started with"
        )
