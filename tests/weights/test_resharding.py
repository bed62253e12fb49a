"""The plan: every worker gets exactly the bytes of its own shard, from ranks that hold them, evenly."""

from collections import defaultdict

import pytest
import torch

from megatron_dgpo.weights.architectures import expert_of, read_architecture
from megatron_dgpo.weights.resharding import (
    TrainerLayout,
    VllmLayout,
    buckets,
    checksum,
    plan_moves,
    vllm_parameters,
    vllm_shape,
    wrapped_sum,
)
from tests.full_tensors import megatron_shard
from tools.tiny_models import make_tiny_model

VOCAB = 131  # no group size divides it
TRAINERS = [
    TrainerLayout(tensor, pipeline, chunks, data)
    for tensor in (1, 2, 4)
    for pipeline, chunks in ((1, 1), (2, 1), (2, 2))
    for data in (1, 3)
]

EXPERT_TRAINERS = [TrainerLayout(1, 2, 1, 2, 2), TrainerLayout(2, 1, 1, 2, 4), TrainerLayout(2, 2, 2, 2, 2)]


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
        VllmLayout(1, 1),
        VllmLayout(2, 2),
        VllmLayout(4, 1),
        VllmLayout(8, 1),
        VllmLayout(2, 2, expert_parallel=True),
        VllmLayout(4, 1, expert_parallel=True),
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
    for move in plan_moves(architecture, trainer, vllm):
        stage = move.rank // (trainer.tensor * trainer.data)
        assert stage == trainer.stage(architecture, move.source)
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


def test_replicas_share_the_sending(model):
    architecture, _ = model
    sent = defaultdict(int)
    trainer = TrainerLayout(2, 1, 1, 3)
    for move in plan_moves(architecture, trainer, VllmLayout(2, 3)):
        sent[move.rank] += move.numel
    assert len(sent) == trainer.world_size
    assert max(sent.values()) < 1.1 * min(sent.values())


def test_buckets_keep_order_and_limit(model):
    architecture, _ = model
    moves = plan_moves(architecture, TrainerLayout(2, 2, 1, 1), VllmLayout(2, 1))
    # Many parameters are larger, and are cut.
    limit = 1000
    found = list(buckets(moves, limit))
    for bucket in found:
        for worker in range(2):
            assert sum(move.numel for move in bucket if move.worker == worker) <= limit
    parts = [move for bucket in found for move in bucket]
    assert sum(part.numel for part in parts) == sum(move.numel for move in moves) and len(parts) > len(moves)
    # In order, and each part where the one before it ended.
    remaining = iter(parts)
    for move in moves:
        rows = 0
        while rows < move.shape[0]:
            part = next(remaining)
            assert part.source == move.source and part.target == move.target
            assert (part.rank, part.worker, part.shape[1:]) == (move.rank, move.worker, move.shape[1:])
            assert part.source_start == (move.source_start[0] + rows, *move.source_start[1:])
            stack = len(move.target_start) - len(move.shape)
            assert part.target_start[:stack] == move.target_start[:stack]
            assert part.target_start[stack] == move.target_start[stack] + rows
            assert part.target_start[stack + 1 :] == move.target_start[stack + 1 :]
            rows += part.shape[0]
        assert rows == move.shape[0]


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
