"""Make the data and the untrained model of the arithmetic example.

A problem is a sum of two three-digit numbers; its solution works column by column from the right, a line
`digit+digit+carry=sum` each, and ends in `#### result`. The solutions for the warm-up come from a careless pupil who
often forgets a carry, so that a model that imitates them is mediocre in a way that it can find out by itself.
Held-out problems do not occur in the training files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "0123456789+= #\n"
DIGITS = 3
FORGETS = 0.65  # of the carries; above one half, so that greedy decoding forgets them too
SFT_PROBLEMS, TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 8192, 8192, 512


def solve(a: int, b: int, pupil: random.Random) -> str:
    """A careless working of a + b: right but for the carries that are forgotten."""
    lines, carry, result = [], 0, ""
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        if carry and pupil.random() < FORGETS:
            carry = 0
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={total}")
        carry, result = total // 10, f"{total % 10}{result}"
    return "\n".join([*lines, f"#### {carry or ''}{result}"])


def make_problems(count: int, seed: int) -> list[dict]:
    """Distinct sums; the same seed gives the same ones."""
    generator = random.Random(seed)
    problems: dict[str, dict] = {}
    while len(problems) < count:
        a, b = (generator.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
        problems[f"{a}+{b}\n"] = {"question": f"{a}+{b}\n", "answer": str(a + b), "response": solve(a, b, generator)}
    return list(problems.values())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character.

    As bytes without merges rather than as words: `AutoTokenizer` puts Qwen2's own splitting around the vocabulary of
    any Qwen2 model, which lost spaces and newlines of a word-level one; bytes read the same either way.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = [byte_level.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    tokens = ["<pad>", "<eos>", *written]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def make_model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=128,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data and the model")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    problems = make_problems(SFT_PROBLEMS + TRAIN_PROBLEMS + HELD_OUT_PROBLEMS, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    start = 0
    for name, count in (("sft", SFT_PROBLEMS), ("train", TRAIN_PROBLEMS), ("held_out", HELD_OUT_PROBLEMS)):
        rows = problems[start : start + count]
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        start += count
    model = make_model(options.seed)
    model.save_pretrained(options.out / "model")
    make_tokenizer().save_pretrained(options.out / "model")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {start} problems in {options.out}")


if __name__ == "__main__":
    main()
