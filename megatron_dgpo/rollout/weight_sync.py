"""From updated policy to updated servers, and the proof that they agree."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_dgpo.config import Rollout
from megatron_dgpo.rollout import shared_weights
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.shard_stream import Meeting, join_group, open_meeting, send_buckets
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.resharding import (
    Move,
    TrainerLayout,
    VllmLayout,
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
    by bucket. All methods are collective over all ranks. engines: on global rank 0, None elsewhere.
    """

    def __init__(
        self,
        engines: Engines | None,
        shards: dict[str, torch.Tensor],
        architecture: Architecture,
        trainer: TrainerLayout,
        rollout: Rollout,
        dtype: torch.dtype,
        in_place: bool,
    ) -> None:
        """shards: this rank's, by global Megatron name; their memory must stay theirs. dtype: of the servers' weights.

        Returns when all workers have attached to the memory, or joined the group of both sides.
        """
        self._engines, self._shards, self._dtype = engines, shards, dtype
        self._all, self._workers_per_server = rollout.check_all_weights, rollout.tensor
        servers, rank = from_rank_0(lambda: len(engines.addresses)), dist.get_rank()
        vllm = VllmLayout(rollout.tensor, servers, rollout.expert_parallel)
        self._target_shapes = {
            name: vllm_shape(architecture, parameter, vllm) for name, parameter in vllm_parameters(architecture).items()
        }
        numel = max(1, rollout.bucket_bytes // dtype.itemsize)
        self._buckets = plan_buckets(architecture, trainer, vllm, numel, rank=rank)
        self._expected: dict[tuple[int, str], int] = {}
        self._first_worker, self._group = trainer.world_size, None
        info = {"trainer": dataclasses.asdict(trainer), "servers": servers, "bucket_numel": numel}
        if in_place:
            handles = {name: dataclasses.asdict(handle) for name, handle in shared_weights.share(shards).items()}
            self._addresses = {name: shard.data_ptr() for name, shard in shards.items()}
            info["memory"] = _all_gather(handles)
            with self._request(lambda: self._initialize(info)):
                pass
        else:
            self._addresses = {}
            stores = []

            def meet() -> Meeting:
                meeting, store = open_meeting(_own_address(engines.addresses), rollout.transfer_timeout_s)
                # It stays with rank 0, which keeps it.
                stores.append(store)
                return meeting

            meeting = from_rank_0(meet)
            info["meeting"] = dataclasses.asdict(meeting)
            with self._request(lambda: self._initialize(info)):
                self._group = join_group(meeting, rank, trainer.world_size + vllm.num_workers, *stores)

    def _initialize(self, info: dict) -> None:
        self._engines.init_weight_transfer_engine([info | {"server": i} for i in range(info["servers"])])

    @torch.no_grad()
    def push(self, version: int) -> None:
        """Make every server serve the current weights as `version`; remembers checksums of a sample, or of all.

        Collectives: three object broadcasts and all-gathers; one message per bucket, rank and worker, or none.
        """
        self._check_in_place()
        sample = {name for i, name in enumerate(self._target_shapes) if self._all or (i + version) % _SAMPLED == 0}
        from_rank_0(self._start)
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
                send_buckets(self._group, self._buckets, piece, self._first_worker)
            else:
                for move in itertools.chain.from_iterable(self._buckets):
                    if move.target in sample:
                        piece(move)
        self._expected = {}
        for key, value in (item for share in _all_gather(partial) for item in share.items()):
            self._expected[key] = wrapped_sum(self._expected.get(key, 0), value)
        from_rank_0(lambda: self._engines.finish_weight_update(str(version)))

    def _start(self) -> None:
        for address in self._engines.addresses:
            self._engines.call_workers(address, "abandon_update")
        self._engines.start_weight_update()

    def _update(self, info: dict) -> None:
        self._engines.update_weights(info)
        for address in self._engines.addresses:
            failures = [failure for failure in self._engines.call_workers(address, "update_failure") if failure]
            if failures:
                raise StaleWeightsError(f"{address}, {failures[0]}")

    def _check_in_place(self) -> None:
        """Workers would go on reading memory that a parameter has left. Any rank's error is everyone's."""
        moved = [name for name, address in self._addresses.items() if self._shards[name].data_ptr() != address]
        moved = [name for share in _all_gather(moved) for name in share]
        if moved:
            raise StaleWeightsError(f"{_listed(moved)}: no longer in the memory that the servers read")

    def _piece(self, move: Move) -> torch.Tensor:
        return move.of_source(self._shards[move.source].detach()).to(self._dtype)

    @contextlib.contextmanager
    def _request(self, request: Callable):
        """Rank 0 makes the request, which ends only when all have done the body; any failure is raised on every rank.

        Collectives: one object all-gather.
        """
        failures = []
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(request) if self._engines else None
            try:
                yield
            except Exception as error:
                failures.append(f"trainer rank {dist.get_rank()}: {error}")
            try:
                if answer:
                    answer.result()
            except Exception as error:
                failures.insert(0, str(error))
        failures = [failure for share in _all_gather(failures) for failure in share]
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


class IpcSync:
    """Pushes gathered weights with vLLM's own `ipc` engine, for servers on the ranks' own GPUs.

    Written from vLLM 0.32's sources and not yet run: no machine with a GPU was at hand.
    """

    def __init__(self, engines: Engines | None, source) -> None:
        """source: a vLLM WeightSource, the same on every rank."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        self._engines, self._version = engines, 0
        info = IPCTrainerInitInfo(rank=dist.get_rank())
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self, source=source)

    def push(self, version: int) -> None:
        self._version = version
        self._trainer.send_weights()
        dist.barrier()

    def differing_tensors(self, address: str) -> list[str]:
        """Not known: vLLM's own transport keeps no checksums. The version and the log-probs are still checked."""
        return []

    # vLLM's VLLMWeightSyncClient protocol, called by its trainer engine on rank 0.

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._engines.init_weight_transfer_engine([init_info] * len(self._engines.addresses))

    def start_weight_update(self) -> None:
        self._engines.start_weight_update()

    def update_weights(self, update_info) -> None:
        from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

        self._engines.update_weights(_json_safe_update_payload(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._engines.finish_weight_update(str(self._version))


def check_servers(
    engines: Engines,
    sync: ShardSync | IpcSync,
    version: int,
    probes: list[list[int]],
    expected: list[list[float]],
    tolerance: float,
) -> float:
    """Rank 0 only: raise StaleWeightsError unless every server serves the policy's weights; returns the largest gap.

    probes: token sequences; expected: the policy's log-prob of every token but the first, at temperature 1. tolerance:
    mean |difference|. Tiny updates move log-probs less than rounding does, so the version and the checksums of what
    each worker received are compared too.
    """
    gaps = []
    for address in engines.addresses:
        found = engines.weight_version(address)
        tensors = sync.differing_tensors(address)
        if found != str(version) or tensors:
            named = f"; tensors that differ: {_listed(tensors)}" if tensors else ""
            raise StaleWeightsError(f"{address} serves weight version {found}, the policy is at {version}{named}")
        served = [engines.prompt_logprobs(address, probe) for probe in probes]
        differences = [
            abs(a - b) for ours, theirs in zip(expected, served, strict=True) for a, b in zip(ours, theirs, strict=True)
        ]
        gaps.append(max(differences))
        mean = sum(differences) / len(differences)
        if not mean <= tolerance:
            raise StaleWeightsError(
                f"{address} gives log-probs {mean:.3g} from the policy's on fixed tokens (at most {tolerance:g} "
                f"expected) at weight version {version}, although every tensor arrived as it was sent: "
                "the server loads or computes them differently"
            )
    return max(gaps)


def from_rank_0(function: Callable):
    """Rank 0's result on every rank; an exception there is raised here too, so that no rank waits for it in vain."""
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def _all_gather(value) -> list:
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
