"""The slices of all ranks cover every Hugging Face tensor exactly once, for every family and size."""

import dataclasses

import pytest
import torch

from megatron_dgpo.weights.architectures import FAMILIES, Architecture, expert_of
from megatron_dgpo.weights.slices import padded_vocab_size, shard_slices

BASE = Architecture(
    family="llama",
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=6,
    vocab_size=131,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=64,
    sliding_window=None,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [3, 128, 131])
def test_every_element_has_one_owner(family, size, tied, vocab):
    kind = FAMILIES[family]
    architecture = dataclasses.replace(
        BASE,
        qkv_bias=kind.qkv_bias,
        qk_norm=kind.qk_norm,
        tied_embeddings=tied,
        vocab_size=vocab,
        num_experts=4 if kind.expert_ffn else 0,
        expert_ffn_hidden_size=20,
        renamed=kind.renamed,
    )
    owners = {name: torch.zeros(shape, dtype=torch.int) for name, shape in architecture.hf_shapes.items()}
    assert ("lm_head.weight" in owners) != tied
    for name, (split, *_) in architecture.parameters.items():
        for rank in range(size):
            covered = 0
            for part in shard_slices(architecture, name, rank, size):
                if (split != "copy" and expert_of(name) is None) or rank == 0:
                    part.of_full(owners[part.name]).add_(1)
                # Blocks of a shard follow one another without a gap.
                assert part.local_start == covered
                covered += part.length
            if split == "vocab":
                assert covered <= padded_vocab_size(vocab, size) // size
    for name, count in owners.items():
        assert (count == 1).all(), name


def test_query_groups_are_interleaved_as_megatron_wants():
    """Group g of a shard: its queries, then its key, then its value."""
    parts = shard_slices(BASE, "decoder.layers.1.self_attention.linear_qkv.weight", 1, 2)
    kinds = [(part.name.split(".")[-2], part.start, part.length) for part in parts]
    assert kinds == [
        ("q_proj", 24, 12), ("k_proj", 12, 6), ("v_proj", 12, 6),
        ("q_proj", 36, 12), ("k_proj", 18, 6), ("v_proj", 18, 6),
    ]  # fmt: skip
