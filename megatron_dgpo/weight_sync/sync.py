"""Runs in trainer ranks: what the loop knows of weight updates. A `push` ends when every server serves the policy."""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.distributed as dist

from megatron_dgpo.batch import Batch
from megatron_dgpo.config import Config
from megatron_dgpo.model.collectives import broadcast_from_last_stage, from_rank_0
from megatron_dgpo.model.parallel import tensor_group
from megatron_dgpo.model.policy import Policy
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.response import Prompt
from megatron_dgpo.statistics import token_statistics
from megatron_dgpo.weight_sync.canary import Canary
from megatron_dgpo.weight_sync.gathered import IpcSync
from megatron_dgpo.weight_sync.shards import ShardSync
from megatron_dgpo.weights.export import FullTensors
from megatron_dgpo.weights.load import named_shards


class ServerSleep:
    """With `servers.sleep` the servers' GPUs are the trainer's between a rollout and the next push.

    All methods are collective over all ranks.
    """

    def __init__(self, config: Config, engines: Engines) -> None:
        self._config, self._engines = config, engines
        self._asleep = False

    def begin(self) -> None:
        """First before there are tensors on the ranks' GPUs: a server that starts counts all that disappears from its
        GPU as its own, and does not start where the memory is taken.

        Collectives: a barrier, for the replicas that still sample, and one object broadcast."""
        if self._config.servers.sleep and not self._config.rollout.replay:
            dist.barrier()
            from_rank_0(self._fall_asleep)
            self._asleep = True

    def _fall_asleep(self) -> None:
        self._engines.wait_until_healthy()
        self._engines.sleep()

    def wake(self, what: str) -> None:
        """what: vLLM's tag, weights or kv_cache, of what gets its memory back. Collectives: as `begin`, if asleep."""
        if self._asleep:
            # What the trainer's allocator merely keeps, the servers need.
            torch.cuda.empty_cache()
            dist.barrier()
            from_rank_0(lambda: self._engines.wake_up(what))
        self._asleep = self._asleep and what == "weights"


class WeightSync:
    """A context manager, at whose exit trainer and servers let go of the memory or the group that they share."""

    def __init__(
        self, config: Config, engines: Engines, sleep: ServerSleep, policy: Policy, problems: list[Prompt]
    ) -> None:
        """problems: data whose first prompts the canary asks about."""
        self._config, self._engines, self._sleep = config, engines, sleep
        self._policy, self._canary = policy, Canary(config)
        self._shared = contextlib.ExitStack()
        # One for each pipeline stage: an interleaved schedule wants a multiple of them.
        count = max(2, config.parallel.pipeline)
        self._prompts = [problems[i % len(problems)].token_ids for i in range(count)]

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, *failure) -> None:
        self._shared.__exit__(*failure)

    def push(self, version: int) -> dict[str, float]:
        """Make the servers serve the policy's weights as `version`; raises StaleWeightsError unless they do.

        Returns how far their log-probs are from the policy's; nothing where rollouts are replayed and there are no
        servers. Collective over all ranks: those of the transport, a forward pass, and some object broadcasts.
        """
        if self._config.rollout.replay:
            return {}
        self._sleep.wake("weights")
        self._transport.push(version)
        self._sleep.wake("kv_cache")
        prompts, texts = from_rank_0(lambda: self._canary.probes(self._engines, self._prompts))
        expected = self._logprobs(prompts, texts)
        probes = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        gap = from_rank_0(lambda: self._canary.check(self._engines, self._transport, version, probes, expected))
        return {"weights/canary_logprob_gap": gap}

    @functools.cached_property
    def _transport(self) -> ShardSync | IpcSync:
        """Made with the first push, when servers that slept have their memory again; waits until they are up."""
        config, modules, architecture = self._config, self._policy.modules, self._policy.architecture
        from_rank_0(self._engines.wait_until_healthy)
        if server.transport(config) == "ipc":
            source = FullTensors(modules, architecture, getattr(torch, server.dtype(config)))
            tensor, bucket = config.servers.tensor, config.weight_sync.bucket_bytes
            return self._shared.enter_context(IpcSync(self._engines, source, architecture, tensor, bucket))
        shards = dict(named_shards(modules))
        return self._shared.enter_context(ShardSync(self._engines, shards, architecture, self._policy.layout, config))

    def _logprobs(self, prompts: list[list[int]], texts: list[list[int]]) -> list[list[float]]:
        """The policy's log-probs of the texts' tokens, at temperature 1."""
        batch = Batch.from_sequences(prompts, texts, multiple_of=self._config.parallel.tensor)
        batch = batch.to(torch.cuda.current_device())

        def logprobs(part: Batch, hidden_states: torch.Tensor, head_weight: torch.Tensor) -> list[float]:
            return token_statistics(
                hidden_states,
                head_weight,
                part.targets,
                temperature=1.0,
                vocab_size=self._policy.architecture.vocab_size,
                tp_group=tensor_group(),
            ).logprobs.tolist()

        return broadcast_from_last_stage(self._policy.forward(batch.split(1), logprobs))
