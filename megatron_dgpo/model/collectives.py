"""What ranks tell each other beside Megatron's own: Python objects, pickled, over gloo, and rows of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dgpo.model.parallel import data_group, is_replica_leader

T = TypeVar("T")


def from_rank_0(function: Callable[[], T]) -> T:
    """Rank 0's result on every rank; an exception there is raised here too, so that no rank waits for it in vain.

    Collectives: one object broadcast over all ranks.
    """
    return _value(_broadcast(_attempt(function, dist.get_rank() == 0), None, 0))


def all_gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Everybody's value, by rank of the group (all ranks where it is None). Collectives: one object all-gather."""
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def from_leader(function: Callable[[], T]) -> T:
    """`from_rank_0` within each replica, from its leader.

    Collectives: one object broadcast over the replica, in two hops: Megatron's model-parallel group is one
    context-parallel rank's.
    """
    found = _attempt(function, is_replica_leader())
    found = _broadcast(found, parallel_state.get_model_parallel_group(), 0)
    return _value(_broadcast(found, parallel_state.get_context_parallel_group(), 0))


def from_leaders(function: Callable[[], T]) -> list[T]:
    """Every leader's result, by replica, on every rank; what any of them raises is raised everywhere.

    Collectives: one object all-gather over the leaders and those of `from_leader`.
    """

    def everyones() -> list[T]:
        return [_value(found) for found in all_gathered(_attempt(function, True), data_group())]

    return from_leader(everyones)


def broadcast_from_last_stage(value: T) -> T:
    """From the last pipeline stage to the others. Collectives: one object broadcast over the pipeline group."""
    group = parallel_state.get_pipeline_model_parallel_group()
    return _broadcast(value, group, dist.get_world_size(group) - 1)


def _attempt(function: Callable[[], T], mine: bool) -> tuple[Any, Exception | None]:
    """(result, what was raised) of the rank whose call it is."""
    if mine:
        try:
            return function(), None
        except Exception as error:
            return None, error
    return None, None


def _value(found: tuple[Any, Exception | None]) -> Any:
    result, error = found
    if error is not None:
        raise error
    return result


def _broadcast(value: T, group: dist.ProcessGroup | None, source: int) -> T:
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=source, device="cpu")
    return box[0]


def own_rows(states: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """[N, H], the same on all ranks -> [⌈N / size⌉, H], this one's share, in memory of its own."""
    share = -(-len(states) // size)
    padded = torch.nn.functional.pad(states, (0, 0, 0, share * size - len(states)))
    return padded[rank * share : (rank + 1) * share].clone() if size > 1 else states


def all_rows(own: torch.Tensor, count: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[N, H] of N = count rows from everybody's share. Collectives: an all-gather where there are several ranks."""
    size = dist.get_world_size(group) if group else 1
    if size == 1:
        return own
    gathered = own.new_empty(size * len(own), own.shape[1])
    dist.all_gather_into_tensor(gathered, own, group=group)
    return gathered[:count]
