"""What one rank of any command works with: process groups, policy, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_dgpo import checkpoint, machine
from megatron_dgpo.balance import sequence_cost, share_out
from megatron_dgpo.config import Config
from megatron_dgpo.config_file import config_text
from megatron_dgpo.json_file import replace_text
from megatron_dgpo.manifest import (
    Origins,
    Progress,
    changes,
    checkpoint_of,
    oldest_progress,
    origins,
    read_manifest,
    total_bytes,
)
from megatron_dgpo.metrics import MetricsLog
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.model import device
from megatron_dgpo.model.collectives import all_gathered, from_rank_0
from megatron_dgpo.model.parallel import initialize_parallel
from megatron_dgpo.model.policy import LossFunction, Policy, StepResult
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.run_record import record_start
from megatron_dgpo.throughput import Throughput
from megatron_dgpo.wandb_run import WandbRun
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.export import export_hf


def time_limits(config: Config) -> tuple[timedelta, timedelta]:
    """How long a rank waits for others in Megatron's groups, and in that of all ranks.

    In the latter they wait for whoever speaks with a server that starts or is updated, or writes the most of a
    checkpoint. For responses nobody waits long: the leaders give news of them every few seconds. The longest wait in
    the former that is in order is for one file of an export (5 GB).
    """
    limit = config.run.collective_timeout_s
    longest = limit + max(config.servers.start_timeout_s, config.weight_sync.timeout_s, config.checkpoint.timeout_s)
    return timedelta(seconds=limit), timedelta(seconds=longest)


@contextlib.contextmanager
def world(config: Config) -> Iterator[None]:
    """This rank has its device and has met the others, and nothing of the trainer is on any GPU yet."""
    device.init_device()
    limit = time_limits(config)[1]
    dist.init_process_group(device.backend(), timeout=limit, **_meeting_place(limit))
    try:
        yield
    except Exception as error:
        # Before the others' connections break, so that whoever started them can tell the culprit from its victims.
        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)
        raise
    finally:
        dist.destroy_process_group()


def _meeting_place(limit: timedelta) -> dict:
    """`init_process_group`'s way to the other ranks: a store that rank 0 keeps, which listens only where the launcher
    tells them to look for it. torchrun has its own; PyTorch's would listen on every interface."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    listener = socket.create_server((host, port)).detach() if rank == 0 else None
    store = dist.TCPStore(host, port, size, rank == 0, timeout=limit, master_listen_fd=listener)
    return {"store": store, "rank": rank, "world_size": size}


class TrainingStopped(RuntimeError):
    """Training cannot go on; says why."""


