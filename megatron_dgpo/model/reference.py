"""The frozen reference: the policy's layout, no gradients, no optimizer; its hidden states reach the loss."""

from __future__ import annotations

import torch

from megatron_dgpo.config import Config
from megatron_dgpo.micro_batch import MicroBatch, with_known
from megatron_dgpo.model.collectives import own_rows
from megatron_dgpo.model.gpt import build_chunks
from megatron_dgpo.model.parallel import tensor_place
from megatron_dgpo.model.policy import forward_together, run_schedule
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.load import load_weights


class Reference:
    """The model that π is compared with. With `model.reference_offload` its weights rest in host memory."""

    def __init__(self, config: Config, architecture: Architecture) -> None:
        self.modules = build_chunks(config, architecture)
        for module in self.modules:
            module.requires_grad_(False).eval()
        load_weights(self.modules, architecture, config.model.reference or config.model.path, *tensor_place())
        self._parameters = [parameter for module in self.modules for parameter in module.parameters()]
        self._together = forward_together(config)
        self._on_host = None
        if config.model.reference_offload:
            pin = torch.cuda.is_available()
            self._on_host = [p.data.cpu().pin_memory() if pin else p.data.clone() for p in self._parameters]
            self._leave_device()

    @torch.no_grad()
    def attach(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The same with this model's final hidden states of their response tokens, on the last stage.

        Every tensor-parallel rank keeps its share of them, for as long as the micro-batches are kept: 2·H / tp bytes a
        token in bfloat16. Collective over the replica.
        """
        self._reach_device()
        states = run_schedule(
            self.modules,
            micro_batches,
            lambda batch, hidden_states, head: {"reference_states": own_rows(hidden_states, *tensor_place())},
            together=self._together,
        )
        self._leave_device(keep_head=True)
        return with_known(micro_batches, states)

    @property
    def head_weight(self) -> torch.Tensor | None:
        """[V_padded / tp, H], None but on the last stage. From `attach` on it stays on the device, for the loss."""
        last = self.modules[-1]
        return last.head_weight if last.post_process else None

    def _reach_device(self) -> None:
        if self._on_host is not None:
            for parameter, host in zip(self._parameters, self._on_host, strict=True):
                parameter.data = host.to(torch.cuda.current_device(), non_blocking=True)

    def _leave_device(self, keep_head: bool = False) -> None:
        # The weights never change: dropping the device's copy is all there is to do.
        if self._on_host is not None:
            last = self.modules[-1]
            head = last.head_weight if keep_head and last.post_process else None
            for parameter, host in zip(self._parameters, self._on_host, strict=True):
                if parameter is not head:
                    parameter.data = host
