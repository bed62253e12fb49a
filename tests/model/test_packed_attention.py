"""What a GPU's kernels are given, checked where there is none: on a fake device, on which reading a value fails."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dgpo.config import Config
from megatron_dgpo.model import layer_specs
from megatron_dgpo.model.gpt import transformer_config
from megatron_dgpo.model.packed import AttentionPlan, PackedAttentionParams, packed_seq_params
from megatron_dgpo.weights.architectures import read_architecture
from tests.ranks import run_ranks
from tools.tiny_models import make_tiny_model

SEQLENS = (8, 16, 24)


def attention_of(model: Path) -> layer_specs.PackedAttention:
    config = Config.model_validate({"model": {"path": model}, "data": {"train": "none"}})
    settings = transformer_config(config, read_architecture(model))
    return layer_specs.PackedAttention(settings, 1, None, None, softmax_scale=None)


@pytest.mark.parametrize("window", [None, 5])
def test_neighbours_of_one_length_meet_in_one_product(tmp_path, monkeypatch, window):
    attention = attention_of(make_tiny_model(tmp_path / "model", "mistral", sliding_window=window))
    seqlens, products = (4, 7, 7, 7, 9, 9, 4), []
    product = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        products.append(tuple(query.shape[::2]))
        return product(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)

    def found(query, key, value, seqlens):
        params = PackedAttentionParams()
        params.attention_plan = AttentionPlan.of(seqlens, 1, 0, None, torch.device("cpu"))
        return attention(query, key, value, None, params)

    tensors = [torch.randn(sum(seqlens), heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    together = found(*tensors, seqlens)
    assert products == [(1, 4), (3, 7), (2, 9), (1, 4)]
    alone = torch.cat(
        [found(*parts, parts[0].shape[:1]) for parts in zip(*(t.split(seqlens) for t in tensors), strict=True)]
    )
    torch.testing.assert_close(together, alone)
    weight = torch.randn_like(together)
    torch.testing.assert_close(
        torch.autograd.grad((together * weight).sum(), tensors), torch.autograd.grad((alone * weight).sum(), tensors)
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_attention_on_a_gpu_reads_nothing_back(tmp_path, monkeypatch, window, cp_size):
    model = make_tiny_model(tmp_path / "model", "mistral", sliding_window=window)
    attention = attention_of(model)
    gathers = []

    def gather(tensor, group):
        gathers.append(group)
        return tensor.new_empty(len(tensor) * cp_size, *tensor.shape[1:])

    monkeypatch.setattr(layer_specs, "gather_from_sequence_parallel_region", gather)
    local = sum(SEQLENS) // cp_size
    plan = AttentionPlan.of(SEQLENS, cp_size, cp_size - 1, None, torch.device("cpu"))
    tensors = {name: value for name, value in vars(plan).items() if torch.is_tensor(value)}
    assert len(tensors) == (3 if cp_size > 1 else 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        with pytest.raises(RuntimeError):
            torch.ones(1, device=device).item()
        query = torch.empty(local, 4, 16, dtype=torch.bfloat16, device=device)
        key, value = (torch.empty(local, 2, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
        params = PackedAttentionParams()
        params.attention_plan = replace(plan, **{n: torch.empty_like(t, device=device) for n, t in tensors.items()})
        for _ in range(2):
            output = attention(query, key, value, None, params)
        assert output.shape == (local, 64) and output.device.type == "cuda"
    assert len(gathers) == (2 if cp_size > 1 else 0)


def params_of_a_micro_batch():
    from megatron_dgpo.config import Parallel
    from megatron_dgpo.micro_batch import TrainingSequence
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.packed import pack_micro_batches
    from megatron_dgpo.model.parallel import initialize_parallel

    init_device()
    initialize_parallel(Parallel(), 1)
    sequences = [TrainingSequence.of([1] * 5, [2] * length) for length in (1, 9, 1010)]
    batches = pack_micro_batches([sequences[:2], sequences[2:]], Parallel())
    params = packed_seq_params(batches, portable=True)
    four = params.cu_seqlens_q, params.cu_seqlens_kv, params.cu_seqlens_q_padded, params.cu_seqlens_kv_padded
    one = all(tensor is four[0] for tensor in four)
    return one, four[0].tolist(), four[0].dtype, four[0].device.type, params.max_seqlen_q


def test_boundaries_are_one_tensor():
    """Transformer Engine tells by identity that nothing lies between sequences. Megatron 0.16 reads them in every layer
    for its rotation: on the host, and with a table that is not as long as the pack."""
    [found] = run_ranks(params_of_a_micro_batch, 1)
    assert found == (True, [0, 6, 20, 1035], torch.int32, "cpu", 1024)
