"""From updated policy to updated servers, and the proof that they agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_dgpo.rollout import shared_weights
from megatron_dgpo.rollout.client import Engines

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
        from_rank_0(lambda: engines.init_weight_transfer_engine({}))

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
        expected = {name: shared_weights.checksum(tensor) for name, tensor in self._weights.items()}
        workers = self._engines.call_workers(address, "received_checksums")
        return [name for name, value in expected.items() if any(worker.get(name) != value for worker in workers)]


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
        self._engines.init_weight_transfer_engine(init_info, self._workers_per_server)

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
