"""Small random models of every supported family, with a real tokenizer, as `transformers` saves them."""

from __future__ import annotations

from pathlib import Path

import torch

# The head dimension differs from hidden / heads, 131 tokens are not a multiple of any parallel size, and groups of
# queries share keys: what a layout can get wrong. vLLM's CPU attention wants head dimensions of 32 and more.
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
FAMILIES = {
    "llama": dict(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        head_dim=32,
        tie_word_embeddings=False,
    ),
    "mistral": dict(sliding_window=8, head_dim=32, tie_word_embeddings=False),
    "qwen2": dict(hidden_size=128, tie_word_embeddings=True),
    "qwen3": dict(head_dim=32, tie_word_embeddings=False),
}
MIXTURES = {
    "qwen3_moe": dict(head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, norm_topk_prob=True),
    "mixtral": dict(head_dim=32, num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
}


def make_tiny_model(
    folder: Path, family: str, *, vocab_size: int = 131, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
) -> Path:
    """Save a random model of `family` with large enough weights that its predictions are far from uniform."""
    import transformers

    config_class = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "qwen3_moe": transformers.Qwen3MoeConfig,
        "mixtral": transformers.MixtralConfig,
    }[family]
    settings = SIZES | (FAMILIES | MIXTURES)[family] | overrides
    config = config_class(vocab_size=vocab_size, eos_token_id=2, bos_token_id=1, pad_token_id=0, **settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name else 0.0))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(vocab_size).save_pretrained(folder)
    return folder


def make_tokenizer(vocab_size: int):
    """One token a character; decoding gives back the text exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + [chr(0x100 + i) for i in range(vocab_size)]
    tokens = ["<pad>", "<bos>", "<eos>", "\n", *characters][:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
