"""Bytes, seconds and memory of a weight update: shard to shard, gathered and broadcast, and a bare copy.

    python tools/bench_weight_sync.py --json benchmarks/weight_sync_cpu.json
    python tools/bench_weight_sync.py --predict                        # 7B to 235B on 8 to 256 H100s
    python tools/bench_weight_sync.py --predict --model DIR --gpu FILE   # any config.json, link speeds from a file

Trainer ranks and workers are processes of this machine that hold random shards of Qwen2.5-0.5B's shape; loading into
vLLM is not part of it. All ways run in turn, several rounds; each one's fastest round counts. `read in place` and
`sent over gloo` are this package's; `gather and broadcast` is what peers do: each parameter is put together on trainer
rank 0, which broadcasts all of it to every worker, over gloo. `copy` is each worker's copying of as many bytes as its
shards have: no way can be faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # This file is run as a script; what it uses are modules of the folder above.
    sys.path.insert(0, str(ROOT))

from megatron_dgpo.layout import Layout, ServerLayout  # noqa: E402
from megatron_dgpo.model.collectives import all_gathered  # noqa: E402
from megatron_dgpo.planning.hardware import Cluster, Gpu, read_gpu  # noqa: E402
from megatron_dgpo.planning.memory import vllm_weights  # noqa: E402
from megatron_dgpo.planning.sides import RolloutSide, TrainerSide  # noqa: E402
from megatron_dgpo.planning.sizes import Sizes  # noqa: E402
from megatron_dgpo.planning.step_time import broadcast_sync_time, sync_time  # noqa: E402
from megatron_dgpo.rollout.server import free_port  # noqa: E402
from megatron_dgpo.weight_sync import shared_memory  # noqa: E402
from megatron_dgpo.weight_sync.stream import Meeting, join_group, receive_buckets, send_buckets  # noqa: E402
from megatron_dgpo.weights.architectures import read_architecture  # noqa: E402
from megatron_dgpo.weights.resharding import (  # noqa: E402
    block,
    plan_buckets,
    stage_of,
    vllm_blocks,
    vllm_parameters,
    vllm_shape,
)
from megatron_dgpo.weights.slices import padded_vocab_size, shard_slices  # noqa: E402
from tools.scaling.models import ARCHITECTURES  # noqa: E402

ARCHITECTURE = ARCHITECTURES["Qwen2.5-0.5B"]
PARAMETERS = vllm_parameters(ARCHITECTURE)
DTYPE = torch.bfloat16
WAYS = ("copy", "read in place", "sent over gloo", "gather and broadcast")
TIMEOUT_S = 120
MODELS = [Path("examples", name, "model") for name in ("qwen2.5-7b", "qwen2.5-32b", "qwen2.5-72b", "qwen3-235b-a22b")]
PUBLISHED = (
    "published for 30-32B, on other clusters, in other layouts and with other starts and ends of an update: "
    "verl 14.2 s over NCCL and 6.2 s with deltas; slime 7 s; NeMo-RL 0.74-1.0 s from shard to shard"
)


def trainer_shards(layout: Layout, rank: int) -> dict[str, torch.Tensor]:
    """Random ones, the same for the same block of a tensor on whatever rank."""
    tensor_rank, stage, _ = layout.coordinates(rank)
    shards = {}
    for place, name in enumerate(ARCHITECTURE.parameters):
        if stage_of(ARCHITECTURE, layout, name) != stage:
            continue
        parts = shard_slices(ARCHITECTURE, name, tensor_rank, layout.tensor)
        shape = list(ARCHITECTURE.hf_shapes[parts[0].name])
        shape[parts[0].dim] = sum(part.length for part in parts)
        if ARCHITECTURE.parameters[name][0] == "vocab":
            shape[0] = padded_vocab_size(ARCHITECTURE.vocab_size, layout.tensor) // layout.tensor
        split = ARCHITECTURE.parameters[name][0] != "copy"
        generator = torch.Generator().manual_seed(1000 * place + tensor_rank * split)
        shards[name] = torch.empty(shape, dtype=DTYPE).uniform_(generator=generator)
    return shards


class Peak:
    """The kernel's high-water mark of this process's memory, above the start."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")
        self._start = _status("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        self.bytes = max(0, _status("VmHWM") - self._start)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def process(rank: int, trainer: Layout, vllm: ServerLayout, options, ports: tuple[int, int], queue) -> None:
    torch.set_num_threads(1)
    size = trainer.world_size + vllm.num_workers
    store = dist.TCPStore("127.0.0.1", ports[0], size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    meeting = Meeting("127.0.0.1", ports[1], "benchmark", TIMEOUT_S, TIMEOUT_S)
    server = dist.TCPStore(meeting.host, meeting.port, None, True, wait_for_workers=False) if rank == 0 else None
    group = join_group(meeting, rank, size, server)
    trainers = dist.new_group(list(range(trainer.world_size)))
    receivers = dist.new_group([0, *range(trainer.world_size, size)])
    worker = rank - trainer.world_size
    numel = options.bucket_mib * 2**20 // DTYPE.itemsize
    own = {"worker": worker} if worker >= 0 else {"rank": rank}
    mine = plan_buckets(ARCHITECTURE, trainer, vllm, numel, **own)
    received = 0
    if worker < 0:
        shards = trainer_shards(trainer, rank)
        live = {}
    else:
        shards = {}
        shapes = {name: vllm_shape(ARCHITECTURE, parameter, vllm) for name, parameter in PARAMETERS.items()}
        live = {name: torch.zeros(shape, dtype=DTYPE) for name, shape in shapes.items()}
        # What the copy starts from: not this machine's page of zeros, which many addresses share.
        filled = {name: torch.ones_like(tensor) for name, tensor in live.items()}

    handles = all_gathered(shared_memory.share(shards))
    memory = [shared_memory.attach(held) if worker >= 0 else {} for held in handles]

    def in_place() -> None:
        nonlocal received
        for move in itertools.chain.from_iterable(mine if worker >= 0 else []):
            received += move.numel * DTYPE.itemsize
            move.of_target(live[move.target]).copy_(move.of_source(memory[move.rank][move.source]))

    def by_shards() -> None:
        nonlocal received
        if worker < 0:
            return send_buckets(
                group, mine, lambda move: move.of_source(shards[move.source]), trainer.world_size, TIMEOUT_S
            )

        def load(move, piece):
            nonlocal received
            received += piece.nbytes
            move.of_target(live[move.target]).copy_(piece)

        return receive_buckets(group, mine, load, DTYPE, torch.device("cpu"), TIMEOUT_S)

    def by_broadcast() -> None:
        nonlocal received
        targets = {parameter.experts[0][0]: name for name, parameter in PARAMETERS.items()}
        for name, (_, *sources) in ARCHITECTURE.parameters.items():
            full = {source: torch.empty(ARCHITECTURE.hf_shapes[source], dtype=DTYPE) for source in sources}
            stage = stage_of(ARCHITECTURE, trainer, name)
            for tensor_rank in range(trainer.tensor if worker < 0 else 0):
                owner = trainer.rank(tensor_rank, stage, 0)
                for part in shard_slices(ARCHITECTURE, name, tensor_rank, trainer.tensor):
                    if owner == rank == 0:
                        part.of_full(full[part.name]).copy_(part.of_shard(shards[name]))
                    elif rank == owner:
                        dist.send(part.of_shard(shards[name]).contiguous(), 0, group=trainers)
                    elif rank == 0:
                        piece = part.of_full(full[part.name])
                        buffer = torch.empty(piece.shape, dtype=DTYPE)
                        dist.recv(buffer, owner, group=trainers)
                        piece.copy_(buffer)
            if worker >= 0 or rank == 0:
                for tensor in full.values():
                    dist.broadcast(tensor, 0, group=receivers)
                    received += tensor.nbytes if worker >= 0 else 0
            if worker >= 0:
                target = targets[sources[0]]
                for part in vllm_blocks(ARCHITECTURE, PARAMETERS[target], worker % vllm.tensor, vllm):
                    block(live[target], part.shard_start, part.shape).copy_(
                        block(full[part.name], part.start, part.shape)
                    )

    def by_copy() -> None:
        if worker >= 0:
            for name, tensor in live.items():
                tensor.copy_(filled[name])

    def run(way: Callable[[], None]) -> dict:
        nonlocal received
        received = 0
        dist.barrier()
        start = time.perf_counter()
        with Peak() as peak:
            way()
        dist.barrier()
        seconds = time.perf_counter() - start
        checksum = sum(tensor.view(torch.int16).sum(dtype=torch.int64).item() for tensor in live.values())
        return {"seconds": seconds, "peak": peak.bytes, "received": received, "checksum": checksum}

    ways = dict(zip(WAYS, (by_copy, in_place, by_shards, by_broadcast), strict=True))
    results = {name: [run(way) for _ in range(options.rounds + 1)][1:] for name, way in ways.items()}
    queue.put((rank, sum(tensor.nbytes for tensor in live.values()), results))
    dist.barrier()
    dist.destroy_process_group()


def measure(trainer: Layout, vllm: ServerLayout, options) -> list[dict]:
    context = mp.get_context("spawn")
    queue = context.Queue()
    ports = free_port(), free_port()
    size = trainer.world_size + vllm.num_workers
    processes = [
        context.Process(target=process, args=(rank, trainer, vllm, options, ports, queue)) for rank in range(size)
    ]
    for child in processes:
        child.start()
    found = sorted(queue.get(timeout=600) for _ in processes)
    for child in processes:
        child.join()
    sides = {"trainer": found[: trainer.world_size], "worker": found[trainer.world_size :]}
    shard_bytes = sides["worker"][0][1]
    sums = [[results[way][-1]["checksum"] for _, _, results in sides["worker"]] for way in WAYS[1:]]
    if any(found != sums[0] for found in sums):
        raise SystemExit(f"the ways left different weights: {sums}")
    rows = []
    floor = None
    for way in WAYS:
        seconds = min(max(times) for times in zip(*([r["seconds"] for r in f[2][way]] for f in found), strict=True))
        floor = floor or seconds
        peaks = {side: max(r["peak"] for f in group for r in f[2][way]) for side, group in sides.items()}
        received = max(f[2][way][-1]["received"] for f in sides["worker"])
        rows.append(
            {
                "way": way,
                "seconds": seconds,
                "of_floor": floor / seconds,
                "received_over_shard": received / shard_bytes if received else None,
                "trainer_extra_mib": peaks["trainer"] / 2**20,
                "worker_extra_mib": peaks["worker"] / 2**20,
            }
        )
    return rows


def predict(console: Console, models: list[Path], gpu: Gpu) -> list[dict]:
    """Half of the GPUs train, half serve, on as few GPUs a server as leave it a quarter of their memory."""
    table, rows, cluster = Table(title=f"Predicted seconds of an update on {gpu.name}"), [], Cluster(gpu, 8)
    for column in ("model", "GPUs", "vLLM", "bytes a worker", "shard to shard", "gather and broadcast"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in models:
        sizes = Sizes(read_architecture(model))
        for gpus in (8, 32, 64, 128, 256):
            half = gpus // 2
            fitting = [t for t in (1, 2, 4, 8) if t <= half and vllm_weights(sizes, t) < 0.75 * gpu.memory_bytes]
            if not fitting:
                table.add_row(model.parent.name, str(gpus), "-", "does not fit", "-", "-")
                continue
            sides = TrainerSide(1, 1, half), RolloutSide(fitting[0], half // fitting[0])
            ours, theirs = (time(sizes, *sides, cluster).total for time in (sync_time, broadcast_sync_time))
            received = vllm_weights(sizes, fitting[0])
            row = {"model": model.parent.name, "gpus": gpus, "vllm_tensor": fitting[0], "bytes": received}
            rows.append(row | {"shard_to_shard_s": ours, "gather_and_broadcast_s": theirs})
            servers = f"{sides[1].servers} × TP{fitting[0]}"
            table.add_row(row["model"], str(gpus), servers, f"{received / 1e9:.1f} GB", f"{ours:.2f}", f"{theirs:.2f}")
    console.print(table)
    console.print(PUBLISHED)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="print predicted times on GPUs, and measure nothing")
    parser.add_argument("--model", type=Path, action="append", help="directory with a config.json; default: recipes'")
    parser.add_argument("--gpu", default="h100", help="a100, h100, h200, b200, or a file with its link speeds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket-mib", type=int, default=64)
    options = parser.parse_args()
    console, results = Console(width=120), []
    if options.predict:
        results = predict(console, options.model or MODELS, read_gpu(options.gpu))
    layouts = [
        (Layout(2, 1), ServerLayout(1, 1)),
        (Layout(2, 1), ServerLayout(2, 1)),
        (Layout(1, 2), ServerLayout(2, 1)),
    ]
    for trainer, vllm in [] if options.predict else layouts:
        rows = measure(trainer, vllm, options)
        title = f"trainer TP {trainer.tensor} × PP {trainer.pipeline}, vLLM TP {vllm.tensor}"
        table = Table(title=f"{title}, buckets of {options.bucket_mib} MiB")
        for column in ("way", "seconds", "of copy's speed", "received / shard", "trainer MiB", "worker MiB"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for row in rows:
            ratio = f"{row['received_over_shard']:.2f}" if row["received_over_shard"] else "-"
            memory = f"{row['trainer_extra_mib']:,.0f}", f"{row['worker_extra_mib']:,.0f}"
            table.add_row(row["way"], f"{row['seconds']:.3f}", f"{row['of_floor']:.2f}", ratio, *memory)
        console.print(table)
        results.append({"trainer": vars(trainer), "vllm": vars(vllm), "bucket_mib": options.bucket_mib, "rows": rows})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
