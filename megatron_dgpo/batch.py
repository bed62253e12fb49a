"""A padded batch of prompts with their responses, and the packed view of its response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Batch:
    """B sequences of prompt + response, left-aligned and padded on the right to a common length S.

    tokens: [B, S] int64. response_mask: [B, S] bool, True on response tokens (never on column 0).
    advantages: [B] float32, one per response. generator_logprobs: [B, S] float32, what the engine that
    sampled the tokens reported for them, 0 off the mask. All on one device, identical on every
    model-parallel rank of a data-parallel replica.

    Packed view: the response tokens of the batch in row order; N = sum of response lengths. What becomes known of a
    micro-batch before the update travels with it, packed, on the last pipeline stage alone: reference_states [N, H]
    (`Reference.attach`), and old_logprobs and credit, [N] float32 each (`Objective.freeze`).

    Example: B = 2, S = 4, N = 3.

    >>> batch = Batch.from_sequences([[1, 2, 3], [4]], [[7], [8, 9]], advantages=[1.0, -1.0])
    >>> batch.tokens.tolist()
    [[1, 2, 3, 7], [4, 8, 9, 0]]
    >>> batch.response_mask.int().tolist()
    [[0, 0, 0, 1], [0, 1, 1, 0]]
    >>> batch.targets.tolist(), batch.cu_seqlens.tolist()
    ([7, 8, 9], [0, 1, 3])

    A token is predicted by the state before it. With states that are their own positions, [S, B, 1]:

    >>> states = torch.arange(4).view(4, 1, 1).expand(4, 2, 1)
    >>> batch.pack_hidden_states(states).flatten().tolist()
    [2, 0, 1]
    """

    tokens: torch.Tensor
    response_mask: torch.Tensor
    advantages: torch.Tensor
    generator_logprobs: torch.Tensor
    reference_states: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    credit: torch.Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        advantages: Sequence[float] | None = None,
        logprobs: Sequence[Sequence[float]] | None = None,
        multiple_of: int = 1,
    ) -> Batch:
        """Pad token lists to [B, S], S a multiple of `multiple_of` (the tensor-parallel size under SP)."""
        length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        length = -(-length // multiple_of) * multiple_of
        size = (len(prompts), length)
        tokens = torch.zeros(size, dtype=torch.int64)
        mask = torch.zeros(size, dtype=torch.bool)
        sampled = torch.zeros(size, dtype=torch.float32)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, stop = len(prompt), len(prompt) + len(response)
            tokens[row, :stop] = torch.tensor([*prompt, *response], dtype=torch.int64)
            mask[row, start:stop] = True
            if logprobs is not None:
                sampled[row, start:stop] = torch.tensor(logprobs[row], dtype=torch.float32)
        scores = torch.zeros(len(prompts)) if advantages is None else torch.tensor(advantages, dtype=torch.float32)
        return cls(tokens, mask, scores, sampled)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.tokens[rows], self.response_mask[rows], self.advantages[rows], self.generator_logprobs[rows])

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.tokens.to(device),
            self.response_mask.to(device),
            self.advantages.to(device),
            self.generator_logprobs.to(device),
        )

    def split(self, size: int) -> list[Batch]:
        """Consecutive batches of `size` rows, without what is known of this one's; the last may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    @property
    def position_ids(self) -> torch.Tensor:
        """[B, S] int64."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """[B + 1] int64: where each response starts among the packed response tokens."""
        lengths = self.response_mask.sum(1)
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    @property
    def targets(self) -> torch.Tensor:
        """[N] int64: the response tokens."""
        return self.tokens[self.response_mask]

    @property
    def packed_generator_logprobs(self) -> torch.Tensor:
        """[N] float32."""
        return self.generator_logprobs[self.response_mask]

    def pack_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[S, B, H] final hidden states -> [N, H]: for each response token, the state that predicts it."""
        return hidden_states.transpose(0, 1)[:, :-1][self.response_mask[:, 1:]]


def with_known(micro_batches: list[Batch], found: list[dict[str, torch.Tensor]]) -> list[Batch]:
    """The same with each one's packed fields in `found`, which is empty on all pipeline stages but the last."""
    known = found or [{}] * len(micro_batches)
    return [replace(batch, **fields) for batch, fields in zip(micro_batches, known, strict=True)]
