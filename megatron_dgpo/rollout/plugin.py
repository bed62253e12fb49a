"""vLLM's entry point into this package (`vllm.general_plugins`): every vLLM process calls `register` at its start."""

from __future__ import annotations

import contextlib
import os

from megatron_dgpo import stop

BACKEND = "megatron_dgpo"
"""Its name among vLLM's: `--weight-transfer-config '{"backend": "megatron_dgpo"}'`."""


def register() -> None:
    """Make our weight transfer known to vLLM, and its CPU workers' shared memory vanish with them."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, "megatron_dgpo.rollout.transport", "ShardEngine")
    _unlink_joined_shared_memory()
    # vLLM starts processes, which may unblock them.
    stop.keep_blocked()


def _unlink_joined_shared_memory() -> None:
    """vLLM's CPU workers leave the memory that they reduce through behind. Once all have joined, it needs no name."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    join = _CPUSHMDistributed._init_cpu_shm

    def join_and_unlink(self) -> int:
        handle = join(self)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"/dev/shm/{self.group_name}_{self.communicator.rank_in_group}")
        return handle

    _CPUSHMDistributed._init_cpu_shm = join_and_unlink
