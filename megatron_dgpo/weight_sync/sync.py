"""Runs in trainer ranks: what the loop knows of weight updates. A `push` ends when all servers that are left, its
members, serve the policy."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_dgpo.algorithm.objective import of_whole_responses
from megatron_dgpo.config import Config
from megatron_dgpo.layout import ServerLayout
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.model.collectives import broadcast_from_last_stage, from_rank_0
from megatron_dgpo.model.packed import pack_micro_batches
from megatron_dgpo.model.parallel import context_group, tensor_group
from megatron_dgpo.model.policy import Policy
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import EngineError, Engines
from megatron_dgpo.rollout.response import Prompt
from megatron_dgpo.statistics import token_statistics
from megatron_dgpo.weight_sync.canary import Canary
from megatron_dgpo.weight_sync.gathered import IpcSync
from megatron_dgpo.weight_sync.shards import ShardSync, StaleWeightsError
from megatron_dgpo.weights.export import FullTensors
from megatron_dgpo.weights.load import named_shards

_POLL_S = 1
# Longest that a server is busy which does not wait for anyone: with a step of its engine, on a crowded machine.
_BUSY_S = 30


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
    """A context manager, at whose exit trainer and servers let go of the memory or the group that they share.

    Servers come and go: one that ended is no member of the next push, one that was started in its place is. A push that
    loses a member is repeated without it, while the others stay paused, with their requests in flight. With NCCL only
    what is lost between transfers is survived: a member that is lost within one ends the ranks (`stream.send_buckets`),
    and the next start of the same command goes on from the checkpoint.
    """

    def __init__(
        self, config: Config, engines: Engines, sleep: ServerSleep, policy: Policy, problems: list[Prompt]
    ) -> None:
        """problems: data whose first prompts the canary asks about."""
        self._config, self._engines, self._sleep = config, engines, sleep
        self._policy, self._canary = policy, Canary(config)
        self._transport: ShardSync | IpcSync | None = None
        self._instances: dict[str, str] = {}
        # One for each pipeline stage: an interleaved schedule wants a multiple of them.
        count = max(2, config.parallel.pipeline)
        self.updates = 0
        """Pushes that have ended well."""
        self.under_way = False
        self._prompts = [problems[i % len(problems)].token_ids for i in range(count)]
        self._texts: list[list[int]] = []
        self._expected: list[list[float]] = []

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, failed: type | None, *_) -> None:
        self._disconnect(failed)

    def _disconnect(self, failed: type | None) -> None:
        """failed: if any, the servers are not asked to let go, too."""
        if self._transport:
            self._transport.__exit__(failed)
        self._transport = None

    @property
    def members(self) -> list[str]:
        """Addresses of the servers that the last push reached: version, checksums and canary were right. On every
        rank; none before the first push, and where rollouts are replayed."""
        return list(self._instances)

    def push(self, version: int) -> dict[str, float]:
        """Make the servers serve the policy's weights as `version`; raises StaleWeightsError unless they do.

        The first push waits for all servers. Later ones go to those that answer, and raise EngineError when these are
        fewer than `servers.min_serving` for `servers.start_timeout_s`. However it ends, no server that still answers
        stays paused.

        Returns how far their log-probs are from the policy's, and how many they are; nothing where rollouts are
        replayed and there are no servers. Collective over all ranks: a forward pass, some object broadcasts, and those
        of the transport, as often as it is tried.
        """
        if self._config.rollout.replay:
            return {}
        self.under_way = True
        try:
            self._sleep.wake("weights")
            if self._texts:
                self._expected = self._logprobs()
            found = from_rank_0(self._answering)
            with servers_resumed(self._engines):
                gap = self._until_given(version, found)
        finally:
            self.under_way = False
        self.updates += 1
        return {"weights/canary_logprob_gap": gap, "weights/servers": len(self.members)}

    def _until_given(self, version: int, found: dict[str, str]) -> float:
        """found: the servers to push to."""
        losses = 0
        while True:
            try:
                return self._give(version, found)
            except (EngineError, StaleWeightsError) as error:
                losses += 1
                if losses > len(self._engines.addresses):
                    raise
                self._disconnect(type(error))
                # Workers of the servers that are left may have waited for any rank: they are free to answer now.
                dist.barrier()
                # Not after this block: a name that keeps the error keeps the group, too, through its traceback.
                found = from_rank_0(functools.partial(self._answering, error))

    def _give(self, version: int, found: dict[str, str]) -> float:
        """One try, and the proof; returns the canary's gap."""
        engines = self._engines.only(list(found))
        if found != self._instances or not self._transport:
            self._disconnect(EngineError)
            self._instances = found
            self._transport = self._connected(engines)
        transport = self._transport
        transport.push(version)
        self._sleep.wake("kv_cache")
        if not self._texts:
            from_rank_0(engines.resume)
            self._prompts, self._texts = from_rank_0(lambda: self._canary.probes(engines, self._prompts))
            self._expected = self._logprobs()
        probes = [prompt + text for prompt, text in zip(self._prompts, self._texts, strict=True)]
        return from_rank_0(lambda: self._canary.check(engines, transport, version, probes, self._expected))

    def _answering(self, failure: Exception | None = None) -> dict[str, str]:
        """Rank 0: the servers to push to, as `Engines.instances`.

        failure: of a push; raised unless it cost a member.
        """
        settings, first = self._config.servers, not self._instances
        if first:
            self._engines.wait_until_healthy()
        deadline = time.monotonic() + settings.start_timeout_s
        # A worker may wait for a bucket of a transfer that has broken off.
        patience_s = _BUSY_S + (self._config.weight_sync.bucket_timeout_s if failure else 0)
        while True:
            found, failures = self._engines.instances(patience_s)
            if first and failures:
                raise failures[0]
            if failure and all(found.get(address) == instance for address, instance in self._instances.items()):
                raise failure
            failure = None
            for address in self._instances.keys() - found.keys():
                # One that hangs makes room for another.
                self._engines.end(address)
            if len(found) >= settings.min_serving:
                return found
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{len(found)} of {len(self._engines.addresses)} servers answer, fewer than servers.min_serving="
                    f"{settings.min_serving}, after servers.start_timeout_s={settings.start_timeout_s:g}: {failures[0]}"
                )
            time.sleep(_POLL_S)

    def _connected(self, engines: Engines) -> ShardSync | IpcSync:
        config, modules, architecture = self._config, self._policy.modules, self._policy.architecture
        if server.transport(config) == "ipc":
            source = FullTensors(modules, architecture, getattr(torch, server.dtype(config)))
            layout = ServerLayout.from_config(config.servers, 1)
            return IpcSync(engines, source, architecture, layout, config.weight_sync.bucket_bytes)
        return ShardSync(engines, dict(named_shards(modules)), architecture, self._policy.layout, config)

    def _logprobs(self) -> list[list[float]]:
        """The policy's log-probs of the texts' tokens, at temperature 1."""
        pairs = zip(self._prompts, self._texts, strict=True)
        sequences = [[TrainingSequence.of(prompt, text)] for prompt, text in pairs]
        micro_batches = pack_micro_batches(sequences, self._config.parallel)

        def logprobs(part: MicroBatch, hidden_states: torch.Tensor, head_weight: torch.Tensor) -> list[float]:
            mine = token_statistics(
                hidden_states,
                head_weight,
                part.targets,
                temperature=1.0,
                vocab_size=self._policy.architecture.vocab_size,
                tp_group=tensor_group(),
            ).logprobs
            return of_whole_responses(mine, part, context_group()).tolist()

        return broadcast_from_last_stage(self._policy.forward(micro_batches, logprobs))


@contextlib.contextmanager
def servers_resumed(engines: Engines) -> Iterator[None]:
    """Around all that follows a pause: whatever breaks it off, servers that still answer serve again.

    Rank 0 asks them; nothing happens elsewhere. The error stays the first one; what went wrong after it is a note.
    """
    try:
        yield
    except BaseException as error:
        for failure in engines.abandon_weight_update() if dist.get_rank() == 0 else []:
            error.add_note(f"after that, a server that was to serve again: {failure}")
        raise
