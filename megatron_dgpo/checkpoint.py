"""Checkpoints: Megatron's distributed format, complete or absent, the newest few kept.

A checkpoint is a folder `step_N`, a `complete_folder` whose manifest lists every other file in it with size and CRC-32.
A folder that lacks a manifest, or whose files do not match it, is passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dgpo.complete_folder import complete_folder, partial_folder
from megatron_dgpo.config import Checkpoint
from megatron_dgpo.errors import UsageError
from megatron_dgpo.manifest import (
    Origins,
    Progress,
    candidates,
    check_architecture,
    check_origins,
    checkpoint_of,
    crc32_of,
    read_manifest,
    step_of,
    total_bytes,
    write_manifest,
    wrong_sizes,
)
from megatron_dgpo.model.collectives import all_gathered, from_rank_0
from megatron_dgpo.model.parallel import copies_group
from megatron_dgpo.model.policy import Policy
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.dcp_metadata import only_data

# The optimizer's shards can be read back at any tensor, pipeline and data parallel size. For that the shards of all
# replicas are put together: in the host memory of the first one, not on the GPU of every rank, where the gathered
# buffer and NCCL's copy of it take 10 bytes for each parameter that the rank holds (35 GiB for 7B on four GPUs).
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_LOOK_S = 0.1
# What the schedule and Adam's loop count, and which tensors are whose; all else in a group of parameters is a setting.
_NOT_SETTINGS = ("params", "step")

logger = logging.getLogger(__name__)


class Writing:
    """A checkpoint under way, as `begin` returns it. Its methods are collective over all ranks."""

    def __init__(self, folder: Path, step: int, settings: Checkpoint, manifest: dict) -> None:
        self._folder, self._settings, self._manifest = folder, settings, manifest
        self.path = checkpoint_of(folder, step)
        self._leads = dist.get_rank() == 0
        self._queue = AsyncCallsQueue()
        self._began = time.monotonic()
        self._copy: Any = None
        self._block = contextlib.ExitStack()
        from_rank_0(lambda: _check_room(folder))
        target = complete_folder(self.path) if self._leads else contextlib.nullcontext(partial_folder(self.path))
        self._partial = self._block.enter_context(target)
        dist.barrier()

    def start(self, state: dict) -> None:
        """The tensors may change when it returns: a process of its own writes them, from a copy (on a CPU, its own
        memory as it is forked)."""
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), copies_group())
        request = dist_checkpointing.save(state, str(self._partial), strategy, async_sharded_save=True)
        if self._settings.asynchronous:
            self._queue.schedule_async_request(request._replace(preload_fn=lambda: self._kept(request.preload_fn)))
        else:
            request.execute_sync()

    def _kept(self, copy: Callable[[], Any]) -> Any:
        """A GPU's tensors are copied to pinned memory, whose pages the writer shares with this process, where PyTorch
        would give them to the next that asks."""
        self._copy = copy()
        return self._copy

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def is_complete(self, wait: bool) -> bool:
        """Whether it is at `path`, where it comes as soon as all ranks have written; `wait`: until then. Raises what
        failed in the writing, and TimeoutError after `settings.timeout_s`. What they do not keep goes."""
        while self._queue.get_num_unfinalized_calls():
            if self._queue.maybe_finalize_async_calls(blocking=False):
                break
            if self.seconds > self._settings.timeout_s:
                raise TimeoutError(
                    f"{self.path} was not written within {self._settings.timeout_s:g} s (checkpoint.timeout_s)"
                )
            if not wait:
                return False
            time.sleep(_LOOK_S)
        self._copy = None
        checksums = _checksums(self._partial)
        if self._leads:
            write_manifest(self._partial, self._manifest | {"files": checksums})
            self._block.close()
            for old in candidates(self._folder)[self._settings.keep :]:
                if not (self._settings.keep_every and step_of(old) % self._settings.keep_every == 0):
                    shutil.rmtree(old)
        dist.barrier()
        return True


def begin(
    folder: Path,
    policy: Policy,
    architecture: Architecture,
    progress: Progress,
    settings: Checkpoint,
    origins: Origins | None = None,
) -> Writing:
    """Begin to write `folder/step_N`. Collective over all ranks.

    With `settings.asynchronous` training may go on meanwhile. Replicas share the writing of what they all hold; who has
    written much of the optimizer writes less of the weights.

    origins: of the run, which what continues it is compared with. Raises UsageError, and writes nothing, where the disk
    has no room for what the last checkpoint took.
    """
    manifest = {
        "progress": dataclasses.asdict(progress),
        "architecture": dataclasses.asdict(architecture),
        "layout": dataclasses.asdict(policy.layout),
        "origins": origins or {},
    }
    writing = Writing(folder, progress.step, settings, manifest)
    state = _model_state(policy)
    state["optimizer"] = policy.optimizer.sharded_state_dict(state, metadata=_METADATA)
    state["scheduler"] = policy.scheduler.state_dict()
    state["rng"] = _sharded_rng(_rng_state())
    writing.start(state)
    return writing


def _check_room(folder: Path) -> None:
    manifest = next((found for path in candidates(folder) if (found := read_manifest(path))), None)
    needed = total_bytes(manifest)
    total, _, free = shutil.disk_usage(folder) if needed else (0, 0, 0)
    # Some network file systems do not tell.
    if total and free < needed:
        raise UsageError(
            f"{folder} has {free / 2**30:.1f} GiB free, and the last checkpoint took {needed / 2**30:.1f}: make room "
            "or lower checkpoint.keep; the same command continues from the last checkpoint"
        )


def load_newest(
    folder: Path, policy: Policy, architecture: Architecture, origins: Origins | None = None
) -> Progress | None:
    """Restore the newest undamaged checkpoint in `folder`, or return None where there is none.

    Collective over all ranks. Raises UsageError for a checkpoint of another model, or of a run with other `origins`.
    """
    # Rank 0's view, so that no rank sees another list of folders.
    for candidate in from_rank_0(lambda: _tidied(folder)):
        manifest = read_manifest(candidate)
        problem = _damage(candidate, manifest) if manifest else "its manifest is missing or unreadable"
        if manifest is None or problem:
            logger.warning("%s is passed over: %s", candidate, problem)
            continue
        check_architecture(candidate, manifest, architecture)
        check_origins(candidate, manifest, origins or {})
        load(candidate, policy)
        return Progress(**manifest["progress"])
    return None


def _tidied(folder: Path) -> list[Path]:
    """The candidates; what a save that was cut off has left beside them goes: by `run_lock` it is nobody's."""
    for left in folder.glob(partial_folder(folder / "step_*").name):
        shutil.rmtree(left, ignore_errors=True)
    return candidates(folder)


