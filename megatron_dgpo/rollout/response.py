"""What goes to the engines and what comes back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Key = int | tuple[str, int, int]
"""Of a group: its position in the run's order of prompts, or anything that is no number."""

NO_VERSION = -1
"""Of weights that no update has brought, or one that broke off."""


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
    versions: list[list[int]]
    """[version of the weights, first token, end] of each part, contiguous: who made which tokens."""
    text: str = ""
    reward: float = 0.0
    """0 until it is graded."""
    failure: str | None = None
    """Why a grader gave no reward."""
    components: dict[str, float] = field(default_factory=dict)
    """Several rewards in the order of reward.weights, of which `reward` is the weighted sum."""

    @property
    def correct(self) -> bool:
        return self.reward >= 1.0

    @property
    def oldest(self) -> int:
        """Version of the weights that made the first token."""
        return self.versions[0][0]

    @property
    def newest(self) -> int:
        """Version of the weights that made the last token."""
        return self.versions[-1][0]

    def is_of(self, first: int, last: int) -> bool:
        """Whether weights of the versions `first` to `last`, and no others, made it, one after the other."""
        found = [version for version, _, _ in self.versions]
        return first <= found[0] and found[-1] <= last and found == sorted(found)

    def lags(self, version: int) -> list[int]:
        """Of each token: versions that the weights that made it were behind this one."""
        return [version - made_by for made_by, start, end in self.versions for _ in range(start, end)]


def tokens_in(responses: Iterable[Response]) -> int:
    return sum(len(response.token_ids) for response in responses)
