"""The one place that knows a CPU from a GPU.

Megatron-Core asks for CUDA devices by name. Without a GPU, `init_device` answers those requests with the CPU, so that
everything above runs the same code on gloo as on NCCL.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time

import torch
from torch.overrides import TorchFunctionMode


def backend() -> str:
    """Of torch.distributed: tensors on the device, and Python objects through gloo."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def init_device() -> torch.device:
    """Choose this rank's device, LOCAL_RANK's GPU or the CPU; safe to call more than once."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    _adapt_to_cpu()
    return torch.device("cpu")


def peak_memory_bytes() -> int:
    """Largest memory this rank has used: allocated on its GPU, or resident in its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mark() -> torch.cuda.Event | float:
    """A point in time for `seconds_between`: where the GPU has done all that it was given so far, or now."""
    if not torch.cuda.is_available():
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end) -> float:
    """Waits for the GPU to get to the later one of two `mark`s."""
    if not torch.cuda.is_available():
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class _CudaMeansCpu(TorchFunctionMode):
    """Turns `device="cuda"`, `.cuda()` and `.to("cuda")` into the CPU, and names CPU tensors' types as CUDA ones.

    Megatron tells master weights from others by type names such as "torch.cuda.FloatTensor".
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.")
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return function(*args, **kwargs)


def _is_cuda(device) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _as_on_host(tensor, as_numpy: bool = False, record_stream: bool = False):
    """Megatron's function of this purpose leaves counts that are on the host already as tensors."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _HostStream:
    """A CPU has one stream, and what is asked of it is done at once."""

    def __eq__(self, other) -> bool:
        return isinstance(other, _HostStream)

    def record_event(self):
        return self

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


_adapted = False


def _adapt_to_cpu() -> None:
    global _adapted
    if _adapted:
        return
    _adapted = True
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # A mixture of experts copies its token counts to the host beside the computation. Here they are there already.
    torch.cuda.Stream = torch.cuda.current_stream = _HostStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _as_on_host
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    _CudaMeansCpu().__enter__()
