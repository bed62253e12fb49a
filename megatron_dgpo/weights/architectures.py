"""The supported model families: what their Hugging Face config says, and where each Megatron tensor comes from.

Adding a family is an entry in FAMILIES; a new kind of tensor is a line in one of the tables of parameters.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_dgpo.config import Parallel
from megatron_dgpo.errors import UsageError


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


FAMILIES = {
    "LlamaForCausalLM": Family("llama", refused=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, refused=("attention_bias",)),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", qk_norm=True, refused=("attention_bias", "mlp_only_layers"), expert_ffn="moe_intermediate_size"
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        expert_ffn="intermediate_size",
        renamed=((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")),
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
        found = [(name, *entry) for name, entry in EMBEDDING.items()]
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

    Raises UsageError when the directory, the file or a key is missing, or when the model is not of a supported family.
    """
    if not model_dir.is_dir():
        raise UsageError(f"model directory {model_dir} does not exist: give a Hugging Face directory")
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise UsageError(f"{path} is missing or unreadable: {model_dir} is not a Hugging Face directory") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    names = config.get("architectures") or ["none"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise UsageError(f"{path}: architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}")
    for switch in family.refused:
        if config.get(switch):
            raise UsageError(f"{path}: {switch}={config[switch]} of {names[0]} is not supported; it must be false")
    if config.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{path}: hidden_act={config['hidden_act']} is not supported; it must be silu")
    if family.expert_ffn and config.get("decoder_sparse_step", 1) != 1:
        step = config["decoder_sparse_step"]
        raise UsageError(f"{path}: decoder_sparse_step={step} is not supported; every layer must have experts")
    try:
        return _architecture(config, family, path)
    except KeyError as error:
        raise UsageError(f"{path}: key {error} is missing") from None


def _architecture(config: dict, family: Family, path: Path) -> Architecture:
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UsageError(f"{path}: rope type {rope_type} is not supported; supported are default and llama3")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and "sliding_attention" not in config.get("layer_types", ["sliding_attention"]):
        window = None
    if window and "full_attention" in config.get("layer_types", []):
        raise UsageError(f"{path}: layer_types mixes full and sliding attention, which is not supported")
    heads = config["num_attention_heads"]
    mixture = {}
    if family.expert_ffn:
        # transformers 5 writes num_local_experts for every family.
        mixture = dict(
            num_experts=config["num_local_experts"] if "num_local_experts" in config else config["num_experts"],
            experts_per_token=config["num_experts_per_tok"],
            expert_ffn_hidden_size=config[family.expert_ffn],
            # Qwen3-MoE's default is false; Mixtral always normalises.
            normalized_routing=config.get("norm_topk_prob", family.name != "qwen3_moe"),
            renamed=family.renamed,
        )
    return Architecture(
        family=family.name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling={k: v for k, v in rope.items() if k != "rope_theta"} if rope_type == "llama3" else None,
        max_positions=config["max_position_embeddings"],
        sliding_window=window,
        **mixture,
    )


def check_layout(architecture: Architecture, parallel: Parallel, model_dir: Path) -> None:
    """Raise UsageError when the parallel sizes do not divide the model."""

    def divide(setting: str, size: int, sizes: dict[str, int]) -> None:
        for name, count in sizes.items():
            if count % size:
                legal = [n for n in range(1, count + 1) if all(c % n == 0 for c in sizes.values())]
                raise UsageError(
                    f"{setting}={size} does not divide {name}={count} of {model_dir}; use {_listed(legal)}"
                )

    heads = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
    }
    if not architecture.num_experts:
        heads["intermediate_size"] = architecture.ffn_hidden_size
    divide("parallel.tensor", parallel.tensor, heads)
    if architecture.num_experts:
        divide("parallel.expert", parallel.expert, {"number of experts": architecture.num_experts})
        ranks = parallel.tensor * (parallel.data or 1)
        if ranks % parallel.expert:
            raise UsageError(
                f"parallel.expert={parallel.expert} does not divide parallel.tensor × data = {ranks}, the ranks of a "
                "pipeline stage"
            )
        if parallel.tensor > 1 and not parallel.sequence:
            raise UsageError("a mixture of experts with parallel.tensor above 1 needs parallel.sequence=true; set it")
    elif parallel.expert > 1:
        raise UsageError(
            f"parallel.expert={parallel.expert}, but {model_dir} has no mixture of experts; set parallel.expert=1"
        )
    if parallel.chunks_per_stage > 1 and parallel.pipeline == 1:
        raise UsageError(
            f"parallel.chunks_per_stage={parallel.chunks_per_stage} needs parallel.pipeline above 1; "
            "set parallel.chunks_per_stage=1"
        )
    stages = parallel.pipeline * parallel.chunks_per_stage
    divide("parallel.pipeline × chunks_per_stage", stages, {"num_hidden_layers": architecture.num_layers})
    if parallel.sequence and parallel.tensor == 1:
        raise UsageError("parallel.sequence=true needs parallel.tensor above 1; set parallel.sequence=false")


def _listed(numbers: list[int]) -> str:
    *most, last = [str(n) for n in numbers]
    return f"{', '.join(most)} or {last}" if most else last