def load(path: Path, policy: Policy, weights_only: bool = False) -> None:
    """Restore the policy's weights and, unless `weights_only`, optimizer, schedule's step and RNG. Collective.

    Learning rates, weight decay, Adam's constants and the schedule stay as this run has set them. Replicas share the
    reading and send each other the tensors, one at a time, through GPU memory.
    """
    state = _model_state(policy)
    if not weights_only:
        _adapt_to_torch_adam(policy)
        state["optimizer"] = policy.optimizer.sharded_state_dict(state, is_loading=True, metadata=_METADATA)
        manifest = read_manifest(path)
        if manifest and manifest.get("layout") == dataclasses.asdict(policy.layout):
            state["rng"] = _sharded_rng(_rng_state())
        else:
            logger.warning("%s was written at another layout: random number generators start anew", path)
    with only_data(path, look=dist.get_rank() == 0):
        strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), copies_group())
        loaded = dist_checkpointing.load(state, str(path), strategy)
    for name, chunk in _named_chunks(policy):
        chunk.load_state_dict(loaded[name])
    if not weights_only:
        with _own_settings(policy, loaded["optimizer"]):
            policy.optimizer.load_state_dict(loaded["optimizer"])
        _separate_step_counts(policy)
        policy.scheduler.load_state_dict(loaded["scheduler"])
        if "rng" in loaded:
            _restore_rng(loaded["rng"])
    else:
        # Master weights are copies: without this the next step would start from the old ones.
        policy.optimizer.reload_model_params()


