"""The plan: every worker gets exactly the bytes of its own shard, from ranks that hold them, evenly."""

import dataclasses
import itertools
import tracemalloc
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from megatron_dgpo.config_file import load_config
from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.weights.architectures import expert_of, read_architecture
from megatron_dgpo.weights.resharding import (
    checksum,
    plan_buckets,
    plan_moves,
    stage_of,
    vllm_parameters,
    vllm_shape,
    wrapped_sum,
)
from tests.full_tensors import megatron_shard
from tools.tiny_models import make_tiny_model

VOCAB = 131  # no group size divides it
TRAINERS = [
    Layout(tensor, pipeline, data, chunks)
    for tensor in (1, 2, 4)
    for pipeline, chunks in ((1, 1), (2, 1), (2, 2))
    for data in (1, 3)
]

EXPERT_TRAINERS = [Layout(1, 2, 2, expert=2), Layout(2, 1, 2, expert=4), Layout(2, 2, 2, 2, 2)]


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama", "qwen3_moe", "mixtral"])
def model(request, tmp_path_factory):
    folder = make_tiny_model(
        tmp_path_factory.mktemp(request.param) / "model",
        request.param,
        vocab_size=VOCAB,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    architecture = read_architecture(folder)
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.randn(shape, generator=generator) for name, shape in architecture.hf_shapes.items()}
    return architecture, full


def vllm_shard(architecture, full, parameter, rank, layout):
    """As vLLM's own loaders cut the full tensors."""
    if parameter.stacked:
        count = len(parameter.experts) // layout.tensor
        mine, place = (
            (slice(rank * count, (rank + 1) * count), (0, 1))
            if layout.expert_parallel
            else (slice(None), (rank, layout.tensor))
        )
        return torch.stack(
            [cut(architecture, full, parameter.split, names, *place) for names in parameter.experts[mine]]
        )
    return cut(architecture, full, parameter.split, parameter.experts[0], rank, layout.tensor)


