"""Megatron shards back into full Hugging Face tensors: as a stream, or as a directory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dgpo.complete_folder import complete_folder
from megatron_dgpo.model.collectives import all_gathered
from megatron_dgpo.model.parallel import expert_group, pipeline_group, tensor_group, tensor_place
from megatron_dgpo.weights.architectures import Architecture, expert_of
from megatron_dgpo.weights.directory import FILE_BYTES, SafetensorsWriter, copy_small_files, group
from megatron_dgpo.weights.formats import is_distributed
from megatron_dgpo.weights.load import named_shards, tensor_files
from megatron_dgpo.weights.slices import shard_slices


class FullTensors:
    """A re-iterable stream of (Hugging Face name, full tensor), the same on every rank: vLLM's WeightSource protocol.

    Iterating is collective over all ranks: for every Megatron parameter one all-gather over tensor-parallel ranks, or
    one broadcast over expert-parallel ones, and one broadcast over the pipeline. At most one parameter is held in full
    at a time.
    """

    def __init__(self, chunks: list[torch.nn.Module], architecture: Architecture, dtype: torch.dtype) -> None:
        """dtype: of the tensors given out. Collective: object all-gathers over pipeline and expert-parallel ranks."""
        self._architecture, self._dtype = architecture, dtype
        self._shards = {name: p for name, p in named_shards(chunks) if name in architecture.parameters}
        self._tp_size = tensor_place()[1]
        self._pipeline = pipeline_group()
        self._experts = expert_group()
        # name -> (pipeline stage, expert-parallel rank, shape of a shard)
        self._owners: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        shapes = {name: tuple(parameter.shape) for name, parameter in self._shards.items()}
        for expert_rank, stages in enumerate(all_gathered(all_gathered(shapes, self._pipeline), self._experts)):
            for stage, held in enumerate(stages):
                for name, shape in held.items():
                    self._owners.setdefault(name, (stage, expert_rank, shape))

    def metadata(self) -> list:
        """vLLM's ParamMeta of every tensor, in the order of iteration."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, self._dtype, shape) for name, shape in self._architecture.hf_shapes.items()]

    def held_names(self) -> None:
        """All of them, on every rank."""
        return None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, (_, *sources) in self._architecture.parameters.items():
            shards = self._gather(name)
            full = {source: shards.new_empty(self._architecture.hf_shapes[source]) for source in sources}
            for rank, shard in enumerate(shards):
                for part in shard_slices(self._architecture, name, rank, len(shards)):
                    part.of_full(full[part.name]).copy_(part.of_shard(shard))
            yield from full.items()

    @torch.no_grad()
    def _gather(self, name: str) -> torch.Tensor:
        """[tp, ...] the shards of all tensor-parallel ranks; [1, ...] of an expert."""
        stage, expert_rank, shape = self._owners[name]
        is_expert = expert_of(name) is not None
        everything = torch.empty(
            1 if is_expert else self._tp_size, *shape, dtype=self._dtype, device=torch.cuda.current_device()
        )
        if name in self._shards:
            shard = self._shards[name].detach().to(self._dtype).contiguous()
            if is_expert:
                everything[0] = shard
            else:
                group = tensor_group()
                dist.all_gather_into_tensor(everything.view(-1), shard.view(-1), group=group)
        if is_expert and dist.get_rank(self._pipeline) == stage:
            dist.broadcast(everything, group=self._experts, group_src=expert_rank)
        dist.broadcast(everything, group=self._pipeline, group_src=stage)
        return everything


def export_hf(
    chunks: list[torch.nn.Module], architecture: Architecture, source_dir: Path, target: Path, dtype: torch.dtype
) -> Path:
    """Write a Hugging Face directory, a `complete_folder`; replaces one that is there.

    Config, tokenizer and all other small files are those of source_dir. Collectives: those of making and iterating
    FullTensors, and a barrier over all ranks. Global rank 0 writes, holding one parameter at a time; the others wait
    while it flushes a file (5 GB) to disk.
    """
    tensors = FullTensors(chunks, architecture, dtype)
    if dist.get_rank() == 0:
        with complete_folder(target) as folder:
            copy_small_files(source_dir, folder, dtype)
            stored = () if is_distributed(source_dir) else tensor_files(source_dir)
            _write(folder, tensors, architecture, dtype, architecture.tied_embeddings and "lm_head.weight" in stored)
    else:
        for _ in tensors:
            # Nobody is ahead of rank 0 by more than one collective: its limit counts from when it was asked for.
            torch.cuda.synchronize()
    dist.barrier()
    return target


def _write(folder: Path, tensors: FullTensors, architecture: Architecture, dtype: torch.dtype, tied_head: bool) -> None:
    empty = ((name, torch.empty(shape, dtype=dtype, device="meta")) for name, shape in architecture.hf_shapes.items())
    layout = dict(_with_head(empty, tied_head))
    # Of tensors, which stream by in this order; a conversion splits by Megatron parameters, its units of work.
    files = group(layout, lambda name: layout[name].nbytes, FILE_BYTES)
    writer = SafetensorsWriter(folder, files, lambda name: {name: layout[name]})
    stream = _with_head(tensors, tied_head)
    for number in range(len(files)):
        writer.write(number, lambda _: itertools.islice(stream, 1))
    writer.finish()


def _with_head(tensors: Iterable[tuple[str, torch.Tensor]], tied_head: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """With `tied_head`, a copy of the embedding follows it."""
    for name, tensor in tensors:
        yield name, tensor
        if tied_head and name == "model.embed_tokens.weight":
            yield "lm_head.weight", tensor
