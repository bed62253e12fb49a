"""vLLM's entry point into this package (`vllm.general_plugins`): every vLLM process calls `register` at its start."""

from __future__ import annotations


def register() -> None:
    """Make the `memfd` weight transport known to vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "memfd" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("memfd", "megatron_dgpo.rollout.transport", "MemfdEngine")
