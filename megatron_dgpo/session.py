"""What one rank works with during a run: process groups, policy, tokenizer, metrics, servers."""

from __future__ import annotations

import contextlib
import functools
import json
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dgpo import checkpoint
from megatron_dgpo.batch import Batch
from megatron_dgpo.config import Config
from megatron_dgpo.data import load_tokenizer
from megatron_dgpo.experience import Experience
from megatron_dgpo.manifest import Origins, Progress, origins
from megatron_dgpo.metrics import MetricsLog
from megatron_dgpo.model import device
from megatron_dgpo.model.collectives import from_rank_0
from megatron_dgpo.model.parallel import initialize_parallel, is_replica_leader
from megatron_dgpo.model.policy import LossFunction, Policy, StepResult
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.sample import Prompt
from megatron_dgpo.weight_sync.sync import ServerSleep, WeightSync
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.export import export_hf
from megatron_dgpo.weights.load import load_weights

_MARGIN = timedelta(minutes=10)


def patience(config: Config) -> timedelta:
    """How long a rank waits for others: longer than any of them waits for a server.

    The other long waits are short of it: for one file of an export (5 GB), and for one rank's part of a checkpoint.
    """
    rollout = config.rollout
    return _MARGIN + timedelta(
        seconds=max(rollout.request_timeout_s, rollout.start_timeout_s, rollout.update_timeout_s)
    )


class TrainingStopped(RuntimeError):
    """Training cannot go on; says why."""


class Session(contextlib.ExitStack):
    """A context manager opened by every rank; its methods are collective over all ranks.

    command: "sft", "train" or "eval", which also names its metrics. optimizer_steps: length of the learning-rate
    schedule.
    """

    def __init__(self, config: Config, command: str, optimizer_steps: int = 1) -> None:
        super().__init__()
        self.config, self._command = config, command
        self.device = device.init_device()
        dist.init_process_group(device.backend(), timeout=patience(config))
        self.callback(dist.destroy_process_group)
        self.architecture = read_architecture(config.model.path)
        self.tokenizer = load_tokenizer(config.model.path)
        self.sleep = ServerSleep(config, lambda: self._engines)
        if command != "sft":
            # Before there are tensors on the ranks' GPUs: a server that starts counts all that disappears from its GPU
            # as its own, and does not start where the memory is taken.
            self.sleep.begin()
        initialize_parallel(config.parallel, config.run.seed, patience(config))
        self.replica = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.policy = Policy(config, self.architecture, optimizer_steps)
        load_weights(
            self.policy.modules,
            self.architecture,
            config.model.path,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        self.policy.reload_master_weights()
        self.log = self.enter_context(MetricsLog(config.run.dir, command, visible=dist.get_rank() == 0))
        self._checkpoints = config.run.dir / "checkpoints"
        self._skipped_in_a_row = 0

    # Checkpoints

    @functools.cached_property
    def _origins(self) -> Origins:
        return from_rank_0(lambda: origins(self.config, self._command))

    def restore(self) -> Progress:
        """The newest good checkpoint of this run, or its start."""
        found = checkpoint.load_newest(self._checkpoints, self.policy, self.architecture, self._origins)
        return found or Progress()

    def save(self, progress: Progress) -> None:
        keep = self.config.checkpoint.keep
        checkpoint.save(self._checkpoints, self.policy, self.architecture, progress, keep, self._origins)

    def export(self) -> Path:
        """Write the policy as a Hugging Face directory, `run.dir/hf`."""
        dtype = getattr(torch, self.config.model.dtype)
        return export_hf(
            self.policy.modules, self.architecture, self.config.model.path, self.config.run.dir / "hf", dtype
        )

    # Steps

    def step(self, batches: list[Batch], loss: LossFunction, more: bool = False) -> StepResult:
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

    # Batches

    def make_batch(self, prompts, responses, advantages=None, logprobs=None) -> Batch:
        """Padded so that sequence parallelism can split it, on this rank's device."""
        return Batch.from_sequences(
            prompts,
            responses,
            advantages,
            logprobs,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            multiple_of=self.config.parallel.tensor,
        ).to(self.device)

    # Servers

    @functools.cached_property
    def _engines(self) -> Engines:
        """This rank's own way to the servers; waits until they are up."""
        rollout = self.config.rollout
        engines = Engines(
            server.addresses(self.config),
            server.secret(),
            rollout.request_timeout_s,
            self._end_tokens(),
            rollout.update_timeout_s,
        )
        engines.wait_until_healthy(rollout.start_timeout_s)
        return engines

    @functools.cached_property
    def experience(self) -> Experience:
        """Engines and graders, on the first rank of each replica; waits until the servers are up."""
        speaks = is_replica_leader() and not self.config.rollout.replay
        return self.enter_context(Experience(self.config, self._engines if speaks else None, self.tokenizer))

    def weight_sync(self, problems: list[Prompt]) -> WeightSync:
        """What gives the policy's weights to the servers; waits until they are up. problems: for its canary."""
        speaks = dist.get_rank() == 0 and not self.config.rollout.replay
        engines = self._engines if speaks else None
        return self.enter_context(
            WeightSync(self.config, engines, self.sleep, self.policy, self.architecture, problems)
        )

    def _end_tokens(self) -> list[int]:
        """Whatever the model's own generation settings call an end."""
        found = {self.tokenizer.eos_token_id}
        path = self.config.model.path / "generation_config.json"
        if path.is_file():
            ends = json.loads(path.read_text()).get("eos_token_id") or []
            found |= set(ends if isinstance(ends, list) else [ends])
        return sorted(token for token in found if token is not None)
