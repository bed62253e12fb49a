"""What goes to the engines and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prompt:
    index: int
    """Row of the data set."""
    token_ids: list[int]
    text: str
    answer: str
    row: dict = field(default_factory=dict)
    """The whole row, for graders."""


@dataclass(frozen=True)
class Sample:
    """One response: its tokens, and their log-probs under the distribution that they were drawn from."""

    prompt: Prompt
    token_ids: list[int]
    """The response, its end token included when the model wrote one."""
    logprobs: list[float]
    finish_reason: str
    """stop: the model ended it; length: rollout.max_response_tokens did."""
    weight_version: int
    """Of the weights that sampled the first token."""
    text: str = ""
