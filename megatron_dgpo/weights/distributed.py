"""Megatron's distributed checkpoints, one parameter at a time and without process groups.

The format is PyTorch's `torch.distributed.checkpoint`, and its own reader and writer are used: `.metadata` says where
each block of each global tensor lies in the `.distcp` files, so that any layout reads what any other wrote. Megatron
stacks a parameter of all layers: `decoder.layers.mlp.linear_fc2.weight` is [layers, H, F].

Nothing in it is run: `.metadata` is read by `dcp_metadata`, weights with PyTorch's `weights_only`.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.dcp_metadata import read_metadata
from megatron_dgpo.weights.formats import METADATA
from megatron_dgpo.weights.slices import shard_slices

_FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


def full_shape(architecture: Architecture, name: str) -> tuple[int, ...]:
    """Of a Megatron parameter on a single rank, vocabulary not padded."""
    parts = shard_slices(architecture, name, 0, 1)
    shape = list(architecture.hf_shapes[parts[0].name])
    shape[parts[0].dim] = sum(part.length for part in parts)
    return tuple(shape)


def stacked(name: str) -> tuple[str, tuple[int, ...]]:
    """(key, place in its leading axes): the numbers of a parameter's name become axes of one tensor."""
    return re.sub(r"\.\d+(?=\.)", "", name), tuple(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name))