class Session(contextlib.ExitStack):
    """A context manager opened by every rank in a `world`; its methods are collective over all ranks.

    command: "sft", "train" or "eval", which also names its metrics. optimizer_steps: length of the learning-rate
    schedule.
    """

    def __init__(self, config: Config, command: str, optimizer_steps: int = 1) -> None:
        super().__init__()
        self.config, self._command = config, command
        self.architecture = read_architecture(config.model.path)
        self.sizes = Sizes(self.architecture)
        throughput, wandb = Throughput.of_run(config, command), WandbRun(config, command) if config.run.wandb else None
        self.log = self.enter_context(MetricsLog(config.run.dir, command, dist.get_rank() == 0, throughput, wandb))
        with self.log.startup(f"loading the policy from {config.model.path}"):
            initialize_parallel(config.parallel, config.run.seed, time_limits(config))
            self.policy = Policy(config, self.architecture, optimizer_steps)
            self.policy.load(config.model.path)
        if command != "eval" and dist.get_rank() == 0:
            config.run.dir.mkdir(parents=True, exist_ok=True)
            replace_text(config.run.dir / "config.yaml", config_text(config))
        self._checkpoints = config.run.dir / "checkpoints"
        self._writing: checkpoint.Writing | None = None
        self.writing_beside_s = 0.0
        """The longest that a checkpoint took which was written beside the steps; otherwise it is part of one."""
        self._skipped_in_a_row = 0

    # Checkpoints

    @functools.cached_property
    def _origins(self) -> Origins:
        return from_rank_0(lambda: origins(self.config, self._command))

    def begin(self, total: int) -> Progress:
        """Go on from the newest good checkpoint of this run, or its start, to step `total`; the log begins there.

        What ran is recorded, and the user is told of settings that are others than those of the checkpoint.
        """
        with self.log.startup("looking for a checkpoint"):
            found = checkpoint.load_newest(self._checkpoints, self.policy, self.architecture, self._origins)
        progress = found or Progress()
        hosts = dict(all_gathered((socket.gethostname(), machine.hardware())))
        self.log.start(progress.step, total)
        if dist.get_rank() == 0:
            record_start(self.config.run.dir, self.policy.layout, hosts, progress.step)
            manifest = found and read_manifest(checkpoint_of(self._checkpoints, found.step))
            if changed := changes(manifest or {}, self._origins):
                self.log.warn(f"resumed at step {progress.step} with other settings: {', '.join(changed)}")
        return progress

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint of the step that the log has got last, when the one before it is complete."""
        self.completed(wait=True)
        with self.log.phase("checkpoint"):
            self._writing = checkpoint.begin(
                self._checkpoints, self.policy, self.architecture, progress, self.config.checkpoint, self._origins
            )
        if self.config.checkpoint.asynchronous:
            self.log.saved({})

    def completed(self, wait: bool) -> Progress | None:
        """Where the oldest checkpoint stands that the run may go on from, if the one under way has become complete, and
        None otherwise; `wait`, or without checkpoint.asynchronous: until it has. The step that the log has got last
        gets its size."""
        if self._writing is None:
            return None
        with self.log.phase("checkpoint"):
            if not self._writing.is_complete(wait or not self.config.checkpoint.asynchronous):
                return None
            path, seconds = self._writing.path, self._writing.seconds
            self._writing = None
            if self.config.checkpoint.asynchronous:
                self.writing_beside_s = max(self.writing_beside_s, seconds)
        keep = self.config.checkpoint.keep
        size, oldest = from_rank_0(lambda: (total_bytes(read_manifest(path)), oldest_progress(self._checkpoints, keep)))
        self.log.saved({"memory/checkpoint_gib": size / 2**30})
        return oldest

    def export(self) -> Path:
        """Write the policy as a Hugging Face directory, `run.dir/hf`."""
        dtype = getattr(torch, self.config.model.dtype)
        return export_hf(
            self.policy.modules, self.architecture, self.config.model.path, self.config.run.dir / "hf", dtype
        )

    # Steps

    def shares(self, sequences: list[TrainingSequence]) -> list[list[list[TrainingSequence]]]:
        """[replica][micro-batch][sequence] of one optimizer step on them. Collectives: none."""
        layout, cost = self.policy.layout, sequence_cost(self.architecture)
        budget = self.config.batch.micro_batch_tokens * layout.context
        return share_out(sequences, cost, layout.data, budget, layout.micro_batches_multiple)

    def forward_flops(self, sequences: Iterable[TrainingSequence]) -> int:
        """Operations that one forward pass over them needs, however they are packed and wherever they are."""
        return sum(self.sizes.forward_flops(len(sequence), len(sequence.response)) for sequence in sequences)

    def step(self, batches: list[MicroBatch], loss: LossFunction, more: bool = False) -> StepResult:
        """Policy.step; tells the user of a skipped one, and raises TrainingStopped when too many follow each other."""
        result = self.policy.step(batches, loss, more)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            self.log.warn("an optimizer step was skipped: its loss or gradient is not finite")
        if self._skipped_in_a_row >= self.config.optimizer.max_skipped_steps:
            raise TrainingStopped(
                f"{self._skipped_in_a_row} optimizer steps in a row had a non-finite loss or gradient "
                "(optimizer.max_skipped_steps): lower optimizer.lr, or look at the newest samples"
            )
        return result
