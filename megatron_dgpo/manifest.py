"""What a checkpoint says of itself; readable without loading torch."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from megatron_dgpo.config import Config
from megatron_dgpo.config_file import plain_settings
from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.json_file import Content, checked, read_object
from megatron_dgpo.weights.architectures import Architecture

MANIFEST = "manifest.json"

# What a fingerprint reads: the start of each file, where safetensors keeps names, types and shapes, and as many pieces
# of the rest, evenly spread over all files. Weights that were trained further differ nearly everywhere; those of which
# one projection was (2 % of the bytes) escape 1,024 pieces once in 10^9 times.
_HEAD_BYTES = 64 * 1024
_PIECES, _PIECE_BYTES = 1024, 4096
_MOST_DIFFERENCES = 4  # that an error names: of another family nearly everything differs
_READ_BYTES = 8 * 2**20

Origins = dict[str, list[str]]
"""{setting: [its value]} of all that a run was started with. Of what must not change on its way a second text says what
has to stay: the value again, or of weights and data their fingerprint, whatever the path."""

# The prompts and their order, and so what a position of that order is: seeds and the journal go by it. And which
# optimizer of Megatron's it is, whose states have nothing in common.
_FIXED = (
    *("run.seed", "data.prompt_field", "data.template", "data.chat", "data.shuffle"),
    *("model.dtype", "parallel.distributed_optimizer"),
)
_FIXED_TOO = {
    "train": ("rollout.prompts_per_step", "rollout.group_size"),
    "sft": ("sft.response_field", "sft.batch_size"),
}
_FILES = {
    "model.path": "weights than {}, the starting policy",
    "model.reference": "weights than {}, the frozen reference",
    "model.start": "weights than {}, where the student started",
    "data.train": "rows than {}, the problems",
    "sft.data": "rows than {}, the solutions",
}


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands. `step` training steps are done, `prompts` were taken from the data, and the policy's
    weights are version `weight_version`."""

    step: int = 0
    prompts: int = 0
    weight_version: int = 0


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where that of a step is kept."""
    return folder / f"step_{step:08d}"


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob(f"step_{'[0-9]' * 8}"), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint with a readable manifest and files of the right size; checksums are not read."""
    for candidate in candidates(folder):
        manifest = read_manifest(candidate)
        if manifest and not wrong_sizes(candidate, manifest):
            return candidate
    return None


def step_of(candidate: Path) -> int:
    return int(candidate.name.removeprefix("step_"))


def oldest_progress(folder: Path, keep: int) -> Progress | None:
    """Of the newest `keep` checkpoints in a folder, with a readable manifest."""
    manifests = filter(None, map(read_manifest, reversed(candidates(folder)[:keep])))
    return next((Progress(**manifest["progress"]) for manifest in manifests), None)


def write_manifest(path: Path, content: dict) -> None:
    (path / MANIFEST).write_text(json.dumps(content | {"checksum": _checksum(content)}, indent=1))


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_manifest(path: Path) -> dict | None:
    """None where it is missing, was cut short or changed, or holds something else."""
    try:
        content = read_object(path / MANIFEST)
        if content.pop("checksum", None) not in (None, _checksum(content)):
            return None
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
    layout: dict[str, int | bool] = {}
    """Fields of Layout."""
    origins: dict[str, Annotated[list[str], Field(min_length=1, max_length=2)]] = {}


def total_bytes(manifest: dict | None) -> int:
    """Of the checkpoint's files; 0 where there is no manifest."""
    return sum(size for size, _ in manifest["files"].values()) if manifest else 0


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
        f"{shown(name, plain=True)} is {shown(theirs.get(name))} there and {shown(ours.get(name))} in model.path"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        more = f"; and {len(different) - _MOST_DIFFERENCES} more" if len(different) > _MOST_DIFFERENCES else ""
        raise UsageError(
            f"{path} is a checkpoint of another model: {'; '.join(different[:_MOST_DIFFERENCES])}{more}. "
            "Choose another run.dir, or the model.path that this run was started with"
        )


