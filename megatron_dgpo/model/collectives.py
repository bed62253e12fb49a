"""Python objects between ranks. They travel pickled, over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

T = TypeVar("T")


def from_rank_0(function: Callable[[], T]) -> T:
    """Rank 0's result on every rank; an exception there is raised here too, so that no rank waits for it in vain.

    Collectives: one object broadcast over all ranks.
    """
    result: Any = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    result, error = _broadcast((result, error), None, 0)
    if error is not None:
        raise error
    return result


def all_gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Everybody's value, by rank of the group (all ranks where it is None). Collectives: one object all-gather."""
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def broadcast_from_leader(value: T) -> T:
    """From the replica's leader to all its ranks. Collectives: one object broadcast over the replica."""
    return _broadcast(value, parallel_state.get_model_parallel_group(), 0)


def broadcast_from_last_stage(value: T) -> T:
    """From the last pipeline stage to the others. Collectives: one object broadcast over the pipeline group."""
    group = parallel_state.get_pipeline_model_parallel_group()
    return _broadcast(value, group, dist.get_world_size(group) - 1)


def _broadcast(value: T, group: dist.ProcessGroup | None, source: int) -> T:
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=source, device="cpu")
    return box[0]
