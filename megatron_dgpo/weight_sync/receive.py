"""Runs in vLLM's workers: each gets its own shards and nothing else, read in place or received, into its live model."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    get_layerwise_info,
    make_online_process_loader,
)

from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.weight_sync.shared_memory import Handle, attach
from megatron_dgpo.weight_sync.stream import Meeting, join_group, receive_buckets
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.resharding import (
    Move,
    checksum,
    plan_buckets,
    vllm_parameters,
    vllm_shape,
    wrapped_sum,
)

logger = logging.getLogger(__name__)


def abandon_reload(model: torch.nn.Module) -> None:
    """Layers that a reload which broke off has not put together hold their old weights again; vLLM leaves them empty.

    What such a reload left behind would also be counted as the next one's.
    """
    for module in model.modules():
        info = get_layerwise_info(module)
        if info.can_load():
            _place_kernel_tensors(module, info)
            info.reset()


@dataclass
class ShardInit(WeightTransferInitInfo):
    trainer: dict
    """Fields of Layout."""
    server: int
    servers: int
    bucket_numel: int
    meeting: dict | None = None
    """Fields of Meeting, where shards are sent."""
    memory: list | None = None
    """{Megatron name: fields of Handle} of every trainer rank, where they are read in place."""


@dataclass
class ShardUpdate(WeightTransferUpdateInfo):
    checksums: list
    """vLLM parameters whose checksums are wanted."""


class ShardEngine(WeightTransferEngine):
    """Loads through vLLM's layerwise reload, which also packs and quantises; one layer exists twice at a time."""

    init_info_cls = ShardInit
    update_info_cls = ShardUpdate
    checksums: dict[str, int] = {}
    """Of the last finished update."""
    failure: str = ""
    """Why the last update broke off."""
    _group: dist.ProcessGroup | None = None
    """Of trainer and workers, where shards are sent."""

    def init_transfer_engine(self, init_info: ShardInit) -> None:
        architecture = read_architecture(Path(self.model_config.model))
        trainer, parallel = Layout(**init_info.trainer), self.parallel_config
        vllm = ServerLayout(parallel.tensor_parallel_size, init_info.servers, parallel.enable_expert_parallel)
        self._worker = vllm.first_worker(init_info.server) + parallel.rank
        parameters = vllm_parameters(architecture)
        self._shapes = {name: vllm_shape(architecture, parameter, vllm) for name, parameter in parameters.items()}
        self._check_shapes()
        self._buckets = plan_buckets(architecture, trainer, vllm, init_info.bucket_numel, worker=self._worker)
        moves = list(itertools.chain.from_iterable(self._buckets))
        # Rows of the vocabulary; padding follows them.
        self._rows = {
            move.target: move.target_start[0] + move.shape[0]
            for move in moves
            if parameters[move.target].split == "vocab"
        }
        # Of another trainer.
        self.shutdown()
        if init_info.memory:
            needed: dict[int, dict[str, Handle]] = defaultdict(dict)
            for move in moves:
                needed[move.rank][move.source] = Handle(**init_info.memory[move.rank][move.source])
            self._memory = {rank: attach(handles) for rank, handles in needed.items()}
        else:
            meeting = Meeting(**(init_info.meeting or {}))
            size = trainer.world_size + vllm.num_workers
            self._timeout_s, self.failure = meeting.timeout_s, ""
            try:
                self._group = join_group(meeting, trainer.world_size + self._worker, size)
            except Exception as error:
                # Not raised, as below. The trainer, which cannot have joined either, knows.
                logger.exception("no group with the trainer")
                self.failure = f"vLLM worker {self._worker}: {error}"

    def _check_shapes(self) -> None:
        """That vLLM cuts this model as the plan does. Its packed parameters have lost their shapes by now."""
        for name, shape in self._shapes.items():
            layer, _, parameter = name.rpartition(".")
            found = get_layerwise_info(self.model.get_submodule(layer)).restore_metadata[0].get(parameter)
            if found is not None and tuple(found.shape) != shape:
                raise ValueError(f"vLLM's {name} has shape {tuple(found.shape)}, the plan says {shape}")

    def start_weight_update(self) -> None:
        for module in self.model.modules():
            # Without this a CPU worker skips packing the experts anew and computes with garbage.
            method = getattr(module, "quant_method", None)
            if method is not None and self.device.type == "cpu" and getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        # Not the base class's: that one waits for an accelerator, which a CPU worker does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        # A layer with padding is put together only by this.
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # A tied head keeps a packed copy of the embedding that the reload does not renew.
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
        self.checksums = {}
        for move, value in self._pieces.items():
            self.checksums[move.target] = wrapped_sum(self.checksums.get(move.target, 0), value)

    def receive_weights(self, update: ShardUpdate) -> None:
        """Never raises: when one of several workers does, vLLM takes the others' answers for those to its next call."""
        self.failure = ""
        self._sample = set(update.checksums)
        self._pieces: dict[Move, int] = {}
        try:
            if self._group is None:
                for move in itertools.chain.from_iterable(self._buckets):
                    shard = self._memory[move.rank][move.source]
                    self._load(move, move.of_source(shard).to(self.model_config.dtype))
            else:
                dtype = self.model_config.dtype
                receive_buckets(self._group, self._buckets, self._load, dtype, self.device, self._timeout_s)
            if self.device.type == "cuda":
                # What the GPU has yet to do, loads among it, may fail: here it is this update that failed.
                torch.cuda.synchronize(self.device)
        except Exception as error:
            logger.exception("a weight update broke off")
            self.failure = f"vLLM worker {self._worker}: {error}"

    def _load(self, move: Move, piece: torch.Tensor) -> None:
        layer_name, _, name = move.target.rpartition(".")
        layer = self.model.get_submodule(layer_name)
        parameter = getattr(layer, name)
        if parameter.weight_loader.__wrapped__ != self._copy:
            parameter.weight_loader = self._copy
            parameter.weight_loader = make_online_process_loader(layer, name)
        parameter.weight_loader(parameter, piece, move)

    def _copy(self, param: torch.Tensor, piece: torch.Tensor, move: Move) -> None:
        """Called twice by the reload: at once, mostly on a tensor without memory, and when its layer is complete."""
        place = move.of_target(param.data)
        place.copy_(piece)
        if param.is_meta:
            return
        if move.target_start[0] + move.shape[0] == self._rows.get(move.target):
            # Padding, fresh from the allocator.
            param.data[self._rows[move.target] :].zero_()
        if move.target in self._sample:
            # Read back from where the model has it, before any packing. (vLLM keeps biases in float32 on CPU.)
            value = checksum(place.to(piece.dtype), self._shapes[move.target], move.target_start)
            self._pieces[move] = value

    def shutdown(self) -> None:
        if self._group:
            self._group.abort()
        self._group, self._memory = None, {}
