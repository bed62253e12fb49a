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
class Response:
    """One rollout: its tokens, their log-probs under the distribution that they were drawn from, and its reward."""

    prompt: Prompt
    token_ids: list[int]
    """Its end token included when the model wrote one."""
    logprobs: list[float]
    finish_reason: str
    """stop: the model ended it; length: rollout.max_response_tokens did."""
    weight_version: int
    """Of the weights that sampled the first token."""
    text: str = ""
    reward: float = 0.0
    """0 until it is graded."""
    failure: str | None = None
    """Why a grader gave no reward."""

    @property
    def correct(self) -> bool:
        return self.reward >= 1.0
