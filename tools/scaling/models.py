"""Shapes of models to plan for without their files: from the config.json of each on Hugging Face.

DeepSeek-V3 (arXiv 2412.19437) is not a family that this trainer has: `671B-mixture` stands for its sizes. Kept: hidden
size, 256 experts of 2,048 in every layer, 37 B active parameters, attention's arithmetic at some 8,000 tokens. Not
kept:

- latent attention (MLA) is grouped-query attention here: 128 heads of 128 with 2 key/value groups, a cache of 512
  numbers a token and layer for MLA's 576, and tensor parallelism of the trainer of at most 2;
- the shared expert counts as a ninth routed one, and the three dense first layers as mixtures;
- 56 layers for 61, a prime number that no pipeline divides: 646 B parameters in all, 4 % fewer;
- no multi-token prediction and no FP8: weights are bfloat16 everywhere.
"""

from __future__ import annotations

import functools

from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.weights.architectures import Architecture


def shape(
    family, layers, hidden, ffn, heads, groups, vocab, head_dim=128, tied=False, positions=32768, experts=(0, 0, 0)
):
    """experts: (number, chosen for a token, intermediate size)."""
    number, top_k, expert_ffn = experts
    return Architecture(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=vocab,
        tied_embeddings=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=positions,
        sliding_window=None,
        num_experts=number,
        experts_per_token=top_k,
        expert_ffn_hidden_size=expert_ffn,
    )


ARCHITECTURES = {
    "Qwen2.5-0.5B": shape("qwen2", 24, 896, 4864, 14, 2, 151936, head_dim=64, tied=True),
    "Qwen2.5-1.5B": shape("qwen2", 28, 1536, 8960, 12, 2, 151936, tied=True),
    "Qwen2.5-7B": shape("qwen2", 28, 3584, 18944, 28, 4, 152064),
    "Qwen2.5-14B": shape("qwen2", 48, 5120, 13824, 40, 8, 152064),
    "Qwen3-30B-A3B": shape("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, positions=40960, experts=(128, 8, 768)),
    "Qwen2.5-32B": shape("qwen2", 64, 5120, 27648, 40, 8, 152064),
    "Qwen2.5-72B": shape("qwen2", 80, 8192, 29568, 64, 8, 152064),
    "Qwen3-235B-A22B": shape("qwen3_moe", 94, 4096, 12288, 64, 4, 151936, positions=40960, experts=(128, 8, 1536)),
    "Llama-3.1-405B": shape("llama", 126, 16384, 53248, 128, 8, 128256, positions=131072),
    "671B-mixture": shape("mixtral", 56, 7168, 18432, 128, 2, 129280, positions=163840, experts=(256, 9, 2048)),
}


@functools.cache
def sizes_of(name: str) -> Sizes:
    """One object a model: results are kept by it."""
    return Sizes(ARCHITECTURES[name])
