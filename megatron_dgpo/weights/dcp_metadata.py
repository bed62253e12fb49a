"""`.metadata`, the table of contents of PyTorch's distributed checkpoints, read without running what is in it.

It is a pickle. Here only PyTorch's classes for it are made, from numbers, text and containers of them: a crafted file
that names anything else, or does with these what no writer does, is refused.

What remains trusted where Megatron loads a checkpoint itself: that nobody replaces `.metadata` between `only_data`'s
look and Megatron's reading, and PyTorch's `weights_only` unpickler.
"""

from __future__ import annotations

import contextlib
import enum
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.weights.formats import METADATA

# PyTorch's own switch, read by every torch.load.
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

_CLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
    metadata.StorageMeta,
    filesystem._StorageInfo,
    planner.SavePlan,
    planner.TensorWriteData,
    planner.WriteItem,
)
_ENUMS = (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType)
_CALLED = (torch.Size, *_ENUMS, torch.serialization._get_layout)
_GLOBALS = {(item.__module__, item.__qualname__): item for item in (*_CLASSES, *_CALLED)}
_GLOBALS |= {("torch", str(v).removeprefix("torch.")): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
# Where it was written; Python 3.13 has another name for the module.
_GLOBALS |= {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}
# Megatron-Core 0.15 left empty objects of its own in it.
_MEGATRON = ("megatron.core.dist_checkpointing.strategies.torch", ("MCoreMetadata", "MCoreSavePlan"))


def _member(kind: type, name: str) -> enum.Enum:
    """Python 3.11.0 to 3.11.3, Debian 12's among them, write an enumeration's members as getattr(kind, name)."""
    if kind not in _ENUMS or name not in kind.__members__:
        raise pickle.UnpicklingError("it wants an attribute, which is no part of a checkpoint")
    return kind[name]


_GLOBALS["builtins", "getattr"] = _member


class _Empty:
    """Stands for Megatron's."""


_GLOBALS |= {(_MEGATRON[0], name): _Empty for name in _MEGATRON[1]}

# Those that PyTorch's writers use, of protocols 2 to 5. Not among them: INST, OBJ, EXT, persistent ids and buffers.
_OPCODES = frozenset(
    getattr(pickle, name)[0]
    for name in """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT
    SETITEM SETITEMS GLOBAL STACK_GLOBAL NEWOBJ REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET""".split()
)


class _Unpickler(pickle._Unpickler):
    """In Python, because the one in C takes memory for as many entries of its memo as a file says."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code in _OPCODES}

    def find_class(self, module: str, name: str):
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(
                f"it wants {shown(f'{module}.{name}', plain=True)}, which is no part of a checkpoint"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to other files")

    def load_build(self) -> None:
        # Of an object, not of its class, which is the same for everybody.
        if type(self.stack[-2]) not in (*_CLASSES, _Empty):
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-2]).__name__}")
        super().load_build()

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        super().load_setitems()

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _check_key(key) -> None:
    """Tuples of tuples of tuples would take for ever to hash."""
    plain = isinstance(key, str | int)
    if isinstance(key, MetadataIndex):
        plain = isinstance(key.fqn, str) and isinstance(key.offset, torch.Size | None)
    if not plain:
        raise pickle.UnpicklingError(f"a {type(key).__name__} is no key")


def read_metadata(path: Path) -> Metadata:
    """The table of contents in file `path`. Raises UsageError when it is not one, or names files elsewhere."""
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        problem = _problem(found)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:
        # Unpickling raises whatever the damaged bytes make it stumble over.
        reason = f"{type(error).__name__}: {shown(' '.join(str(error).split()), plain=True)}"
        raise UsageError(f"{path} is damaged or cut short, or no table of a checkpoint: {reason}") from None
    if problem:
        raise UsageError(f"{path} is damaged or cut short: {problem}")
    return found


@contextlib.contextmanager
def only_data(folder: Path, look: bool) -> Iterator[None]:
    """Around Megatron's loading of the checkpoint in `folder`, which would run what its pickles name.

    look: go through `.metadata` before, as one rank should. The optimizer's and the random generators' state is then
    read with `weights_only`, whatever Megatron asks for. Raises UsageError as `read_metadata` does.
    """
    if look:
        read_metadata(folder / METADATA)
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _problem(found) -> str | None:
    """What makes it no table of contents; later code relies on these types."""
    if not isinstance(found, Metadata):
        return f"it holds {type(found).__name__}, expected Metadata"
    if not isinstance(found.state_dict_metadata, dict) or not isinstance(found.storage_data, dict):
        return "it lists no tensors or no files"
    for key, entry in found.state_dict_metadata.items():
        if not isinstance(key, str) or not (isinstance(entry, BytesStorageMetadata) or _is_tensor(entry)):
            return f"its entry {shown(key)} is not that of a tensor or object"
    for index, info in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not _is_place(info):
            return f"its place of {shown(index)} is not one in a file beside it"
    return None


def _is_tensor(entry) -> bool:
    return (
        isinstance(entry, TensorStorageMetadata)
        and isinstance(entry.properties, TensorProperties)
        and isinstance(entry.properties.dtype, torch.dtype)
        and _is_size(entry.size)
        and isinstance(entry.chunks, list)
        and all(
            isinstance(chunk, ChunkStorageMetadata)
            and _is_size(chunk.offsets)
            and _is_size(chunk.sizes)
            and len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
            for chunk in entry.chunks
        )
    )


def _is_size(size) -> bool:
    return isinstance(size, torch.Size) and all(length >= 0 for length in size)


def _is_place(info) -> bool:
    return (
        isinstance(info, filesystem._StorageInfo)
        and isinstance(info.relative_path, str)
        and Path("folder", info.relative_path).parent == Path("folder")
        and not {"..", "\0"} & {info.relative_path, *info.relative_path}
        and all(type(number) is int and 0 <= number < 2**63 for number in (info.offset, info.length))
        # PyTorch's extensions, that is, compression: neither Megatron nor the converter writes them.
        and info.transform_descriptors is None
    )
