"""Runs in trainer ranks: every vLLM worker gets its own shards from the ranks that hold them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_dgpo.config import Config
from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.model.collectives import all_gathered, from_rank_0
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import EngineError, Engines
from megatron_dgpo.weight_sync import shared_memory
from megatron_dgpo.weight_sync.stream import (
    CalledOffError,
    Meeting,
    call_off,
    join_group,
    open_meeting,
    send_buckets,
)
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.resharding import (
    Move,
    checksum,
    plan_buckets,
    vllm_parameters,
    vllm_shape,
    wrapped_sum,
)

# One vLLM parameter in so many is compared after each update, others after the next.
_SAMPLED = 16


class StaleWeightsError(RuntimeError):
    """A server does not hold the policy's weights; says which server, version and tensors."""


class ShardSync:
    """Gives every worker its own shards from the ranks that hold them; vLLM's workers do the rest.

    Workers on this machine read them in place where the trainer has them in shared memory; to others they travel bucket
    by bucket. All methods are collective over all ranks; rank 0 alone asks the engines. A context manager: at its exit
    both sides let go of the memory or the group that they share.
    """

    def __init__(
        self,
        engines: Engines,
        shards: dict[str, torch.Tensor],
        architecture: Architecture,
        trainer: Layout,
        config: Config,
    ) -> None:
        """shards: this rank's, by global Megatron name; their memory must stay theirs.

        Returns when all workers have attached to the memory, or joined the group of both sides. Workers may be of
        another one already, which they leave for this one.
        """
        settings, servers, rank = config.weight_sync, len(engines.addresses), dist.get_rank()
        self._engines, self._shards, self._dtype = engines, shards, getattr(torch, server.dtype(config))
        self._all, self._workers_per_server = settings.check_all, config.servers.tensor
        vllm = ServerLayout.from_config(config.servers, servers)
        self._target_shapes = {
            name: vllm_shape(architecture, parameter, vllm) for name, parameter in vllm_parameters(architecture).items()
        }
        numel = max(1, settings.bucket_bytes // self._dtype.itemsize)
        self._buckets = plan_buckets(architecture, trainer, vllm, numel, rank=rank)
        self._expected: dict[tuple[int, str], int] = {}
        self._first_worker, self._group = trainer.world_size, None
        self._timeout_s = settings.bucket_timeout_s
        info = {"trainer": dataclasses.asdict(trainer), "servers": servers, "bucket_numel": numel}
        if server.transport(config) == "memory":
            handles = {name: dataclasses.asdict(handle) for name, handle in shared_memory.share(shards).items()}
            self._addresses = {name: shard.data_ptr() for name, shard in shards.items()}
            info["memory"] = all_gathered(handles)
            with self._request(lambda: self._initialize(info)):
                pass
        else:
            self._addresses = {}
            stores = []

            def meet() -> Meeting:
                meeting, store = open_meeting(_own_address(engines.addresses), settings.timeout_s, self._timeout_s)
                # It stays with rank 0, which keeps it.
                stores.append(store)
                return meeting

            meeting = from_rank_0(meet)
            info["meeting"] = dataclasses.asdict(meeting)

            def initialize() -> None:
                try:
                    self._initialize(info)
                except EngineError as error:
                    # Ranks and other workers wait for members that will not come.
                    call_off(meeting, str(error))
                    raise

            try:
                with self._request(initialize):
                    self._group = join_group(meeting, rank, trainer.world_size + vllm.num_workers, *stores)
            except BaseException:
                self._leave_group()
                raise

    def __enter__(self) -> ShardSync:
        return self

    def __exit__(self, failed: type | None, *_) -> None:
        # After a failure servers may be gone, or busy with what failed.
        if dist.get_rank() == 0 and not failed:
            self._engines.release_weight_transfer()
        self._leave_group()

    def _leave_group(self) -> None:
        """Workers that wait for a bucket of this rank wait no longer."""
        if self._group:
            self._group.abort()
        self._group = None

    def _initialize(self, info: dict) -> None:
        self._engines.init_weight_transfer_engine([info | {"server": i} for i in range(info["servers"])])

    @torch.no_grad()
    def push(self, version: int) -> None:
        """Give every server the current weights as `version`; remembers checksums of a sample, or of all.

        The servers stay paused, as they do when it fails; it cannot be repeated then. Collectives: three object
        broadcasts and all-gathers; one message per bucket, rank and worker, or none.
        """
        self._check_in_place()
        sample = {name for i, name in enumerate(self._target_shapes) if self._all or (i + version) % _SAMPLED == 0}
        from_rank_0(lambda: self._engines.start_weight_update())
        shares = all_gathered(self._transfer(sample))
        self._expected = {}
        for key, value in (item for share in shares for item in share.items()):
            self._expected[key] = wrapped_sum(self._expected.get(key, 0), value)
        from_rank_0(lambda: self._engines.finish_weight_update(str(version)))

    def _transfer(self, sample: set[str]) -> dict[tuple[int, str], int]:
        """Give this rank's shards; checksums of its parts of each (worker, parameter) of the sample."""
        partial: dict[tuple[int, str], int] = {}

        def piece(move: Move) -> torch.Tensor:
            tensor = self._piece(move)
            if move.target in sample:
                value = checksum(tensor, self._target_shapes[move.target], move.target_start)
                key = move.worker, move.target
                partial[key] = wrapped_sum(partial.get(key, 0), value)
            return tensor

        with self._request(lambda: self._update({"checksums": sorted(sample)})):
            if self._group:
                send_buckets(self._group, self._buckets, piece, self._first_worker, self._timeout_s)
            else:
                for move in itertools.chain.from_iterable(self._buckets):
                    if move.target in sample:
                        piece(move)
        return partial

    def _update(self, info: dict) -> None:
        self._engines.update_weights(info)
        for address in self._engines.addresses:
            failures = [failure for failure in self._engines.call_workers(address, "update_failure") if failure]
            if failures:
                raise StaleWeightsError(f"{address}, {failures[0]}")

    def _check_in_place(self) -> None:
        """Workers would go on reading memory that a parameter has left. Any rank's error is everyone's."""
        moved = [name for name, address in self._addresses.items() if self._shards[name].data_ptr() != address]
        moved = [name for share in all_gathered(moved) for name in share]
        if moved:
            raise StaleWeightsError(f"{listed(moved)}: no longer in the memory that the servers read")

    def _piece(self, move: Move) -> torch.Tensor:
        return move.of_source(self._shards[move.source].detach()).to(self._dtype)

    @contextlib.contextmanager
    def _request(self, request: Callable):
        """Rank 0 makes the request, which ends only when all have done the body; any failure is raised on every rank.

        Collectives: one object all-gather.
        """
        failures = []
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(request) if dist.get_rank() == 0 else None
            try:
                yield
            except CalledOffError:
                # Rank 0 tells.
                pass
            except Exception as error:
                failures.append(f"trainer rank {dist.get_rank()}: {error}")
            # Not raised here: it would keep the body's error, and through its traceback the group.
            if answer and (failure := answer.exception()):
                failures.insert(0, str(failure))
        failures = [failure for share in all_gathered(failures) for failure in share]
        if failures:
            raise StaleWeightsError("the weight update broke off: " + "; ".join(failures))

    def differing_tensors(self, address: str) -> list[str]:
        """Rank 0 only: vLLM parameters of a server's last finished update whose bytes are not what was sent."""
        first = self._engines.addresses.index(address) * self._workers_per_server
        workers = self._engines.call_workers(address, "received_checksums")
        return sorted(
            {
                name
                for (worker, name), value in self._expected.items()
                if first <= worker < first + len(workers) and workers[worker - first].get(name) != value
            }
        )


def _own_address(servers: list[str]) -> str:
    """Where workers reach this machine: on loopback as long as all of them are here."""
    if all(urlsplit(address).hostname in ("127.0.0.1", "localhost") for address in servers):
        return "127.0.0.1"
    from vllm.utils.network_utils import get_ip

    return get_ip()


def listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
