"""config.json as transformers reads it: its defaults, its windows, and one sentence for what is not supported."""

import json

import pytest
import transformers

from megatron_dgpo.errors import UsageError
from megatron_dgpo.weights.architectures import FAMILIES, read_architecture

REQUIRED = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=32, vocab_size=131
) | dict(max_position_embeddings=256, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def architecture(folder, name, **changes):
    config = {"architectures": [name], "model_type": FAMILIES[name].name} | REQUIRED | changes
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_keys_have_transformers_defaults(tmp_path, name):
    ours = architecture(tmp_path, name)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    heads = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.head_dim == heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.normalized_routing == getattr(theirs, "norm_topk_prob", True)
    assert theirs.hidden_act == "silu"


def windows(config) -> set:
    """What each layer of transformers' model attends to."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {config.sliding_window if kind == "sliding_attention" else None for kind in kinds}


WINDOWED = [name for name in FAMILIES if name != "LlamaForCausalLM"]


@pytest.mark.parametrize("switch", [None, False, True])
@pytest.mark.parametrize("first", [None, 0, 1, 4])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_transformers(tmp_path, name, switch, first):
    """As older versions wrote them, without layer_types; a model whose layers differ is refused."""
    keys = {"use_sliding_window": switch, "max_window_layers": first}
    keys = {"sliding_window": 8} | {key: value for key, value in keys.items() if value is not None}
    try:
        ours = architecture(tmp_path, name, **keys).sliding_window
    except UsageError as error:
        theirs = windows(transformers.AutoConfig.from_pretrained(tmp_path))
        # vLLM would give every layer the window that no layer has.
        assert theirs == {None, 8} or theirs == {None}, error
        assert "max_window_layers" in str(error) or "use_sliding_window to false" in str(error)
    else:
        assert windows(transformers.AutoConfig.from_pretrained(tmp_path)) == {ours}


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("Qwen3ForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "quantised"]),
        ("Qwen2ForCausalLM", {"model_type": "llama"}, ["model_type='llama'", "'qwen2'"]),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3", "low_freq_factor"]),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "llama3"} | LLAMA3 | {"factor": "4"}}, ["factor='4'"]),
        ("LlamaForCausalLM", {"rope_parameters": [1]}, ["rope_parameters=[1]"]),
        ("LlamaForCausalLM", {"num_hidden_layers": 10**12}, ["num_hidden_layers=1000000000000", "4096"]),
        ("LlamaForCausalLM", {"num_attention_heads": "32"}, ["num_attention_heads='32'", "integer"]),
        ("LlamaForCausalLM", {"num_attention_heads": 0}, ["num_attention_heads=0", "greater than 0"]),
        ("LlamaForCausalLM", {"num_key_value_heads": 5}, ["num_key_value_heads=5", "num_attention_heads=32"]),
        ("LlamaForCausalLM", {"max_position_embeddings": None}, ["max_position_embeddings=None"]),
        ("LlamaForCausalLM", {"architectures": {"a": 1}}, ["{'a': 1}", "not supported"]),
        ("MixtralForCausalLM", {"num_experts": 2**17}, ["4 layers of 131072 experts"]),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "8 experts"]),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, ["layer_types", "1 entries"]),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 4}, ["sliding_window"]),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 4}, ["sliding_window=4096", "null"]),
    ],
)
def test_faulty_config_is_explained(tmp_path, name, changes, expected):
    with pytest.raises(UsageError) as caught:
        architecture(tmp_path, name, **changes)
    assert all(part in str(caught.value) for part in [str(tmp_path / "config.json"), *expected]), caught.value


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 10**5, '{"a": "\\ud83d"}', "\x00"])
def test_what_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="config.json"):
        read_architecture(tmp_path)


def test_quantisation_beside_the_config_is_noticed(tmp_path):
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"hf_quant_config\.json.*quantised"):
        architecture(tmp_path, "LlamaForCausalLM")
