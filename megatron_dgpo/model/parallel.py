"""Process groups from the `parallel` settings, and this rank's place in them. Megatron-Core keeps them."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_dgpo import legality
from megatron_dgpo.config import Parallel
from megatron_dgpo.layout import Layout


def initialize_parallel(parallel: Parallel, seed: int, limits: tuple[timedelta, timedelta] | None = None) -> None:
    """Make Megatron's process groups and seed its generators. Collective; the default group must exist.

    limits: how long a rank waits for others in Megatron's groups, and in the default one; None: half an hour, and as it
    was. Raises UsageError when the sizes do not fill the world.
    """
    legality.check(legality.of_world(parallel, dist.get_world_size()))
    chunks = parallel.chunks_per_stage
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
    )
    if limits is not None:
        # Not by distributed_timeout_minutes: Megatron 0.16 forgets it for a group, of experts over gloo. Its list has
        # the default group, too.
        parallel_state.update_pg_timeout(limits[0])
        parallel_state.update_pg_timeout(limits[1], dist.group.WORLD)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def trainer_layout(parallel: Parallel) -> Layout:
    """This run's, after `initialize_parallel`; raises RuntimeError if Megatron numbers its ranks in another way."""
    layout = Layout.from_config(parallel, dist.get_world_size())
    rank = layout.rank(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    if rank != dist.get_rank() or layout.expert_rank(rank) != expert_rank:
        raise RuntimeError(f"rank {dist.get_rank()} is {rank} in {layout}: Megatron's order of ranks has changed")
    return layout


def tensor_group() -> dist.ProcessGroup:
    """Those that share each layer's matrices with this rank."""
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_group() -> dist.ProcessGroup:
    """This rank's peers in the other stages."""
    return parallel_state.get_pipeline_model_parallel_group()


def expert_group() -> dist.ProcessGroup:
    """Those that share each layer's experts with this rank."""
    return parallel_state.get_expert_model_parallel_group()


def context_group() -> dist.ProcessGroup:
    """Those that share each sequence's tokens with this rank."""
    return parallel_state.get_context_parallel_group()


def data_group() -> dist.ProcessGroup:
    """This rank's peers in the other replicas, for Python objects: of gloo."""
    return parallel_state.get_data_parallel_group_gloo()


def copies_group() -> dist.ProcessGroup:
    """Those that hold the same weights as this rank, of all replicas and contexts: gradients are summed over them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def tensor_place() -> tuple[int, int]:
    """(rank, size) in `tensor_group`."""
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def context_place() -> tuple[int, int]:
    """(rank, size) in `context_group`."""
    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()


def replica() -> tuple[int, int]:
    """(number of this rank's replica, number of replicas)."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def is_last_stage() -> bool:
    """Of the pipeline, whatever the model chunk: the stage that computes losses."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def is_replica_leader() -> bool:
    """The first rank of a data-parallel replica, which speaks for it to the outside."""
    return context_place()[0] == 0 and dist.get_rank(parallel_state.get_model_parallel_group()) == 0
