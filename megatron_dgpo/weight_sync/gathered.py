"""Runs in trainer ranks: gathered weights to servers on the ranks' own GPUs, by vLLM's `ipc` engine, and what each
worker must then hold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megatron_dgpo.layout import ServerLayout
from megatron_dgpo.model.collectives import from_rank_0
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.resharding import Block, block, vllm_blocks, vllm_parameters

_SUM_NUMEL = 2**22


class IpcSync:
    """Every rank gathers one tensor after the other into a buffer of its GPU, where a worker takes copies out of it.

    All methods are collective over all ranks; rank 0 alone asks the engines. A context manager, as is ShardSync.
    Written from vLLM 0.32's sources and not yet run: no machine with a GPU was at hand.
    """

    def __init__(
        self, engines: Engines, source, architecture: Architecture, layout: ServerLayout, bucket_bytes: int
    ) -> None:
        """source: a vLLM WeightSource, the same on every rank. layout: of each server. bucket_bytes: of the buffer,
        unless a tensor is larger."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        self._engines, self._version = engines, 0
        self._failure: Exception | None = None
        self._source = SummedSource(source, architecture, layout) if dist.get_rank() == 0 else source
        # Without packing vLLM would keep every gathered tensor, the whole model on every GPU, until the update's end.
        info = IPCTrainerInitInfo(
            rank=dist.get_rank(), packed=True, packed_buffer_size_bytes=buffer_bytes(source.metadata(), bucket_bytes)
        )
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self, source=self._source)
        from_rank_0(self._raise_failure)

    def __enter__(self) -> IpcSync:
        return self

    def __exit__(self, *_) -> None:
        self._trainer.shutdown()

    def push(self, version: int) -> None:
        """Give every server the current weights as `version`; they stay paused, as they do when it fails. Collectives:
        those of the source; for every buffer an object all-gather and two barriers, at the end an object broadcast."""
        self._version = version
        self._trainer.send_weights()
        from_rank_0(self._raise_failure)

    def differing_tensors(self, address: str) -> list[str]:
        """Rank 0 only: vLLM parameters of a server whose content is not what the last push sent."""
        held = self._engines.call_workers(address, "held_sums")
        sums = self._source.sums
        expected = zip(sums, torch.stack([*sums.values()]).tolist(), strict=True)
        return sorted({name for (worker, name), value in expected if held[worker].get(name) != value})

    # vLLM's VLLMWeightSyncClient protocol, called by its trainer engine on rank 0.

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._ask(lambda: self._engines.init_weight_transfer_engine([init_info] * len(self._engines.addresses)))

    def start_weight_update(self) -> None:
        self._ask(self._engines.start_weight_update)

    def update_weights(self, update_info) -> None:
        from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

        self._ask(lambda: self._engines.update_weights(_json_safe_update_payload(update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask(lambda: self._engines.finish_weight_update(str(self._version)))

    def _ask(self, request: Callable[[], None]) -> None:
        """The first failure ends all asking, and is raised when all ranks have met: they go through the collectives
        between requests, whatever becomes of these."""
        if self._failure is None:
            try:
                request()
            except Exception as error:
                self._failure = error

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure:
            raise failure


def buffer_bytes(metadata: list, bucket_bytes: int) -> int:
    """Of the buffer that tensors are packed into, which must hold the largest. metadata: vLLM's ParamMeta of each."""
    return max(bucket_bytes, *(math.prod(meta.shape) * meta.dtype.itemsize for meta in metadata))


class SummedSource:
    """A vLLM WeightSource that remembers what each of a server's workers must hold when all has been loaded."""

    def __init__(self, source, architecture: Architecture, layout: ServerLayout) -> None:
        self._source = source
        self.sums: dict[tuple[int, str], torch.Tensor] = {}
        """(worker, vLLM parameter) -> content_sum of the worker's part, of the last iteration."""
        self._parts: dict[str, list[tuple[int, str, Block]]] = defaultdict(list)
        for target, parameter in vllm_parameters(architecture).items():
            for worker in range(layout.tensor):
                for part in vllm_blocks(architecture, parameter, worker, layout):
                    self._parts[part.name].append((worker, target, part))

    def metadata(self) -> list:
        return self._source.metadata()

    def held_names(self):
        return self._source.held_names()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.sums = {}
        for name, tensor in self._source:
            for worker, target, part in self._parts.get(name, ()):
                value = content_sum(block(tensor, part.start, part.shape))
                # On its device: a mixture has 100,000 parts, and to wait for each would take seconds.
                self.sums[worker, target] = self.sums.get((worker, target), 0) + value
            yield name, tensor


def content_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Of all elements, in whatever order: those of a tensor's blocks add up to its own, padding of zeros to nothing.
    A scalar of int64 on their device.

    Σ bits · (bits + 40503) in 64-bit integers that wrap: elements that change by a bit up and down do not cancel out.
    The order is left out because kernels may keep experts in one of their own. Memory: some times that of four million
    64-bit integers.
    """
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in tensor.contiguous().view(integers).view(-1).split(_SUM_NUMEL):
        bits = part.to(torch.int64)
        total += (bits * (bits + 40503)).sum()
    return total
