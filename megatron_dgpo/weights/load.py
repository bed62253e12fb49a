"""Hugging Face safetensors, or a Megatron checkpoint, into Megatron shards; each rank reads only what it needs."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_dgpo.errors import UsageError
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.distributed import DistributedCheckpoint, is_distributed
from megatron_dgpo.weights.slices import shard_slices

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def named_shards(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global Megatron name, parameter) of every parameter on this rank.

    Layers are numbered over the whole model, and experts over their layer.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            found = re.match(r"decoder\.layers\.(\d+)\.(.+)", name)
            if found:
                layer = chunk.decoder.layers[int(found[1])]
                name = f"decoder.layers.{layer.layer_number - 1}.{_expert_name(layer, found[2])}"
            yield name, parameter


def _expert_name(layer: torch.nn.Module, name: str) -> str:
    """SequentialMLP's `local_experts.1.linear_fc1.weight` and TEGroupedMLP's `linear_fc1.weight1`, made one."""
    sequential = re.fullmatch(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>\w+)\.weight", name)
    found = sequential or re.fullmatch(r"mlp\.experts\.(?P<linear>\w+)\.weight(?P<expert>\d+)", name)
    if not found:
        return name
    expert = layer.mlp.local_expert_indices[int(found["expert"])]
    return f"mlp.experts.experts.{expert}.{found['linear']}.weight"


def source_name(architecture: Architecture, name: str) -> str:
    """A tied head on its own pipeline stage holds a copy of the embedding."""
    tied = architecture.tied_embeddings and name == "output_layer.weight"
    return "embedding.word_embeddings.weight" if tied else name


@torch.no_grad()
def load_weights(
    chunks: list[torch.nn.Module], architecture: Architecture, model_dir: Path, tp_rank: int, tp_size: int
) -> None:
    """Fill this rank's parameters, cast to their dtype; vocabulary padding becomes 0. Collectives: none."""
    if is_distributed(model_dir):
        _load_distributed(chunks, architecture, model_dir, tp_rank, tp_size)
        return
    locations = tensor_files(model_dir)
    with contextlib.ExitStack() as stack:
        files: dict[str, safe_open] = {}
        for name, parameter in named_shards(chunks):
            parameter.zero_()
            for part in shard_slices(architecture, source_name(architecture, name), tp_rank, tp_size):
                file = locations[part.name]
                if file not in files:
                    files[file] = stack.enter_context(safe_open(model_dir / file, framework="pt"))
                rows = slice(part.start, part.start + part.length)
                tensor = files[file].get_slice(part.name)
                part.of_shard(parameter).copy_(tensor[rows] if part.dim == 0 else tensor[:, rows])


def _load_distributed(chunks, architecture: Architecture, model_dir: Path, tp_rank: int, tp_size: int) -> None:
    checkpoint = DistributedCheckpoint(model_dir, architecture)
    for name, parameter in named_shards(chunks):
        parameter.zero_()
        name = source_name(architecture, name)
        full = dict(checkpoint.tensors(name))
        for part in shard_slices(architecture, name, tp_rank, tp_size):
            part.of_shard(parameter).copy_(part.of_full(full[part.name]))


def tensor_files(model_dir: Path) -> dict[str, str]:
    """{tensor name: file name} of a Hugging Face directory, one safetensors file or several with an index.

    Raises UsageError when there is neither.
    """
    index = model_dir / INDEX
    if index.is_file():
        try:
            return json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise UsageError(f"{index} is not a safetensors index: {error!r}") from None
    if not (model_dir / SINGLE).is_file():
        pickled = sorted(path.name for path in model_dir.glob("pytorch_model*.bin"))
        hint = f" ({pickled[0]} is a pickle: convert it to safetensors)" if pickled else ""
        raise UsageError(f"{model_dir} has neither {SINGLE} nor {INDEX}{hint}")
    with opened(model_dir / SINGLE) as file:
        return dict.fromkeys(file.keys(), SINGLE)


def check_weights(architecture: Architecture, model_dir: Path) -> None:
    """Raise UsageError naming the first tensor or file that is missing, cut short or misshapen; reads headers only."""
    if is_distributed(model_dir):
        DistributedCheckpoint(model_dir, architecture)
        return
    locations = tensor_files(model_dir)
    missing = [name for name in architecture.hf_shapes if name not in locations]
    if missing:
        raise UsageError(
            f"{model_dir}: tensor {missing[0]} is missing ({len(missing)} in all): the model is incomplete"
        )
    by_file: dict[str, list[str]] = {}
    for name in architecture.hf_shapes:
        by_file.setdefault(locations[name], []).append(name)
    for file_name, names in by_file.items():
        with opened(model_dir / file_name) as file:
            held = set(file.keys())
            for name in names:
                shape = tuple(file.get_slice(name).get_shape()) if name in held else None
                if shape != architecture.hf_shapes[name]:
                    found = "is not in it" if shape is None else f"has shape {list(shape)}"
                    expected = list(architecture.hf_shapes[name])
                    raise UsageError(f"{model_dir / file_name}: tensor {name} {found}, expected shape {expected}")


@contextlib.contextmanager
def opened(path: Path):
    if not path.is_file():
        raise UsageError(f"{path} is missing: the model is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged or cut short: {error}") from None