@contextlib.contextmanager
def _own_settings(policy: Policy, loaded: dict):
    """While `loaded` is: Megatron keeps learning rates and the like in a checkpoint, too, and takes them.

    From 0.19 on it also finds each group's counterpart there by its rates, which all groups have in common.
    """
    rates = {name: policy.optimizer.param_groups[0][name] for name in ("max_lr", "min_lr")}
    for group in _groups_in(loaded):
        group.update(rates)
    before = [
        {name: value for name, value in group.items() if name not in _NOT_SETTINGS}
        for group in policy.optimizer.param_groups
    ]
    yield
    for group, settings in zip(policy.optimizer.param_groups, before, strict=True):
        group.update(settings)


def _groups_in(state: dict) -> Iterator[dict]:
    """Of parameters, in the state of an optimizer or of several that are chained."""
    for name, value in state.items():
        if name == "param_groups":
            yield from value
        elif isinstance(value, dict):
            yield from _groups_in(value)


def _named_chunks(policy: Policy) -> list[tuple[str, torch.nn.Module]]:
    """Megatron's names: `model`, or `model0`, `model1`, … for an interleaved pipeline."""
    chunks = policy.modules
    return [("model", chunks[0])] if len(chunks) == 1 else [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _model_state(policy: Policy) -> dict:
    return {name: chunk.sharded_state_dict() for name, chunk in _named_chunks(policy)}


def _adapt_to_torch_adam(policy: Policy) -> None:
    """Let Megatron's distributed optimizer load into PyTorch's Adam, which is in use without TE and Apex.

    That Adam makes its state at the first step, and keeps the step count among its tensors: Megatron 0.16 asks for the
    former before, and does not expect the latter.
    """
    for distributed, adam in _distributed_torch_adams(policy):
        for parameter in (p for group in adam.param_groups for p in group["params"] if not adam.state[p]):
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        distributed._set_main_param_and_optimizer_states = functools.partial(_copy_states, distributed)


def _separate_step_counts(policy: Policy) -> None:
    """Megatron loads one tensor as every parameter's step count: each parameter's step would count for all."""
    for _, adam in _distributed_torch_adams(policy):
        for state in adam.state.values():
            state["step"] = state["step"].clone()


def _distributed_torch_adams(policy: Policy) -> list[tuple[DistributedOptimizer, torch.optim.Adam]]:
    chained = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    return [
        (optimizer, optimizer.optimizer)
        for optimizer in chained
        if isinstance(optimizer, DistributedOptimizer) and isinstance(optimizer.optimizer, torch.optim.Adam)
    ]


def _copy_states(optimizer: DistributedOptimizer, model_param: torch.Tensor, tensors: dict) -> None:
    group, place = optimizer.model_param_group_index_map[model_param]
    main_param = optimizer.optimizer.param_groups[group]["params"][place]
    targets = {"param": main_param, **optimizer.optimizer.state[main_param]}
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)


def _rng_state() -> dict:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _sharded_rng(state: dict) -> ShardedObject:
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))


def _checksums(path: Path) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]}, each rank reading its share. Collective."""
    files = from_rank_0(lambda: [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()])
    mine = files[dist.get_rank() :: dist.get_world_size()]
    shares = all_gathered({name: [(path / name).stat().st_size, crc32_of(path / name)] for name in mine})
    return {name: entry for share in shares for name, entry in share.items()}


def _damage(path: Path, manifest: dict) -> str | None:
    """What is wrong with the checkpoint, the same answer on every rank. Collective."""
    wrong = wrong_sizes(path, manifest)
    if not wrong:
        names = sorted(manifest["files"])[dist.get_rank() :: dist.get_world_size()]
        wrong = [name for name in names if crc32_of(path / name) != manifest["files"][name][1]]
    wrong = sorted({name for share in all_gathered(wrong) for name in share})
    return f"{', '.join(wrong)} missing or damaged" if wrong else None
