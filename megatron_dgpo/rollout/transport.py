"""Inside vLLM's workers: the `memfd` weight transport, for servers that share a machine with the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_dgpo.rollout.shared_weights import Layout, attach, checksum


@dataclass
class MemfdInit(WeightTransferInitInfo):
    pass


@dataclass
class MemfdUpdate(WeightTransferUpdateInfo):
    path: str
    dtype: str
    tensors: list
    num_bytes: int


class MemfdEngine(WeightTransferEngine):
    """Loads full Hugging Face tensors from the trainer's memory through vLLM's layerwise reload."""

    init_info_cls = MemfdInit
    update_info_cls = MemfdUpdate
    checksums: dict[str, int] = {}
    """CRC-32 of every tensor of the last finished update."""

    def init_transfer_engine(self, init_info: MemfdInit) -> None:
        self._received: dict[str, int] = {}
        self._weights: dict[str, torch.Tensor] = {}

    def start_weight_update(self) -> None:
        self._received = {}
        for module in self.model.modules():
            # Without this a CPU worker skips packing the experts anew and computes with garbage.
            method = getattr(module, "quant_method", None)
            if self.device.type == "cpu" and getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        # Not the base class's: that one waits for an accelerator, which a CPU worker does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update: MemfdUpdate) -> None:
        tensors = [tuple(entry) for entry in update.tensors]
        # Kept until the update is finished: a layer is put together when the last of its tensors is in.
        self._weights = attach(update.path, Layout(update.dtype, tensors, update.num_bytes))
        self._received = {name: checksum(tensor) for name, tensor in self._weights.items()}
        self.model.load_weights(iter(self._weights.items()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # A tied head keeps a packed copy of the embedding that the reload does not renew.
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
        self.checksums, self._weights = self._received, {}

    def shutdown(self) -> None:
        self._weights = {}


class WorkerExtension:
    """Methods that the trainer may call on a worker through /collective_rpc."""

    def received_checksums(self) -> dict[str, int]:
        return getattr(self.weight_transfer_engine, "checksums", {})
