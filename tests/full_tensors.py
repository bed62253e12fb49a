"""From full Hugging Face tensors to what Megatron's ranks hold, and back."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_dgpo.weights.architectures import Architecture, expert_of
from megatron_dgpo.weights.load import named_shards
from megatron_dgpo.weights.slices import padded_vocab_size, shard_slices


def write_slices(
    chunks: list[torch.nn.Module], architecture: Architecture, destination: dict[str, torch.Tensor]
) -> None:
    """Copy what this rank holds into full Hugging Face tensors, cast to their dtype. Collectives: none.

    All ranks together write every element exactly once: of several that hold the same one, the first.
    """
    writes = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    writes_experts = parallel_state.get_expert_data_parallel_rank() == 0
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in named_shards(chunks):
        # A tied head's copy is not in the table: the embedding is written once, by the first stage.
        if name not in architecture.parameters or (architecture.parameters[name][0] == "copy" and rank):
            continue
        if not (writes if expert_of(name) is None else writes_experts):
            continue
        for part in shard_slices(architecture, name, rank, size):
            part.of_full(destination[part.name]).copy_(part.of_shard(parameter.detach()))


def megatron_shard(architecture, full, name, rank, size):
    """What a tensor-parallel rank holds of one parameter; blank where it is padding."""
    parts = shard_slices(architecture, name, rank, size)
    shape = list(full[architecture.parameters[name][1]].shape)
    if architecture.parameters[name][0] == "vocab":
        shape[0] = padded_vocab_size(architecture.vocab_size, size) // size
    else:
        dim = parts[0].dim
        shape[dim] = sum(part.length for part in parts)
    shard = torch.full(shape, torch.nan)
    for part in parts:
        part.of_shard(shard).copy_(part.of_full(full[part.name]))
    return shard
