"""Hugging Face safetensors, or a Megatron checkpoint, into Megatron shards; each rank reads only what it needs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from megatron_dgpo.errors import UsageError
from megatron_dgpo.json_file import Content, checked, read_object
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.formats import INDEX, SINGLE, is_distributed
from megatron_dgpo.weights.slices import shard_slices

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COMPARED_NUMBERS = 2**24


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
    from megatron_dgpo.weights.distributed import DistributedCheckpoint

    checkpoint = DistributedCheckpoint(model_dir, architecture)
    for name, parameter in named_shards(chunks):
        parameter.zero_()
        name = source_name(architecture, name)
        full = dict(checkpoint.tensors(name))
        for part in shard_slices(architecture, name, tp_rank, tp_size):
            part.of_shard(parameter).copy_(part.of_full(full[part.name]))


class _Index(Content):
    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\\x00]+\.safetensors$")]]


def tensor_files(model_dir: Path) -> dict[str, str]:
    """{tensor name: file name} of a Hugging Face directory, one safetensors file or several with an index.

    Raises UsageError when there is neither, and for an index that is damaged or names files elsewhere.
    """
    index = model_dir / INDEX
    if index.is_file():
        return checked(index, read_object(index), _Index).weight_map
    if not (model_dir / SINGLE).is_file():
        pickled = sorted(path.name for path in model_dir.glob("pytorch_model*.bin"))
        hint = f" ({pickled[0]} is a pickle: convert it to safetensors)" if pickled else ""
        raise UsageError(f"{model_dir} has neither {SINGLE} nor {INDEX}{hint}")
    with opened(model_dir / SINGLE) as file:
        return dict.fromkeys(file.keys(), SINGLE)


def check_weights(architecture: Architecture, model_dir: Path) -> None:
    """Raise UsageError naming the first tensor or file that is missing, unexpected, misshapen, of a type that is not a
    floating-point one of 16 or 32 bits, or cut short.

    Reads headers only, but for the head of a model with tied embeddings that has one.
    """
    if is_distributed(model_dir):
        # A second of imports, which the checks before a start would pay for every other model.
        from megatron_dgpo.weights.distributed import DistributedCheckpoint

        DistributedCheckpoint(model_dir, architecture)
    else:
        check_tensors(architecture, model_dir)


def check_tensors(architecture: Architecture, model_dir: Path) -> dict[str, torch.dtype]:
    """`check_weights` of a Hugging Face directory; returns the dtypes of its tensors."""
    locations, shapes = tensor_files(model_dir), architecture.hf_shapes
    missing = [name for name in shapes if name not in locations]
    if missing:
        raise UsageError(
            f"{model_dir}: tensor {missing[0]} is missing ({len(missing)} in all): the model is incomplete"
        )
    dtypes = {}
    by_file: dict[str, list[str]] = {}
    for name in shapes:
        by_file.setdefault(locations[name], []).append(name)
    for file_name, names in by_file.items():
        path = model_dir / file_name
        with opened(path) as file:
            held = set(file.keys())
            for name in names:
                header = file.get_slice(name) if name in held else None
                if header is None or tuple(header.get_shape()) != shapes[name]:
                    found = f"has shape {list(header.get_shape())}" if header else "is not in it"
                    raise UsageError(f"{path}: tensor {name} {found}, expected shape {list(shapes[name])}")
                if header.get_dtype() not in _DTYPES:
                    found, allowed = header.get_dtype(), ", ".join(_DTYPES)
                    raise UsageError(f"{path}: tensor {name} is of type {found}, expected one of {allowed}")
                dtypes[name] = _DTYPES[header.get_dtype()]
    _check_others(architecture, model_dir, locations)
    return dtypes


def _check_others(architecture: Architecture, model_dir: Path, locations: dict[str, str]) -> None:
    """Tensors that follow from others may be there: a tied head, and the rotary frequencies that old files keep."""
    tied = _HEAD if architecture.tied_embeddings else None
    extra = [name for name in locations if name not in architecture.hf_shapes and name != tied]
    extra = [name for name in extra if not name.endswith(".rotary_emb.inv_freq")]
    if extra:
        file = model_dir / locations[extra[0]]
        raise UsageError(f"{file}: tensor {extra[0]} is not part of the model ({len(extra)} such in all)")
    if tied in locations and not _equal(model_dir, locations, tied, _EMBEDDING):
        # transformers computes with the stored head, vLLM with the embedding.
        raise UsageError(
            f"{model_dir / locations[tied]}: tie_word_embeddings=true, but tensor {tied} is another than {_EMBEDDING}; "
            f"set tie_word_embeddings to false in config.json, or take {tied} out"
        )


def _equal(model_dir: Path, locations: dict[str, str], first: str, second: str) -> bool:
    """Whether two tensors hold the same numbers; reads some rows of them at a time."""
    with opened(model_dir / locations[first]) as one, opened(model_dir / locations[second]) as other:
        if first not in one.keys() or second not in other.keys():
            return False
        left, right = one.get_slice(first), other.get_slice(second)
        if left.get_shape() != right.get_shape() or left.get_dtype() != right.get_dtype():
            return False
        rows, columns = left.get_shape()
        step = max(1, _COMPARED_NUMBERS // columns)
        return all(torch.equal(left[row : row + step], right[row : row + step]) for row in range(0, rows, step))


@contextlib.contextmanager
def opened(path: Path):
    if not path.is_file():
        raise UsageError(f"{path} is missing: the model is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged or cut short: {error}") from None
