"""The model's operations: counted by hand, as PyTorch counts them, and as they are reported."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_dgpo.metrics import MetricsLog, read_metrics
from megatron_dgpo.planning.hardware import known_gpu
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.rollout import server
from megatron_dgpo.throughput import Throughput
from megatron_dgpo.weights.architectures import Architecture, read_architecture
from tests.layouts import make_config
from tools.tiny_models import make_tiny_model

DENSE = dict(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, head_dim=32)
DENSE |= dict(vocab_size=131, tied_embeddings=False, qkv_bias=False, qk_norm=True, norm_eps=1e-6, rope_theta=1e4)
DENSE |= dict(rope_scaling=None, max_positions=256, sliding_window=None)
MIXTURE = DENSE | dict(num_experts=8, experts_per_token=2, expert_ffn_hidden_size=24)
# Ten tokens, of which six are the response. Of a token: queries and output, keys and values; then the MLP.
_ATTENTION = 2 * (2 * 64 * 128 + 2 * 64 * 64)
# Scores and values of 4 heads of 32, for half of ten squared pairs.
_PAIRS = 2 * 2 * 4 * 32 * 10 * 10 // 2
_HEAD = 6 * 2 * 64 * 131


@pytest.mark.parametrize(
    "architecture, mlp",
    [(DENSE, 2 * 3 * 64 * 96), (MIXTURE, 2 * (2 * 3 * 64 * 24 + 64 * 8))],
    ids=["dense", "mixture"],
)
def test_by_hand(architecture, mlp):
    expected = 4 * (10 * (_ATTENTION + mlp) + _PAIRS) + _HEAD
    assert Sizes(Architecture("qwen3", **architecture)).forward_flops(10, 6) == expected
    windowed = Sizes(Architecture("qwen3", **architecture | {"sliding_window": 4}))
    # Four before each, fewer at the start: 40 - 4 · 4 / 2 pairs.
    assert windowed.forward_flops(10, 6) == expected - 4 * 2 * 2 * 4 * 32 * (50 - 32)
    assert windowed.forward_flops(3, 1) == Sizes(Architecture("qwen3", **architecture)).forward_flops(3, 1)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_as_pytorch_counts(tmp_path, family):
    from transformers import AutoModelForCausalLM

    path = make_tiny_model(tmp_path / "model", family)
    # PyTorch does not count grouped products.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **plain)
    tokens = torch.randint(3, 131, (1, 24), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    sizes = Sizes(read_architecture(path))
    # It computes the pairs that the mask then hides, too.
    hidden = sizes.layers * 2 * sizes.a * sizes.d * 24**2
    assert counter.get_total_flops() == sizes.forward_flops(24, 24) + hidden


def test_which_gpus_are_known():
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200", "NVIDIA A100-SXM4-80GB"]
    assert [known_gpu(name).flops for name in names] == [989e12, 989e12, 2250e12, 312e12]
    for name in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GB200", "NVIDIA L4", "AMD EPYC"):
        assert known_gpu(name) is None


def test_on_a_cpu_ranks_are_counted_and_no_gpus(tmp_path, capsys):
    with MetricsLog(tmp_path, "train", True, Throughput(ranks=2)) as log:
        log.start(0, 1)
        # What is evaluated before the first step trains nothing.
        log.write(0, {"eval/accuracy": 0.25})
        for phase in ("reference", "policy"):
            with log.phase(phase):
                torch.ones(100, 100).sum()
        log.write(1, {"rollout/tokens": 100, "policy/model_tflop": 0.004})
    before, row = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert not {name for name in before if "per_" in name or "mfu" in name}
    seconds = row["time/reference_s"] + row["time/policy_s"]
    assert row["time/tflops_per_rank"] == pytest.approx(0.002 / seconds)
    assert "time/tokens_per_s_per_gpu" not in row and "time/mfu" not in row
    assert "TFLOP/s a rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, servers, gpus",
    [("train", {"tensor": 2}, 10), ("train", {"sleep": True}, 4), ("sft", {}, 4)],
)
def test_gpus_that_ranks_and_servers_share_are_counted_once(monkeypatch, command, servers, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    # Of all machines, as the launcher says.
    monkeypatch.setenv(server.ADDRESSES, "http://a:1,http://a:2,http://b:1")
    throughput = Throughput.of_run(make_config("unused", servers=servers), command)
    assert throughput == Throughput(4, gpus, 989e12)


def test_a_replica_that_is_slow_for_some_steps_is_named_once(tmp_path, capsys):
    from megatron_dgpo.step_metrics import Warnings

    quiet = {"policy/rollout_effective_share": 1.0, "credit/effective_share": 0.9, "rollout/response_length": 9.0}
    with MetricsLog(tmp_path, "train", visible=True) as log:
        log.start(0, 30)
        warnings = Warnings(log, make_config("none"))
        for ranks, speed in ((range(5), 0.5), ([3] * 5, 0.9), ([3] * 4, 0.5)):
            for rank in ranks:
                warnings.look(quiet | {"policy/slowest_rank": float(rank), "policy/slowest_rank_speed": speed})
        assert "warning" not in capsys.readouterr().out
        for _ in range(2):
            warnings.look(quiet | {"policy/slowest_rank": 3.0, "policy/slowest_rank_speed": 0.5})
    printed = capsys.readouterr().out
    assert printed.count("warning:") == 1 and "begins with rank 3 computes at 50% of the others" in printed
