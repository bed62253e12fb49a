"""What one rank works with during a run: process groups, policy, tokenizer, metrics, engines. Opened and closed once."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import AutoTokenizer

from megatron_dgpo import checkpoint
from megatron_dgpo.config import Config
from megatron_dgpo.metrics import MetricsLog
from megatron_dgpo.model import device
from megatron_dgpo.model.parallel import initialize_parallel
from megatron_dgpo.model.policy import Policy
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.export import export_hf
from megatron_dgpo.weights.load import load_weights

# Ranks wait for each other while one of them samples: their patience must outlast its own.
_MARGIN = timedelta(minutes=10)


class Session(contextlib.ExitStack):
    """A context manager, entered by every rank; its methods are collective over all ranks.

    name: of the work ("sft", "train", "eval"); its checkpoints and metrics lie under run.dir.
    optimizer_steps: length of the learning-rate schedule.
    """

    def __init__(self, config: Config, name: str, optimizer_steps: int) -> None:
        super().__init__()
        self.config = config
        self.device = device.init_device()
        patience = timedelta(seconds=config.rollout.request_timeout_s) + _MARGIN
        dist.init_process_group(device.backend(), timeout=patience)
        self.callback(dist.destroy_process_group)
        initialize_parallel(config.parallel, config.run.seed)
        self.architecture = read_architecture(config.model.path)
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        self.policy = Policy(config, self.architecture, optimizer_steps)
        load_weights(self.policy.modules, self.architecture, config.model.path)
        self.policy.reload_master_weights()
        self.checkpoints = config.run.dir / "checkpoints"
        self.progress = checkpoint.Progress()
        self.log = MetricsLog(config.run.dir, name)

    def restore(self) -> checkpoint.Progress:
        """The newest good checkpoint of this run, or the start."""
        return checkpoint.load_newest(self.checkpoints, self.policy, self.architecture) or checkpoint.Progress()

    def save(self, progress: checkpoint.Progress) -> Path:
        return checkpoint.save(
            self.checkpoints, self.policy, self.architecture, progress, self.config.checkpoint.keep
        )

    def export(self) -> Path:
        """Write the policy as a Hugging Face directory, `run.dir/hf`."""
        folder = self.config.run.dir / "hf"
        export_hf(self.policy.modules, self.architecture, self.config.model.path, folder)
        return folder
