"""`config.json` of a Hugging Face directory: every key that matters here, its type, range and transformers' default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, model_validator

from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.json_file import Content, checked

# Far above any model, and small enough that a list of the tensors, or of the divisors of a size, is made at once.
_Size = Annotated[int, Field(gt=0, lt=2**31)]
_Count = Annotated[int, Field(gt=0, le=4096)]
_MOST_MLPS = 2**17
_RopeType = Literal["default", "llama3"]

# A description of quantised weights, beside config.json or in it.
_QUANTISED_KEYS = ("quantization_config", "compression_config")
_QUANTISED_FILES = ("hf_quant_config.json",)


class Rope(Content):
    """Rotary positions; Llama 3.1's scaling has four more numbers."""

    rope_type: _RopeType
    rope_theta: PositiveFloat
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: _Size | None = None

    @property
    def scaling(self) -> dict | None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {"rope_type": self.rope_type, **{name: getattr(self, name) for name in names}}
        return scaling if self.rope_type == "llama3" else None

    @model_validator(mode="after")
    def _scaling_is_whole(self):
        missing = [name for name, value in (self.scaling or {}).items() if value is None]
        if missing:
            raise ValueError(f"rope_type llama3 needs {missing[0]}, which is missing")
        if self.scaling and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self


class HfConfig(Content):
    """Defaults are the same in all families; those that are not are in `Family.defaults`."""

    num_hidden_layers: _Count
    hidden_size: _Size
    intermediate_size: _Size
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    vocab_size: _Size
    max_position_embeddings: _Size
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: PositiveFloat = 10000.0
    rope_parameters: dict | None = None
    rope_scaling: dict | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    use_sliding_window: bool = False
    sliding_window: _Size | None = None
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    num_experts: _Size | None = None
    num_local_experts: _Size | None = None
    num_experts_per_tok: _Size | None = None
    moe_intermediate_size: _Size | None = None
    norm_topk_prob: bool = True
    decoder_sparse_step: Annotated[int, Field(ge=1, le=1)] = 1

    @property
    def heads_of_keys(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width_of_heads(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def experts(self) -> int:
        """transformers 5 writes num_local_experts for every family."""
        return self.num_local_experts or self.num_experts or 0

    @model_validator(mode="after")
    def _sizes_fit(self):
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        if heads % self.heads_of_keys:
            raise ValueError(f"num_key_value_heads={self.heads_of_keys} does not divide num_attention_heads={heads}")
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}")
        if self.width_of_heads % 2:
            raise ValueError(f"heads of {self.width_of_heads} numbers: rotary positions need an even head_dim")
        if self.layer_types is not None and len(self.layer_types) != layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={layers}")
        if layers * self.experts > _MOST_MLPS:
            raise ValueError(f"{layers} layers of {self.experts} experts are more than the {_MOST_MLPS} supported")
        return self


def read_hf_config(path: Path, content: dict, defaults: dict) -> tuple[HfConfig, Rope]:
    """`content`: of the file `path`. defaults: of its family. Raises UsageError naming a key, and what is expected."""
    for key in _QUANTISED_KEYS:
        if content.get(key) is not None:
            raise _quantised(f"{path}: {key}={shown(content[key])}")
    for name in _QUANTISED_FILES:
        if (path.parent / name).exists():
            raise _quantised(f"{path.parent / name}")
    config = checked(path, defaults | content, HfConfig)
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling, which win over them there.
    rope = dict(config.rope_scaling or config.rope_parameters or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in get_args(_RopeType):
        kind, supported = shown(rope["rope_type"], plain=True), " and ".join(get_args(_RopeType))
        raise UsageError(f"{path}: rope type {kind} is not supported; supported are {supported}")
    rope.setdefault("rope_theta", config.rope_theta)
    return config, checked(path, rope, Rope)


def sliding_window(path: Path, config: HfConfig, has_switch: bool, by_layer: bool) -> int | None:
    """Positions that tokens of every layer attend to, or None; by the rules of transformers' config classes.

    has_switch: use_sliding_window counts. by_layer: without layer_types, layers from max_window_layers on have it.
    Raises UsageError where some layers have a window, or where vLLM, which looks at sliding_window alone, would differ.
    """
    window = config.sliding_window if config.use_sliding_window or not has_switch else None
    sliding = set(config.layer_types or ())
    if config.layer_types is None and window:
        full = min(config.max_window_layers, config.num_hidden_layers) if by_layer else 0
        sliding = {"full_attention"} if full else set()
        sliding |= {"sliding_attention"} if full < config.num_hidden_layers else set()
    if len(sliding) > 1:
        source = "layer_types" if config.layer_types else f"max_window_layers={config.max_window_layers}"
        raise UsageError(f"{path}: {source} mixes full and sliding attention, which is not supported")
    if "sliding_attention" in sliding and window is None:
        raise UsageError(f"{path}: layer_types has sliding attention, but no sliding_window is in use; give one")
    if "full_attention" in sliding and window is not None:
        switch = "use_sliding_window to false" if has_switch else "sliding_window to null"
        raise UsageError(f"{path}: sliding_window={window}, but no layer is one of sliding attention; set {switch}")
    return window


def _quantised(found: str) -> UsageError:
    return UsageError(
        f"{found} says that the weights are quantised, and they would be read without their scales; give the model "
        "that they were made from"
    )
