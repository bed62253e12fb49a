"""Counts of one model that the planner's formulas, and the measured FLOP/s of a run, need."""

from __future__ import annotations

import functools
import math

from megatron_dgpo.weights.architectures import Architecture


class Sizes:
    """h hidden size, a heads, g query groups, d head dimension, f intermediate size (an expert's, in a mixture).

    Compared by identity, so that results can be kept for it.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.layers, self.h = architecture.num_layers, architecture.hidden_size
        self.a, self.g, self.d = architecture.num_attention_heads, architecture.num_query_groups, architecture.head_dim
        self.vocab, self.tied = architecture.vocab_size, architecture.tied_embeddings
        self.experts = architecture.num_experts
        self.top_k = architecture.experts_per_token
        self.f = architecture.expert_ffn_hidden_size or architecture.ffn_hidden_size
        self.qk_norm = architecture.qk_norm
        self.attention_weights, self.active_mlp_weights = (
            architecture.attention_weights,
            architecture.active_mlp_weights,
        )
        first = "decoder.layers.0."
        named = [(name[len(first) :], name) for name in architecture.parameters if name.startswith(first)]
        self._layer = sorted(named, key=lambda item: _module_place(item[0]))

    @functools.cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(math.prod(shape) for shape in self.architecture.hf_shapes.values())

    @property
    def kv_bytes(self) -> int:
        """Of one token in a bfloat16 cache, all layers."""
        return 2 * self.layers * self.g * self.d * 2

    def forward_flops(self, tokens: int, response_tokens: int) -> int:
        """Of one sequence, whose response alone needs logits; backward takes twice as many. Attention's are those of
        the pairs of a token and one before it, within a window if the model has one: half of all pairs at most."""
        window = min(self.architecture.sliding_window or tokens, tokens)
        weights = 2 * tokens * (self.attention_weights + self.active_mlp_weights)
        # Two products of 2·d operations a head, window · (tokens - window / 2) pairs.
        pairs = 2 * self.a * self.d * window * (2 * tokens - window)
        return self.layers * (weights + pairs) + 2 * response_tokens * self.h * self.vocab

    # What is planned lives as long as the program.
    @functools.cache  # noqa: B019
    def layer_shards(self, tensor: int, expert: int) -> list[tuple[int, bool]]:
        """(elements on one rank, whether of an expert) of one layer's parameters, in the order Megatron's modules have
        them (its own layers; Transformer Engine registers a norm before its linear layer)."""
        found, local = [], self.experts // expert
        for suffix, name in self._layer:
            split, *sources = self.architecture.parameters[name]
            numel = sum(math.prod(self.architecture.hf_shapes[source]) for source in sources)
            if ".experts." in suffix:
                if _expert(suffix) < local:
                    found.append((numel, True))
            else:
                found.append((numel if split == "copy" else numel // tensor, False))
        return found


_PLACES: tuple[str, ...] = ("linear_proj", "linear_qkv.weight", "linear_qkv.bias", "linear_qkv", "q_layernorm")
_PLACES += ("k_layernorm", "pre_mlp_layernorm", "router", "linear_fc1.weight", "linear_fc1.layer_norm", "linear_fc2")


def _module_place(suffix: str) -> tuple[int, int]:
    return _expert(suffix), next(i for i, part in enumerate(_PLACES) if part in suffix)


def _expert(suffix: str) -> int:
    """The expert's number, -1 for what all tokens meet."""
    parts = suffix.split(".")
    return int(next((part for part in parts if part.isdigit()), -1)) if "experts" in parts else -1