def cut(architecture, full, split, sources, rank, size):
    tensors = [full[source] for source in sources]
    if split == "copy":
        return tensors[0]
    if split == "row":
        return tensors[0].chunk(size, 1)[rank]
    if split == "gate_up":
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])
    if split == "qkv":
        heads = architecture.num_query_groups
        keys = [t.view(heads, architecture.head_dim, *t.shape[1:]) for t in tensors[1:]]
        mine = range(rank * heads // size, (rank + 1) * heads // size) if size <= heads else [rank * heads // size]
        return torch.cat([tensors[0].chunk(size)[rank], *(key[list(mine)].flatten(0, 1) for key in keys)])
    rows = -(-VOCAB // 64) * 64
    padded = torch.cat([tensors[0], torch.zeros(rows - VOCAB, *tensors[0].shape[1:])])
    return padded.chunk(size)[rank]


@pytest.mark.parametrize(
    "vllm",
    [
        ServerLayout(1, 1),
        ServerLayout(2, 2),
        ServerLayout(4, 1),
        ServerLayout(8, 1),
        ServerLayout(2, 2, expert_parallel=True),
        ServerLayout(4, 1, expert_parallel=True),
    ],
)
def test_workers_get_their_own_shards_once(model, vllm):
    architecture, full = model
    for trainer in TRAINERS + (EXPERT_TRAINERS if architecture.num_experts else []):
        check_plan(architecture, full, trainer, vllm)


def check_plan(architecture, full, trainer, vllm):
    parameters = vllm_parameters(architecture)
    received = {
        (worker, name): torch.zeros(vllm_shape(architecture, parameter, vllm))
        for worker in range(vllm.num_workers)
        for name, parameter in parameters.items()
    }
    written = {key: torch.zeros_like(tensor) for key, tensor in received.items()}
    shards = {}
    # Many parameters are larger than a bucket, and are cut.
    for move in itertools.chain.from_iterable(plan_buckets(architecture, trainer, vllm, 20_000)):
        stage = move.rank // (trainer.tensor * trainer.data)
        assert stage == stage_of(architecture, trainer, move.source)
        place = (move.rank % trainer.tensor, trainer.tensor)
        expert = expert_of(move.source)
        if expert is not None:
            # As Megatron deals them out: neighbours on one rank.
            group = architecture.num_experts // trainer.expert
            assert move.rank % (trainer.tensor * trainer.data) % trainer.expert == expert // group
            place = (0, 1)
        if (move.source, place) not in shards:
            shards[move.source, place] = megatron_shard(architecture, full, move.source, *place)
        key = move.worker, move.target
        move.of_target(received[key]).copy_(move.of_source(shards[move.source, place]))
        move.of_target(written[key]).add_(1)
    for (worker, name), tensor in received.items():
        expected = vllm_shard(architecture, full, parameters[name], worker % vllm.tensor, vllm)
        assert torch.equal(tensor, expected), (trainer, worker, name)
        # Each byte once, and none for padding.
        once = torch.ones_like(tensor)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            once[expected.abs().sum(-1) == 0] = 0
        assert torch.equal(written[worker, name], once)


def few_layouts(architecture):
    """Of trainer and servers: one for one, replicas that do not come out even, and experts in both ways."""
    yield Layout(), ServerLayout(2, 3)
    yield Layout(2, 2, 3, 2), ServerLayout(8, 1)
    if architecture.num_experts:
        yield Layout(2, 1, 2, expert=4), ServerLayout(2, 3)
        yield Layout(1, 2, 4, expert=2), ServerLayout(4, 2, expert_parallel=True)


def test_each_side_plans_its_own_moves_only(model):
    """Sender and receiver of every message agree on its bucket and on the order of what is in it."""
    architecture, _ = model
    for trainer, vllm in few_layouts(architecture):
        layouts = architecture, trainer, vllm, 20_000
        cut = plan_buckets(*layouts)
        for side, count in (("rank", trainer.world_size), ("worker", vllm.num_workers)):
            for member in range(count):
                mine = [[move for move in bucket if getattr(move, side) == member] for bucket in cut]
                assert plan_buckets(*layouts, **{side: member}) == mine


@pytest.mark.parametrize("servers", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("data", [1, 3, 4])
def test_replicas_share_the_sending(model, servers, data):
    """Ranks with the same shards differ by what one worker gets of one layer, however they come out."""
    architecture, _ = model
    trainer, vllm = Layout(2, 1, data), ServerLayout(2, servers)
    sent = {rank: 0 for rank in range(trainer.world_size)}
    for move in plan_moves(architecture, trainer, vllm):
        sent[move.rank] += move.numel
    shapes = {name: vllm_shape(architecture, p, vllm) for name, p in vllm_parameters(architecture).items()}
    once = sum(torch.Size(shape).numel() for name, shape in shapes.items() if ".layers." not in name or ".0." in name)
    for tensor in range(2):
        alike = [sent[rank] for rank in range(tensor, trainer.world_size, 2)]
        assert max(alike) - min(alike) <= (once if servers * 2 % data else 0.1 * max(alike))


def test_buckets_keep_their_limits_on_both_sides(model):
    architecture, _ = model
    limit = 4000
    for trainer, vllm in few_layouts(architecture):
        for bucket in plan_buckets(architecture, trainer, vllm, limit):
            for side in ("rank", "worker"):
                filled, rows = defaultdict(int), defaultdict(int)
                for part in bucket:
                    filled[getattr(part, side)] += part.numel
                    rows[getattr(part, side)] += part.numel // part.shape[0]
                assert all(filled[key] <= limit + rows[key] for key in filled), (trainer, vllm, side)


@pytest.fixture(scope="module")
def largest():
    """The largest recipe: its settings, model and layouts, 128 ranks that hold an expert each and 16 servers."""
    folder = Path(__file__).parents[2] / "examples" / "qwen3-235b-a22b"
    config = load_config(folder / "config.yaml")
    trainer, vllm = Layout.from_config(config.parallel), ServerLayout(config.servers.tensor, 16)
    return read_architecture(folder / "model"), trainer, vllm, config.weight_sync.bucket_bytes // 2


@pytest.mark.parametrize("side, other", [("rank", "worker"), ("worker", "rank")])
def test_the_plan_of_the_largest_recipe_is_small_and_even(largest, side, other):
    architecture, trainer, vllm, bucket_numel = largest
    cut = plan_buckets(*largest, **{side: 77})
    moves = [move for bucket in cut for move in bucket]
    # An expert is three tensors; each goes to every worker, or comes from every rank.
    assert len(moves) < 3 * architecture.num_layers * 3 * 128
    shapes = [vllm_shape(architecture, p, vllm) for p in vllm_parameters(architecture).values()]
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    # As many bytes leave a rank as reach a worker, but for the padding of the vocabulary and unlike shares of it.
    assert sum(move.numel for move in moves) == pytest.approx(numel, rel=1e-3)
    assert len(cut) == -(-numel // bucket_numel)
    for bucket in cut:
        assert len({getattr(move, other) for move in bucket}) == 128
        assert sum(move.numel for move in bucket) <= bucket_numel + sum(move.numel // move.shape[0] for move in bucket)
    del cut, moves, bucket
    # Traced with a tenth of the layers, because tracing is slow.
    few = dataclasses.replace(architecture, num_layers=9)
    assert few.parameters and few.hf_shapes
    tracemalloc.start()
    plan_buckets(few, trainer, vllm, bucket_numel, **{side: 77})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 2**20


def test_workers_have_few_senders(largest):
    """Only experts come from everywhere: without any, a worker of 64 hears from one rank in every pipeline stage."""
    architecture = dataclasses.replace(largest[0], num_experts=0, num_layers=8)
    trainer, vllm = Layout(2, 4, 8), ServerLayout(8, 8)
    for worker in (0, 13, 63):
        assert len({move.rank for move in plan_moves(architecture, trainer, vllm, worker=worker)}) <= 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_add_up_and_see_order(dtype):
    tensor = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = checksum(tensor, (40, 30))
    parts = [checksum(tensor[a:b], (40, 30), (a, 0)) for a, b in ((0, 7), (7, 39), (39, 40))]
    assert wrapped_sum(*parts) == whole
    columns = checksum(tensor[:, :11], (40, 30), (0, 0)), checksum(tensor[:, 11:], (40, 30), (0, 11))
    assert wrapped_sum(*columns) == whole
    # Two experts' halves, stacked.
    halves = tensor.view(2, 20, 30)
    stacked = [checksum(halves[i], (2, 20, 30), (i, 0, 0)) for i in range(2)]
    assert wrapped_sum(*stacked) == whole
    assert wrapped_sum(*(checksum(halves[1 - i], (2, 20, 30), (i, 0, 0)) for i in range(2))) != whole
    assert checksum(tensor[3], (30,)) == wrapped_sum(
        checksum(tensor[3, :9], (30,), (0,)), checksum(tensor[3, 9:], (30,), (9,))
    )
    assert checksum(tensor.flip(0), (40, 30)) != whole
    changed = tensor.clone()
    changed[3, 3] += 1
    assert checksum(changed, (40, 30)) != whole
