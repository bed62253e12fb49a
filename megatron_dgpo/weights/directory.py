"""Hugging Face directories, read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_dgpo.complete_folder import flush
from megatron_dgpo.errors import UsageError
from megatron_dgpo.json_file import read_object
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.formats import INDEX, METADATA, SINGLE
from megatron_dgpo.weights.load import check_tensors, opened, tensor_files

# Hugging Face's own limit for one safetensors file.
FILE_BYTES = 5 * 10**9
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_WEIGHT_LISTS = (INDEX, METADATA, "metadata.json")
_SAFETENSORS_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}


class HfDirectory:
    """The weights of a Hugging Face directory, mapped into memory."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        """Raises UsageError as `check_weights` does."""
        self.dtypes = check_tensors(architecture, path)
        self._tensors, self._architecture = Safetensors(path), architecture

    def tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the Hugging Face tensors that Megatron parameter `name` consists of."""
        for source in self._architecture.parameters[name][1:]:
            yield source, self._tensors[source]


class Safetensors:
    """Tensors by name, mapped into memory: they take page cache, no memory of the process's own."""

    def __init__(self, path: Path) -> None:
        self._path, self._locations = path, tensor_files(path)
        self._files: dict[str, safe_open] = {}
        self._open = contextlib.ExitStack()

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._locations.get(name)
        if file is None:
            raise UsageError(f"{self._path}: tensor {name} is missing")
        if file not in self._files:
            self._files[file] = self._open.enter_context(opened(self._path / file))
        return self._files[file].get_tensor(name)


def group(names: Iterable[str], nbytes: Callable[[str], int], limit: int) -> list[list[str]]:
    """Consecutive runs of at most `limit` bytes, or of one name: what goes into each file."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = nbytes(name)
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


class SafetensorsWriter:
    """A sharded Hugging Face model, written file by file, in any order and by any process."""

    def __init__(self, folder: Path, files: list[list[str]], layout: Callable[[str], dict[str, torch.Tensor]]) -> None:
        """files: the parameters that go into each. layout: {tensor: shape and dtype} of each parameter.

        A parameter is whatever the caller takes at once: one of Megatron's, or a single tensor.
        """
        self._folder, self._files = folder, files
        self._layouts = [{k: v for name in names for k, v in layout(name).items()} for names in files]
        count = len(files)
        several = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self._names = several if count > 1 else [SINGLE]

    def is_done(self, number: int) -> bool:
        return (self._folder / self._names[number]).is_file()

    def write(self, number: int, tensors: Callable[[str], Iterator[tuple[str, torch.Tensor]]]) -> None:
        """Write file `number` from the tensors of each of its parameters, and flush it to disk."""
        path = self._folder / self._names[number]
        partial = path.with_suffix(".partial")
        items = (item for name in self._files[number] for item in tensors(name))
        write_safetensors(partial, self._layouts[number], items)
        partial.rename(path)

    def finish(self) -> None:
        if len(self._names) > 1:
            files = zip(self._names, self._layouts, strict=True)
            content = {
                "metadata": {"total_size": sum(t.nbytes for layout in self._layouts for t in layout.values())},
                "weight_map": {tensor: name for name, layout in files for tensor in layout},
            }
            (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def write_safetensors(path: Path, layout: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """The file that safetensors' save_file would write, but holding one tensor at a time. Flushed to disk."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide types first, so that every tensor is aligned.
    for name, tensor in sorted(layout.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + tensor.nbytes
        dtype = _SAFETENSORS_TYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(bytes_of(tensor))
    flush([path])


def copy_small_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Config, tokenizer and the like of a model directory, the config with `dtype`; no weights or lists of them."""
    for file in source.iterdir():
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and file.name not in _WEIGHT_LISTS:
            shutil.copy(file, target / file.name)
    path = target / "config.json"
    config = read_object(path)
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    # Untouched, and so identical byte by byte, unless the weights are of another type now.
    if config.get(key) not in (name, None):
        path.write_text(json.dumps(config | {key: name}, indent=2) + "\n")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Without a copy, where the tensor is contiguous and in host memory."""
    return memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
