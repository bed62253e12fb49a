"""From updated policy to updated servers, and the proof that they agree."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_dgpo.config import Rollout
from megatron_dgpo.rollout import shared_weights
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.server import free_port
from megatron_dgpo.rollout.shard_stream import join_group, send_buckets
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.load import named_shards
from megatron_dgpo.weights.resharding import (
    Move,
    TrainerLayout,
    VllmLayout,
    buckets,
    checksum,
    plan_moves,
    vllm_parameters,
    vllm_shape,
    wrapped_sum,
)

# One vLLM parameter in so many is compared after each update, others after the next.
_SAMPLED = 16

Write = Callable[[dict[str, torch.Tensor]], None]


class StaleWeightsError(RuntimeError):
    """A server does not hold the policy's weights; says which server, version and tensors."""


class MemfdSync:
    """Pushes weights through memory shared with the servers of this machine; every rank writes its own slices.

    All methods are collective over all ranks. engines: on global rank 0, None elsewhere. shapes: of every full Hugging
    Face tensor. write: fills this rank's slices of them.
    """

    def __init__(self, engines: Engines | None, shapes: dict[str, tuple[int, ...]], dtype: str, write: Write) -> None:
        self._engines = engines
        self._write = write
        self._layout = shared_weights.Layout.of(shapes, dtype)
        path = shared_weights.create(self._layout) if dist.get_rank() == 0 else None
        self._path = from_rank_0(lambda: path)
        self._weights = shared_weights.attach(self._path, self._layout)
        from_rank_0(lambda: engines.init_weight_transfer_engine([{}] * len(engines.addresses)))

    def push(self, version: int) -> None:
        """Make every server serve the current weights as `version`. Collectives: two object broadcasts, a barrier."""
        with torch.no_grad():
            self._write(self._weights)
        dist.barrier()
        from_rank_0(lambda: self._update(version))

    def _update(self, version: int) -> None:
        self._engines.start_weight_update()
        self._engines.update_weights({"path": self._path, **dataclasses.asdict(self._layout)})
        self._engines.finish_weight_update(str(version))

    def differing_tensors(self, address: str) -> list[str]:
        """Rank 0 only: tensors of a server's last finished update whose bytes are not the trainer's."""
        expected = {name: shared_weights.crc32(tensor) for name, tensor in self._weights.items()}
        workers = self._engines.call_workers(address, "received_checksums")
        return [name for name, value in expected.items() if any(worker.get(name) != value for worker in workers)]


class ShardSync:
    """Sends every worker its own shards, bucket by bucket, from the ranks that hold them. vLLM's workers do the rest.

    All methods are collective over all ranks. engines: on global rank 0, None elsewhere.
    """

    def __init__(
        self,
        engines: Engines | None,
        modules: list[torch.nn.Module],
        architecture: Architecture,
        trainer: TrainerLayout,
        rollout: Rollout,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the servers' weights. Returns when all workers have joined the group of both sides."""
        self._engines, self._dtype, self._all = engines, dtype, rollout.check_all_weights
        servers = from_rank_0(lambda: len(engines.addresses))
        vllm = VllmLayout(rollout.tensor, servers, rollout.expert_parallel)
        self._workers_per_server = rollout.tensor
        self._target_shapes = {
            name: vllm_shape(architecture, parameter, vllm) for name, parameter in vllm_parameters(architecture).items()
        }
        self._shards = dict(named_shards(modules))
        numel = max(1, rollout.bucket_bytes // dtype.itemsize)
        rank, self._first_worker = dist.get_rank(), trainer.world_size
        self._buckets = [
            [move for move in bucket if move.rank == rank]
            for bucket in buckets(plan_moves(architecture, trainer, vllm), numel)
        ]
        self._expected: dict[tuple[int, str], int] = {}
        host, port = from_rank_0(lambda: (_own_address(engines.addresses), free_port()))
        info = {"host": host, "port": port, "trainer": dataclasses.asdict(trainer), "servers": servers}
        info |= {"bucket_numel": numel, "timeout_s": rollout.transfer_timeout_s}
        with self._request(lambda: engines.init_weight_transfer_engine([info | {"server": i} for i in range(servers)])):
            size = trainer.world_size + vllm.num_workers
            self._group = join_group(host, port, rank, size, rollout.transfer_timeout_s)

    @torch.no_grad()
    def push(self, version: int) -> None:
        """Make every server serve the current weights as `version`; remembers checksums of a sample, or of all.

        Collectives: three object broadcasts, two object all-gathers; one message per bucket, rank and worker.
        """
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
            send_buckets(self._group, self._buckets, piece, self._first_worker)
        shares: list = [None] * dist.get_world_size()
        dist.all_gather_object(shares, partial)
        self._expected = {}
        for key, value in (item for share in shares for item in share.items()):
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
        shares: list = [None] * dist.get_world_size()
        dist.all_gather_object(shares, failures)
        failures = [failure for share in shares for failure in share]
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


class VllmSync:
    """Pushes weights with vLLM's own trainer engines, `nccl` or `ipc`, from a collective stream of full tensors.

    Written from vLLM 0.32's sources and not yet run: no machine with a GPU was at hand.
    """

    def __init__(self, engines: Engines | None, source, transport: str, workers_per_server: int, servers: int) -> None:
        """source: a vLLM WeightSource, the same on every rank."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        self._engines, self._workers_per_server, self._version = engines, workers_per_server, 0
        rank = dist.get_rank()
        if transport == "nccl":
            host, port = from_rank_0(lambda: (get_ip(), get_open_port()))
            info = NCCLTrainerInitInfo(host, port, 1 + workers_per_server * servers, rank=rank)
        else:
            info = IPCTrainerInitInfo(rank=rank)
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self, source=source)

    def push(self, version: int) -> None:
        self._version = version
        self._trainer.send_weights()
        dist.barrier()

    def differing_tensors(self, address: str) -> list[str]:
        """Not known: vLLM's own transports keep no checksums. The version and the log-probs are still checked."""
        return []

    # vLLM's VLLMWeightSyncClient protocol, called by its trainer engine on rank 0.

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        # The ranks of one NCCL group, given out server by server.
        count, offset = self._workers_per_server, init_info.get("rank_offset")
        infos = [
            init_info if offset is None else init_info | {"rank_offset": offset + place * count}
            for place in range(len(self._engines.addresses))
        ]
        self._engines.init_weight_transfer_engine(infos)

    def start_weight_update(self) -> None:
        self._engines.start_weight_update()

    def update_weights(self, update_info) -> None:
        from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

        self._engines.update_weights(_json_safe_update_payload(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._engines.finish_weight_update(str(self._version))


def check_servers(
    engines: Engines,
    sync: MemfdSync | VllmSync,
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


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
