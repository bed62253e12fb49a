"""vLLM's entry point into this package (`vllm.general_plugins`): every vLLM process calls `register` at its start."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from multiprocessing import resource_tracker
from typing import Any

from megatron_dgpo import stop
from megatron_dgpo.weight_sync import BACKEND

_INSTANCE = secrets.token_hex(8)


def register() -> None:
    """Make our weight transfer known to vLLM, and its CPU workers' shared memory vanish with them.

    Nothing else is needed for a server to receive weights, but the backend's name and vLLM's dev mode, which opens the
    endpoints for it.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, "megatron_dgpo.weight_sync.receive", "ShardEngine")
    _extend_workers()
    _unlink_joined_shared_memory()
    _fork_on_cpu()
    # vLLM starts processes, which may unblock them.
    stop.keep_blocked()


class WorkerMethods:
    """What the trainer may call on a worker through /collective_rpc."""

    weight_transfer_engine: Any
    vllm_config: Any
    model_runner: Any
    _weight_update_active: bool

    def instance(self) -> str:
        """Another one in a server that was started in place of this one."""
        return _INSTANCE

    def received_checksums(self) -> dict[str, int]:
        return getattr(self.weight_transfer_engine, "checksums", {})

    def update_failure(self) -> str:
        """Why the last update broke off, or nothing."""
        return getattr(self.weight_transfer_engine, "failure", "")

    def held_sums(self) -> dict[str, int]:
        """Of each parameter that this worker computes with."""
        from megatron_dgpo.weight_sync.gathered import content_sum

        dtype = self.vllm_config.model_config.dtype
        parameters = self.model_runner.get_model().named_parameters()
        return {name: int(content_sum(parameter.detach().to(dtype))) for name, parameter in parameters}

    def abandon_update(self) -> None:
        """Leave an update that broke off, if any: to vLLM it is still under way."""
        from megatron_dgpo.weight_sync.receive import abandon_reload

        abandon_reload(self.model_runner.get_model())
        self._weight_update_active = False


def _extend_workers() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    for name, method in vars(WorkerMethods).items():
        if not name.startswith("_"):
            setattr(WorkerBase, name, method)


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


def _fork_on_cpu() -> None:
    """A server's other processes as copies of its first: each would spend 15 s of a core on loading all of vLLM anew.

    vLLM starts a CPU server's by `spawn`, for the libraries that it preloads in them: see server.py, `_with_openmp`.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_fork(cls, vllm_config) -> None:
        check(vllm_config)
        # Of all of them, then: vLLM kills an engine with its children, and would with one of the engine's own.
        resource_tracker.ensure_running()
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_fork)
    os.register_at_fork(after_in_child=_close_servers_port)


def _close_servers_port() -> None:
    """In a copy: with it open, connections to a server that is gone would wait instead of failing."""
    for name in os.listdir("/proc/self/fd"):
        # What is no socket raises, and stays open.
        with contextlib.suppress(OSError):
            held = socket.socket(fileno=int(name))
            if held.family in (socket.AF_INET, socket.AF_INET6) and held.type == socket.SOCK_STREAM:
                held.close()
            held.detach()
