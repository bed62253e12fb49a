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
from megatron_dgpo.manifest import Progress
from megatron_dgpo.metrics import MetricsLog
from megatron_dgpo.model import device
from megatron_dgpo.model.parallel import (
    broadcast_from_last_stage,
    initialize_parallel,
    is_replica_leader,
    trainer_layout,
)
from megatron_dgpo.model.policy import Policy
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.ipc_sync import IpcSync
from megatron_dgpo.rollout.weight_sync import ShardSync, check_servers, from_rank_0
from megatron_dgpo.statistics import token_statistics
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.export import FullTensors, export_hf
from megatron_dgpo.weights.load import load_weights, named_shards

# Ranks wait for each other while one of them samples: their patience must outlast its own.
_MARGIN = timedelta(minutes=10)
_PROBE_TOKENS = 24
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Session(contextlib.ExitStack):
    """A context manager opened by every rank; its methods are collective over all ranks.

    name: of the work ("sft", "train", "eval"), which names its metrics. optimizer_steps: length of the learning-rate
    schedule.
    """

    def __init__(self, config: Config, name: str, optimizer_steps: int = 1) -> None:
        super().__init__()
        self.config = config
        self.device = device.init_device()
        patience = timedelta(seconds=config.rollout.request_timeout_s) + _MARGIN
        dist.init_process_group(device.backend(), timeout=patience)
        self.callback(dist.destroy_process_group)
        initialize_parallel(config.parallel, config.run.seed)
        self.replica = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.architecture = read_architecture(config.model.path)
        self.tokenizer = load_tokenizer(config.model.path)
        self.policy = Policy(config, self.architecture, optimizer_steps)
        load_weights(
            self.policy.modules,
            self.architecture,
            config.model.path,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        self.policy.reload_master_weights()
        self.log = self.enter_context(MetricsLog(config.run.dir, name, visible=dist.get_rank() == 0))
        self._checkpoints = config.run.dir / "checkpoints"
        self._asleep = False

    # Checkpoints

    def restore(self) -> Progress:
        """The newest good checkpoint of this run, or its start."""
        return checkpoint.load_newest(self._checkpoints, self.policy, self.architecture) or Progress()

    def save(self, progress: Progress) -> None:
        checkpoint.save(self._checkpoints, self.policy, self.architecture, progress, self.config.checkpoint.keep)

    def export(self) -> Path:
        """Write the policy as a Hugging Face directory, `run.dir/hf`."""
        dtype = getattr(torch, self.config.model.dtype)
        return export_hf(
            self.policy.modules, self.architecture, self.config.model.path, self.config.run.dir / "hf", dtype
        )

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
    def experience(self) -> Experience:
        """Engines and graders, on the first rank of each replica; waits until the servers are up."""
        engines = None
        if is_replica_leader() and not self.config.rollout.replay:
            rollout = self.config.rollout
            engines = Engines(
                server.addresses(self.config),
                server.secret(),
                rollout.request_timeout_s,
                self._end_tokens(),
                rollout.update_timeout_s,
            )
            engines.wait_until_healthy(rollout.start_timeout_s)
        return self.enter_context(Experience(self.config, engines, self.tokenizer))

    @functools.cached_property
    def _weight_sync(self) -> ShardSync | IpcSync:
        engines = self.experience.engines if dist.get_rank() == 0 else None
        modules, dtype = self.policy.modules, getattr(torch, server.dtype(self.config))
        kind = server.transport(self.config)
        if kind == "ipc":
            source = FullTensors(modules, self.architecture, dtype)
            return self.enter_context(IpcSync(engines, source, self.architecture, self.config.rollout))
        shards, layout = dict(named_shards(modules)), trainer_layout(self.config.parallel)
        in_place = kind == "memory"
        sync = ShardSync(engines, shards, self.architecture, layout, self.config.rollout, dtype, in_place)
        return self.enter_context(sync)

    def rest_servers(self) -> None:
        """With rollout.sleep: until the next push the servers' GPUs are the trainer's.

        Collectives: a barrier, for the replicas that still sample, and one object broadcast.
        """
        if self.config.rollout.sleep and not self.config.rollout.replay:
            dist.barrier()
            from_rank_0(lambda: self.experience.engines.sleep())
            self._asleep = True

    def _wake_servers(self, what: str) -> None:
        if self._asleep:
            # What the trainer's allocator merely keeps, the servers need.
            torch.cuda.empty_cache()
            dist.barrier()
            from_rank_0(lambda: self.experience.engines.wake_up(what))

    def push_weights(self, version: int) -> dict[str, float]:
        """Make the servers serve the policy's weights as `version`, and stop the run unless they do."""
        if self.config.rollout.replay:
            return {}
        self._wake_servers("weights")
        self._weight_sync.push(version)
        self._wake_servers("kv_cache")
        self._asleep = False
        probes, expected = self._probe()
        tolerance = self.config.rollout.canary_tolerance or _TOLERANCE[server.dtype(self.config)]
        gap = from_rank_0(
            lambda: check_servers(self.experience.engines, self._weight_sync, version, probes, expected, tolerance)
        )
        return {"weights/canary_logprob_gap": gap}

    def _probe(self) -> tuple[list[list[int]], list[list[float]]]:
        """Fixed random token sequences and the policy's log-probs of all but their first tokens, at temperature 1."""
        size = self.architecture.vocab_size
        generator = torch.Generator().manual_seed(0)
        length = min(_PROBE_TOKENS, self.config.rollout.context_tokens - 1)
        # One for each pipeline stage: an interleaved schedule wants a multiple of them.
        count = max(2, self.config.parallel.pipeline)
        probes = torch.randint(0, size, (count, length), generator=generator).tolist()
        batch = self.make_batch([p[:1] for p in probes], [p[1:] for p in probes])

        def logprobs(batch, index, hidden_states, head_weight):
            return token_statistics(
                hidden_states,
                head_weight,
                batch.targets,
                temperature=1.0,
                vocab_size=size,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
            ).logprobs.tolist()

        return probes, broadcast_from_last_stage(self.policy.forward(batch.split(1), logprobs))

    def _end_tokens(self) -> list[int]:
        """Whatever the model's own generation settings call an end."""
        found = {self.tokenizer.eos_token_id}
        path = self.config.model.path / "generation_config.json"
        if path.is_file():
            ends = json.loads(path.read_text()).get("eos_token_id") or []
            found |= set(ends if isinstance(ends, list) else [ends])
        return sorted(token for token in found if token is not None)
