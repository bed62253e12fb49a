"""Token ids against the rows of the embedding: one beyond them has no vector and no log-prob."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.json_file import Content, checked, read_object
from megatron_dgpo.weights.architectures import Architecture

_Ids = int | Annotated[list[int], Field(max_length=1024)] | None


class _EndTokens(Content):
    eos_token_id: _Ids = None


def check_token_ids(architecture: Architecture, model_dir: Path, tokenizer) -> None:
    """Raise UsageError when the tokenizer, config.json or generation_config.json has a token that the model lacks.

    Then no text, whatever it is, has one.
    """
    rows = architecture.vocab_size
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if last >= rows:
        raise UsageError(
            f"the tokenizer of {model_dir} has tokens up to number {last} ({shown(token)}), but its config.json has "
            f"vocab_size={rows}; give the model its own tokenizer, or resize its embedding"
        )
    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        ids = checked(path, read_object(path), _EndTokens).eos_token_id if path.is_file() else None
        for token_id in [ids] if isinstance(ids, int) else ids or []:
            if not 0 <= token_id < rows:
                raise UsageError(
                    f"{path}: eos_token_id={shown(token_id)} is no token of a model of vocab_size={rows}; "
                    "give the number of the token that ends a response"
                )
