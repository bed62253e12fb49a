"""Frozen models beside the policy, in its layout: no gradients, no optimizer. What the loss needs of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_dgpo.config import Config
from megatron_dgpo.micro_batch import MicroBatch, with_known
from megatron_dgpo.model.collectives import own_rows
from megatron_dgpo.model.gpt import build_chunks
from megatron_dgpo.model.parallel import tensor_group, tensor_place
from megatron_dgpo.model.policy import forward_together, run_schedule
from megatron_dgpo.statistics import token_statistics
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.load import load_weights


class Reference:
    """The model that π is compared with, and where `Config.needs_start` the one that the student started from."""

    def __init__(self, config: Config, architecture: Architecture) -> None:
        self._temperature, self._vocab_size = config.rollout.temperature, architecture.vocab_size
        self._model = _Frozen(config, architecture, config.model.reference or config.model.path)
        start = config.model.start or config.model.path
        self._start = _Frozen(config, architecture, start) if config.needs_start else None

    @torch.no_grad()
    def attach(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The same with the model's final hidden states of their response tokens, on the last stage, and with the
        start's log-probs of them.

        Every tensor-parallel rank keeps its share of the states, for as long as the micro-batches are kept: 2·H / tp
        bytes a token in bfloat16. Collective over the replica.
        """
        if self._start:
            micro_batches = with_known(micro_batches, self._start.run(micro_batches, self._start_logprobs))
        found = self._model.run(
            micro_batches,
            lambda batch, hidden_states, head: {"reference_states": own_rows(hidden_states, *tensor_place())},
            keep_head=True,
        )
        return with_known(micro_batches, found)

    @property
    def head_weight(self) -> torch.Tensor | None:
        """[V_padded / tp, H], None but on the last stage. From `attach` on it stays on the device, for the loss."""
        return self._model.head_weight

    @property
    def models(self) -> int:
        """That a pass runs through."""
        return 1 + (self._start is not None)

    def _start_logprobs(
        self, batch: MicroBatch, hidden_states: torch.Tensor, head_weight: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        found = token_statistics(
            hidden_states,
            head_weight,
            batch.targets,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
            tp_group=tensor_group(),
        )
        return {"start_logprobs": found.logprobs}


class _Frozen:
    """One of them. With `model.reference_offload` its weights rest in host memory."""

    def __init__(self, config: Config, architecture: Architecture, path: Path) -> None:
        self.modules = build_chunks(config, architecture)
        for module in self.modules:
            module.requires_grad_(False).eval()
        load_weights(self.modules, architecture, path, *tensor_place())
        self._parameters = [parameter for module in self.modules for parameter in module.parameters()]
        self._together = forward_together(config)
        self._on_host = None
        if config.model.reference_offload:
            pin = torch.cuda.is_available()
            self._on_host = [p.data.cpu().pin_memory() if pin else p.data.clone() for p in self._parameters]
            self._leave_device()

    def run(self, micro_batches: list[MicroBatch], function: Callable, keep_head: bool = False) -> list:
        """`run_schedule` of the function. keep_head: on the device, afterwards."""
        self._reach_device()
        found = run_schedule(self.modules, micro_batches, function, together=self._together)
        self._leave_device(keep_head)
        return found

    @property
    def head_weight(self) -> torch.Tensor | None:
        last = self.modules[-1]
        return last.head_weight if last.post_process else None

    def _reach_device(self) -> None:
        if self._on_host is not None:
            for parameter, host in zip(self._parameters, self._on_host, strict=True):
                parameter.data = host.to(torch.cuda.current_device(), non_blocking=True)

    def _leave_device(self, keep_head: bool = False) -> None:
        # The weights never change: dropping the device's copy is all there is to do.
        if self._on_host is not None:
            head = self.head_weight if keep_head else None
            for parameter, host in zip(self._parameters, self._on_host, strict=True):
                if parameter is not head:
                    parameter.data = host
