"""The supported model families: what their Hugging Face config says, and where each Megatron tensor comes from.

Adding a family is an entry in FAMILIES; a new kind of tensor is a line in one of the tables of parameters.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.json_file import read_object
from megatron_dgpo.weights.hf_config import HfConfig, read_hf_config, sliding_window


@dataclass(frozen=True)
class Family:
    name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    refused: tuple[str, ...] = ()
    """Config switches that would add tensors or change the computation; they must be off."""
    expert_ffn: str = ""
    """The config's key for an expert's intermediate size; empty: no mixture of experts."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of the Hugging Face names in the tables below, and what this family calls them."""
    window_switch: bool = False
    """A sliding window counts only with use_sliding_window."""
    window_by_layer: bool = False
    """Layers before max_window_layers have none."""
    defaults: dict = field(default_factory=dict)
    """What transformers takes for keys that config.json lacks, where families differ."""


FAMILIES = {
    "LlamaForCausalLM": Family("llama", refused=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("mistral", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        qkv_bias=True,
        window_switch=True,
        window_by_layer=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qk_norm=True,
        refused=("attention_bias",),
        window_switch=True,
        window_by_layer=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        qk_norm=True,
        refused=("attention_bias", "mlp_only_layers"),
        expert_ffn="moe_intermediate_size",
        window_switch=True,
        defaults={"num_key_value_heads": 4, "sliding_window": 4096, "norm_topk_prob": False},
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        expert_ffn="intermediate_size",
        renamed=((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")),
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
}

# Megatron parameter -> (how tensor-parallel ranks split it, Hugging Face tensors). Megatron's names are those of its
# Transformer Engine layers; the first {} stands for the layer's number, the second for the expert's.
#   vocab: rows split, padded to a multiple of the ranks    qkv: query groups split, [q.., k, v] together for each group
#   gate_up: rows of both split, gate above up              row: columns split              copy: the same on every rank
# Experts are not split: each is whole on one rank of an expert-parallel group.
EMBEDDING = {"embedding.word_embeddings.weight": ("vocab", "model.embed_tokens.weight")}
ATTENTION = {
    "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight": ("copy", "model.layers.{}.input_layernorm.weight"),
    "decoder.layers.{}.self_attention.linear_qkv.weight": (
        "qkv",
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
    "decoder.layers.{}.self_attention.linear_qkv.bias": (
        "qkv",
        "model.layers.{}.self_attn.q_proj.bias",
        "model.layers.{}.self_attn.k_proj.bias",
        "model.layers.{}.self_attn.v_proj.bias",
    ),
    "decoder.layers.{}.self_attention.q_layernorm.weight": ("copy", "model.layers.{}.self_attn.q_norm.weight"),
    "decoder.layers.{}.self_attention.k_layernorm.weight": ("copy", "model.layers.{}.self_attn.k_norm.weight"),
    "decoder.layers.{}.self_attention.linear_proj.weight": ("row", "model.layers.{}.self_attn.o_proj.weight"),
}
MLP = {
    "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight": ("copy", "model.layers.{}.post_attention_layernorm.weight"),
    "decoder.layers.{}.mlp.linear_fc1.weight": (
        "gate_up",
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ),
    "decoder.layers.{}.mlp.linear_fc2.weight": ("row", "model.layers.{}.mlp.down_proj.weight"),
}
# SequentialMLP and TEGroupedMLP number a rank's own experts, each in its way; in checkpoints both use these names.
MIXTURE = {
    "decoder.layers.{}.pre_mlp_layernorm.weight": ("copy", "model.layers.{}.post_attention_layernorm.weight"),
    "decoder.layers.{}.mlp.router.weight": ("copy", "model.layers.{}.mlp.gate.weight"),
    "decoder.layers.{}.mlp.experts.experts.{}.linear_fc1.weight": (
        "gate_up",
        "model.layers.{}.mlp.experts.{}.gate_proj.weight",
        "model.layers.{}.mlp.experts.{}.up_proj.weight",
    ),
    "decoder.layers.{}.mlp.experts.experts.{}.linear_fc2.weight": (
        "row",
        "model.layers.{}.mlp.experts.{}.down_proj.weight",
    ),
}
OUTPUT = {
    "decoder.final_layernorm.weight": ("copy", "model.norm.weight"),
    "output_layer.weight": ("vocab", "lm_head.weight"),
}


def expert_of(name: str) -> int | None:
    """The global number of the expert that a Megatron or Hugging Face tensor belongs to."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, SwiGLU and rotary positions, as its Hugging Face config describes it."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    """Of Llama 3.1 (`rope_type: llama3`), or None."""
    max_positions: int
    sliding_window: int | None
    """Positions a token attends to, itself included; None: all before it."""
    num_experts: int = 0
    """Of every layer; 0: a dense model."""
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    normalized_routing: bool = True
    """The chosen experts' weights add up to 1; otherwise they are softmax's over all experts."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Of Family."""

    @functools.cached_property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Global Megatron name -> (split, Hugging Face names), in the order of the computation."""
        found = {}
        for names in self._names:
            name, split, *sources = names
            found[name] = (split, *map(self._rename, sources))
        return found

    @functools.cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model; a tied head is not among them."""
        hidden = self.hidden_size
        ffn = self.expert_ffn_hidden_size if self.num_experts else self.ffn_hidden_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        by_suffix = {
            "embed_tokens.weight": (self.vocab_size, hidden),
            "lm_head.weight": (self.vocab_size, hidden),
            "q_proj.weight": (queries, hidden),
            "k_proj.weight": (keys, hidden),
            "v_proj.weight": (keys, hidden),
            "q_proj.bias": (queries,),
            "k_proj.bias": (keys,),
            "v_proj.bias": (keys,),
            "q_norm.weight": (self.head_dim,),
            "k_norm.weight": (self.head_dim,),
            "o_proj.weight": (hidden, queries),
            "gate.weight": (self.num_experts, hidden),
            "gate_proj.weight": (ffn, hidden),
            "up_proj.weight": (ffn, hidden),
            "down_proj.weight": (hidden, ffn),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "norm.weight": (hidden,),
        }
        names = [name for _, _, *sources in self._names for name in sources]
        return {self._rename(name): by_suffix[".".join(name.split(".")[-2:])] for name in names}

    @property
    def attention_weights(self) -> int:
        """Of one layer's projections."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        return self.hidden_size * 2 * (heads + groups) * self.head_dim

    @property
    def active_mlp_weights(self) -> int:
        """Of one layer that a token meets, a router's included."""
        ffn = self.expert_ffn_hidden_size * self.experts_per_token if self.num_experts else self.ffn_hidden_size
        return self.hidden_size * (3 * ffn + self.num_experts)

    @functools.cached_property
    def _names(self) -> list[tuple[str, ...]]:
        """(Megatron name, split, Hugging Face names as in the tables) of every parameter."""
        layer_table = ATTENTION | (MIXTURE if self.num_experts else MLP)
        if not self.qkv_bias:
            layer_table = {name: entry for name, entry in layer_table.items() if not name.endswith("linear_qkv.bias")}
        if not self.qk_norm:
            layer_table = {
                name: entry
                for name, entry in layer_table.items()
                if "k_layernorm" not in name and "q_layernorm" not in name
            }
        found: list[tuple[str, ...]] = [(name, *entry) for name, entry in EMBEDDING.items()]
        for layer in range(self.num_layers):
            for name, entry in layer_table.items():
                for expert in range(self.num_experts) if name.count("{}") > 1 else (0,):
                    found.append(tuple(text.format(layer, expert) for text in (name, *entry)))
        found += [(name, *entry) for name, entry in OUTPUT.items()]
        return [entry for entry in found if not (self.tied_embeddings and entry[0] == "output_layer.weight")]

    def _rename(self, name: str) -> str:
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name


def read_architecture(model_dir: Path) -> Architecture:
    """Read `config.json` of a Hugging Face directory.

    Raises UsageError when the directory, the file or a key is missing, when a value is wrong or not supported, and when
    the model is quantised or not of a supported family.
    """
    if not model_dir.is_dir():
        raise UsageError(f"model directory {model_dir} does not exist: give a Hugging Face directory")
    path = model_dir / "config.json"
    if not path.is_file():
        raise UsageError(f"{path} is missing or unreadable: {model_dir} is not a Hugging Face directory")
    content = read_object(path)
    names = content.get("architectures") or ["none"]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else shown(names)
    family = FAMILIES.get(name)
    if family is None:
        raise UsageError(
            f"{path}: architecture {shown(name, plain=True)} is not supported; supported are {', '.join(FAMILIES)}"
        )
    if content.get("model_type") != family.name:
        # transformers goes by one of them, vLLM by the other.
        found = shown(content.get("model_type"))
        raise UsageError(f"{path}: model_type={found} is not that of architecture {name}, {family.name!r}")
    for switch in family.refused:
        if content.get(switch):
            value = shown(content[switch])
            raise UsageError(f"{path}: {switch}={value} of {name} is not supported; it must be false")
    return _architecture(path, content, family)


def _architecture(path: Path, content: dict, family: Family) -> Architecture:
    config, rope = read_hf_config(path, content, family.defaults)
    return Architecture(
        family=family.name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.heads_of_keys,
        head_dim=config.width_of_heads,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope.rope_theta,
        rope_scaling=rope.scaling,
        max_positions=config.max_position_embeddings,
        sliding_window=sliding_window(path, config, family.window_switch, family.window_by_layer),
        **(_mixture(path, config, family) if family.expert_ffn else {}),
    )


def _mixture(path: Path, config: HfConfig, family: Family) -> dict:
    chosen, ffn = config.num_experts_per_tok, getattr(config, family.expert_ffn)
    for key, value in {
        "num_local_experts": config.experts,
        "num_experts_per_tok": chosen,
        family.expert_ffn: ffn,
    }.items():
        if not value:
            raise UsageError(f"{path}: key '{key}' is missing")
    if chosen and chosen > config.experts:
        raise UsageError(f"{path}: num_experts_per_tok={chosen} is more than the {config.experts} experts")
    return dict(
        num_experts=config.experts,
        experts_per_token=chosen,
        expert_ffn_hidden_size=ffn,
        # Mixtral has no such switch: its chosen experts always add up to 1.
        normalized_routing=config.norm_topk_prob or "norm_topk_prob" not in family.defaults,
        renamed=family.renamed,
    )
