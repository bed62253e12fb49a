"""Checkpoints that tests write."""

from pathlib import Path


def save(*of_what) -> Path:
    """`checkpoint.begin` with these, until it is complete. Collective over all ranks."""
    from megatron_dgpo import checkpoint

    writing = checkpoint.begin(*of_what)
    assert writing.is_complete(wait=True)
    return writing.path
