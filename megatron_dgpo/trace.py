"""Where a training step's time goes: a trace by PyTorch's profiler, of the steps and rank that `run.trace_*` name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_dgpo.config import Run


@contextlib.contextmanager
def traced(settings: Run, step: int) -> Iterator[None]:
    """What happens inside goes to run.dir/traces/step_N.rank_R.json.gz, for Perfetto or chrome://tracing, with a range
    for each phase. Collectives: of a step that is traced a barrier, for writing it takes its time."""
    if step not in settings.trace_steps:
        yield
        return
    if dist.get_rank() != settings.trace_rank:
        yield
        dist.barrier()
        return
    device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *device]) as profiler:
        yield
    file = settings.dir / "traces" / f"step_{step:08d}.rank_{settings.trace_rank}.json.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))
    dist.barrier()


@contextlib.contextmanager
def named_range(name: str) -> Iterator[None]:
    """In traces, of Nsight Systems, too."""
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