def fingerprint(folder: Path) -> str:
    """Of the weights in a model directory of either format: names and sizes of its files and a sample of their bytes.

    Reads 4 MiB and the files' headers, whatever the model's size.
    """
    files = sorted(file for pattern in ("*.safetensors", "*.distcp") for file in folder.glob(pattern))
    apart = max(1, sum(file.stat().st_size for file in files) // _PIECES)
    value = 0
    for file in files:
        size = file.stat().st_size
        value = zlib.crc32(f"{file.name} {size}".encode(), value)
        with file.open("rb") as stream:
            value = zlib.crc32(stream.read(_HEAD_BYTES), value)
            for place in range(apart // 2, size, apart):
                stream.seek(place)
                value = zlib.crc32(stream.read(_PIECE_BYTES), value)
    return f"{value:08x}"


def crc32_of(file: Path) -> int:
    """Of all its bytes, in pieces that any memory holds."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def origins(config: Config, command: str) -> Origins:
    """command: "train" or "sft", which has no reference. Reads all of the training data."""
    found = {"command": [command, command]}
    for section, values in plain_settings(config).items():
        for name, value in values.items():
            setting, text = f"{section}.{name}", value if isinstance(value, str) else json.dumps(value)
            found[setting] = [text, text] if setting in (*_FIXED, *_FIXED_TOO[command]) else [text]
    model, data = config.model, config.sft.data if command == "sft" else config.data.train
    weights = {"model.path": model.path}
    if command == "train" and config.needs_reference:
        weights["model.reference"] = model.reference or model.path
    if command == "train" and config.needs_start:
        weights["model.start"] = model.start or model.path
    fingerprints = {path: fingerprint(path) for path in set(weights.values())}
    found |= {setting: [str(path.absolute()), fingerprints[path]] for setting, path in weights.items()}
    if data:
        found["sft.data" if command == "sft" else "data.train"].append(f"{crc32_of(data):08x}")
    return found


def check_origins(path: Path, manifest: dict, ours: Origins) -> None:
    """Raise UsageError when the run of the checkpoint at `path` has other weights, data or order of prompts."""
    for setting, (began_with, *expected) in manifest.get("origins", {}).items():
        given, *found = ours.get(setting, [began_with])
        if not (expected and found) or expected == found:
            continue
        given, began_with = shown(given, plain=True), shown(began_with, plain=True)
        if setting in _FILES:
            problem = f"{setting}={given} holds other {_FILES[setting].format(began_with)} of the run that {path}"
        else:
            problem = f"{setting}={given}, but it is {began_with} in the run that {path}"
        raise UsageError(f"{problem} belongs to. Choose another run.dir, or {setting}={began_with} as it was")


def changes(manifest: dict, ours: Origins) -> list[str]:
    """`optimizer.lr 1e-06 → 2e-06` and the like: where a run is given other settings than when it was saved."""
    theirs = {setting: text for setting, (text, *_) in manifest.get("origins", {}).items()}
    return [
        f"{setting} {shown(theirs[setting], plain=True)} → {shown(text, plain=True)}"
        for setting, (text, *_) in ours.items()
        if theirs.get(setting, text) != text
    ]


def check_steps(path: Path, manifest: dict, config: Config, command: str) -> None:
    """Raise UsageError when the checkpoint at `path` is past the end that `command` ("train" or "sft") is given."""
    setting, steps = ("sft.steps", config.sft.steps) if command == "sft" else ("run.steps", config.run.steps)
    done = manifest["progress"]["step"]
    if done > steps:
        raise UsageError(
            f"{setting}={steps}, but this run has done {done} steps ({path}). Choose another run.dir to start anew, "
            f"{setting} above {done} to go on, or {setting}={done} to export what there is"
        )
