"""The supported model families: what their Hugging Face config says, and where each Megatron tensor comes from.

Adding a dense family is a line in FAMILIES; a new kind of tensor is a line in PARAMETERS.
"""

from __future__ import annotations

import functools
import json
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


FAMILIES = {
    "LlamaForCausalLM": Family("llama", refused=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, refused=("attention_bias",)),
}

# Megatron parameter -> (how tensor-parallel ranks split it, Hugging Face tensors). Megatron's names are those of its
# Transformer Engine layers; {} stands for the layer's number.
#   vocab: rows split, padded to a multiple of the ranks    qkv: query groups split, [q.., k, v] together for each group
#   gate_up: rows of both split, gate above up              row: columns split              copy: the same on every rank
PARAMETERS = {
    "embedding.word_embeddings.weight": ("vocab", "model.embed_tokens.weight"),
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
    "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight": ("copy", "model.layers.{}.post_attention_layernorm.weight"),
    "decoder.layers.{}.mlp.linear_fc1.weight": (
        "gate_up",
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ),
    "decoder.layers.{}.mlp.linear_fc2.weight": ("row", "model.layers.{}.mlp.down_proj.weight"),
    "decoder.final_layernorm.weight": ("copy", "model.norm.weight"),
    "output_layer.weight": ("vocab", "lm_head.weight"),
}


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

    @functools.cached_property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Global Megatron name -> (split, Hugging Face names), first layer to last."""
        found = {}
        for name, (split, *sources) in PARAMETERS.items():
            if name.endswith("linear_qkv.bias") and not self.qkv_bias:
                continue
            if "_layernorm" in name and "self_attention" in name and not self.qk_norm:
                continue
            if name == "output_layer.weight" and self.tied_embeddings:
                continue
            for layer in range(self.num_layers) if "{}" in name else (0,):
                found[name.format(layer)] = (split, *(source.format(layer) for source in sources))
        return found

    @functools.cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model; a tied head is not among them."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
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
            "gate_proj.weight": (ffn, hidden),
            "up_proj.weight": (ffn, hidden),
            "down_proj.weight": (hidden, ffn),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "norm.weight": (hidden,),
        }
        names = [name for _, *sources in self.parameters.values() for name in sources]
        return {name: by_suffix[".".join(name.split(".")[-2:])] for name in names}


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
        "intermediate_size": architecture.ffn_hidden_size,
    }
    divide("parallel.tensor", parallel.tensor, heads)
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
