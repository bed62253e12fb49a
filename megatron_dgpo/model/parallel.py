"""Process groups from the `parallel` settings."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_dgpo.config import Parallel
from megatron_dgpo.errors import UsageError
from megatron_dgpo.weights.resharding import TrainerLayout


def data_parallel_size(parallel: Parallel, world_size: int) -> int:
    """How many replicas `world_size` ranks make. Raises UsageError when the sizes do not fill the world."""
    model = parallel.tensor * parallel.pipeline
    sizes = f"parallel.tensor={parallel.tensor} × parallel.pipeline={parallel.pipeline}"
    if parallel.data is not None and model * parallel.data != world_size:
        raise UsageError(
            f"{sizes} × parallel.data={parallel.data} = {model * parallel.data} ranks, but {world_size} were started; "
            f"start {model * parallel.data}, or leave parallel.data out"
        )
    if world_size % model:
        raise UsageError(
            f"{sizes} = {model} ranks do not fill {world_size} ranks; start a multiple of {model}, or change the sizes"
        )
    return world_size // model


def initialize_parallel(parallel: Parallel, seed: int, patience: timedelta | None = None) -> None:
    """Make Megatron's process groups and seed its generators. Collective; the default group must exist.

    patience: how long a rank waits for another in any group, the default one included. Ranks of a replica wait for the
    one that samples, and a replica for the others, so a run's must outlast its longest rollout; None: the default
    group's is as it was, and Megatron's are half an hour.
    """
    data_parallel_size(parallel, dist.get_world_size())
    chunks = parallel.chunks_per_stage
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
    )
    if patience is not None:
        # Not by distributed_timeout_minutes: Megatron 0.16 forgets it for a group, of experts over gloo.
        parallel_state.update_pg_timeout(patience)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def trainer_layout(parallel: Parallel) -> TrainerLayout:
    """This run's, after `initialize_parallel`; raises RuntimeError if Megatron numbers its ranks in another way."""
    layout = TrainerLayout(
        parallel.tensor,
        parallel.pipeline,
        parallel.chunks_per_stage,
        parallel_state.get_data_parallel_world_size(),
        parallel.expert,
    )
    rank = layout.rank(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    if rank != dist.get_rank() or layout.expert_rank(rank) != expert_rank:
        raise RuntimeError(f"rank {dist.get_rank()} is {rank} in {layout}: Megatron's order of ranks has changed")
    return layout


def is_last_stage() -> bool:
    """Of the pipeline, whatever the model chunk: the stage that computes losses."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def is_replica_leader() -> bool:
    """The first rank of a data-parallel replica, which speaks for it to the outside."""
    return dist.get_rank(parallel_state.get_model_parallel_group()) == 0