def _stack_sizes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{key: sizes of its leading axes}."""
    places: dict[str, list[tuple[int, ...]]] = {}
    for key, place in map(stacked, architecture.parameters):
        places.setdefault(key, []).append(place)
    return {key: tuple(max(axis) + 1 for axis in zip(*found, strict=True)) for key, found in places.items()}


def check_dtype(place: Path, name: str, dtype: torch.dtype) -> None:
    if dtype not in _FLOAT_TYPES:
        allowed = ", ".join(map(dtype_name, _FLOAT_TYPES))
        raise UsageError(f"{place}: tensor {name} is of type {dtype_name(dtype)}, expected one of {allowed}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class DistributedCheckpoint:
    """The weights in a checkpoint; whatever else it holds (optimizer, RNG) is left alone."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        """Raises UsageError naming the first tensor or file that is missing, unexpected, misshapen or cut short."""
        self.path, self._architecture = path, architecture
        self._reader = FileSystemReader(path)
        self._metadata = read_metadata(path / METADATA)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check_files()
        self.dtypes = self._check_tensors()

    def tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the Hugging Face tensors that Megatron parameter `name` consists of."""
        parameter = self._read(name)
        parts = shard_slices(self._architecture, name, 0, 1)
        for source, group in itertools.groupby(sorted(parts, key=lambda part: part.name), lambda part: part.name):
            blocks = [part.of_shard(parameter) for part in group]
            yield source, blocks[0] if len(blocks) == 1 else torch.cat(blocks, parts[0].dim)

    def _read(self, name: str) -> torch.Tensor:
        key, place = self._locate(name)
        entry, shape = self._metadata.state_dict_metadata[key], full_shape(self._architecture, name)
        tensor = torch.empty(*(1 for _ in place), *shape, dtype=entry.properties.dtype)
        block = ChunkStorageMetadata(torch.Size([*place, *(0 for _ in shape)]), tensor.size())
        items = create_read_items_for_chunk_list(key, entry, [block])
        if sum(math.prod(item.lengths) for item in items) != tensor.numel():
            raise UsageError(f"{self.path}: tensor {key} is incomplete at {list(place)}: blocks of it are missing")
        try:
            self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        except Exception as error:
            # A damaged file: unpickling raises whatever it stumbles over.
            places = (self._metadata.storage_data.get(item.storage_index) for item in items)
            files = ", ".join(sorted({place.relative_path if place else "no file" for place in places}))
            reason = f"{type(error).__name__}: {shown(' '.join(str(error).split()), plain=True)}"
            raise UsageError(f"{self.path}: tensor {key} in {files} is damaged: {reason}") from None
        return tensor.view(shape)

    def _locate(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Layers that differ from one another are not stacked by Megatron, and keep their names."""
        return (name, ()) if name in self._metadata.state_dict_metadata else stacked(name)

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for block in self._metadata.storage_data.values():
            ends[block.relative_path] = max(ends.get(block.relative_path, 0), block.offset + block.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise UsageError(f"{file} is missing: the checkpoint is incomplete")
            if file.stat().st_size < end:
                raise UsageError(f"{file} is cut short: it has {file.stat().st_size} bytes, expected {end}")

    def _check_tensors(self) -> dict[str, torch.dtype]:
        """{key: dtype} of the weights."""
        entries = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        stacks, dtypes = _stack_sizes(self._architecture), {}
        for name, (split, *_) in self._architecture.parameters.items():
            key, place = self._locate(name)
            if key not in entries:
                raise UsageError(f"{self.path}: tensor {key} is missing: the checkpoint is incomplete")
            found, expected = tuple(entries[key].size), full_shape(self._architecture, name)
            if place:
                expected = (*stacks[key], *expected)
            # Whoever wrote it padded the vocabulary to its own layout.
            same = found[1:] == expected[1:] and found[0] >= expected[0] if split == "vocab" else found == expected
            if not same:
                raise UsageError(f"{self.path}: tensor {key} has shape {list(found)}, expected shape {list(expected)}")
            dtypes[key] = entries[key].properties.dtype
            check_dtype(self.path, key, dtypes[key])
        extra = [key for key in entries if key.startswith(_MODEL_PREFIXES) and key not in dtypes]
        if extra:
            raise UsageError(f"{self.path}: tensor {extra[0]} is not part of the model ({len(extra)} such in all)")
        return dtypes


class _Into(DefaultLoadPlanner):
    """Reads blocks into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class DistributedWriter:
    """A checkpoint written file by file, in any order and by any process; each file plays the part of a rank.

    A file is complete once PyTorch's table of contents for it lies beside it; `finish` makes one of them all.
    """

    def __init__(self, folder: Path, architecture: Architecture, files: list[list[str]], dtype: torch.dtype) -> None:
        """files: the Megatron parameters that go into each."""
        self._folder, self._architecture = folder, architecture
        stacks = _stack_sizes(architecture)
        self._names: dict[MetadataIndex, str] = {}
        plans = []
        for names in files:
            items = []
            for name in names:
                (key, place), shape = stacked(name), full_shape(architecture, name)
                offsets = torch.Size([*place, *(0 for _ in shape)])
                block = ChunkStorageMetadata(offsets, torch.Size([*(1 for _ in place), *shape]))
                data = TensorWriteData(block, TensorProperties(dtype), torch.Size([*stacks[key], *shape]))
                items.append(WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data))
                self._names[items[-1].index] = name
            plans.append(SavePlan(items))
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = FileSystemWriter(folder).prepare_global_plan(plans)

    def is_done(self, number: int) -> bool:
        return (self._folder / _contents(number)).is_file()

    def write(self, number: int, tensors: Callable[[str], Iterator[tuple[str, torch.Tensor]]]) -> None:
        """Write file `number` from the Hugging Face tensors of each of its parameters, and flush it to disk."""
        writer = FileSystemWriter(self._folder, thread_count=1)
        writer.set_up_storage_writer(is_coordinator=True, rank=number, use_collectives=False)
        results = writer.write_data(self._plans[number], _From(lambda index: self._assemble(index, tensors))).value()
        writer.finish(Metadata({}), [results])

    def finish(self) -> None:
        storage: dict[MetadataIndex, object] = {}
        for number in range(len(self._plans)):
            storage |= read_metadata(self._folder / _contents(number)).storage_data
        self._metadata.storage_data = storage
        with (self._folder / METADATA).open("wb") as file:
            pickle.dump(self._metadata, file)
        for number in range(len(self._plans)):
            (self._folder / _contents(number)).unlink()
        # What Megatron itself looks for: the format's name, and the state that is not a tensor: none.
        names = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(names | versions))
        torch.save({}, self._folder / "common.pt")

    def _assemble(self, index: MetadataIndex, tensors: Callable) -> torch.Tensor:
        name = self._names[index]
        entry = self._metadata.state_dict_metadata[index.fqn]
        parameter = torch.empty(full_shape(self._architecture, name), dtype=entry.properties.dtype)
        parts = shard_slices(self._architecture, name, 0, 1)
        for source, tensor in tensors(name):
            for part in parts:
                if part.name == source:
                    part.of_shard(parameter).copy_(part.of_full(tensor))
        return parameter.view(*(1 for _ in stacked(name)[1]), *parameter.shape)


class _From(DefaultSavePlanner):
    """Makes each block only when its turn to be written comes."""

    def __init__(self, make: Callable[[MetadataIndex], torch.Tensor]) -> None:
        super().__init__()
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._make(write_item.index)


def _contents(number: int) -> str:
    return f"__{number}{METADATA}"
