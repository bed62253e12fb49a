"""The files that tell a Hugging Face directory from a Megatron checkpoint; neither reader is imported for that."""

from __future__ import annotations

from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA = ".metadata"


def is_distributed(path: Path) -> bool:
    """Whether `path` holds a checkpoint of PyTorch's distributed format, as Megatron writes it."""
    return (path / METADATA).is_file()
