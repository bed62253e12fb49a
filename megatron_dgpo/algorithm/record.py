"""What a step's credit was made of, token by token, on disk: for tools that look at it without a model."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_dgpo.errors import UsageError
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence

TOKENS = ("logprobs", "entropy", "log_ratio", "square_prob", "credit", "deviation", "reference_logprobs")
"""Float32 of each response token; the last two only where there is a reference. square_prob: Σ π² of all tokens."""


@dataclass(frozen=True)
class CreditOfResponse:
    """One response as it was scored: [T] float32 each, of the policy whose deviation is scored."""

    advantage: float
    """Before credit redistributes it."""
    counted: bool
    tau: float | None
    """Where the response has its own."""
    tokens: dict[str, np.ndarray]
    """By the names in TOKENS."""


class CreditRecord:
    """A rank's part of a step. `Objective` adds each micro-batch when it is scored; kept on the host.

    keeps: whether this rank is the one that writes; of those that score the same tokens, the first tensor- and
    context-parallel rank.
    """

    def __init__(self, keeps: bool) -> None:
        self._keeps = keeps
        self._parts: list[dict[str, np.ndarray]] = []

    def add(
        self, batch: MicroBatch, values: dict[str, torch.Tensor], credit: torch.Tensor, tau: torch.Tensor | None
    ) -> None:
        """values: [M] by the names in TOKENS, of the micro-batch's whole responses; so is credit. tau: [B]."""
        if not self._keeps:
            return
        part = {name: tensor.float().cpu().numpy() for name, tensor in (values | {"credit": credit}).items()}
        part["tau"] = np.full(len(batch), np.nan, np.float32) if tau is None else tau.float().cpu().numpy()
        part["lengths"] = batch.cu_responses.diff().cpu().numpy()
        self._parts.append(part)

    def write(self, file: Path, sequences: Sequence[TrainingSequence]) -> None:
        """What was added, if anything was, and forget it. sequences: of all micro-batches, in their order."""
        parts, self._parts = self._parts, []
        if not parts:
            return
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if len(columns["lengths"]) != len(sequences):
            raise ValueError(f"{len(columns['lengths'])} responses were scored, of {len(sequences)}")
        columns["position"] = np.array([sequence.key[0] for sequence in sequences], np.int64)
        columns["member"] = np.array([sequence.key[1] for sequence in sequences], np.int64)
        columns["advantage"] = np.array([sequence.advantage for sequence in sequences], np.float32)
        columns["counted"] = np.array([sequence.counted for sequence in sequences], bool)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}")
        with partial.open("wb") as stream:
            np.savez(stream, **columns)
        partial.rename(file)


def file_of_credit(folder: Path, step: int, replica: int) -> Path:
    """Of the responses that a data-parallel replica trained on, which are not those that it sampled."""
    return folder / f"step_{step:08d}.{replica}.npz"


def read_credit(folder: Path, step: int) -> dict[tuple[int, int], CreditOfResponse]:
    """{(position of its group in the run's order of prompts, place in the group): response}, of all replicas.

    Raises UsageError where nothing was recorded, or a file is not whole.
    """
    files = sorted(folder.glob(f"step_{step:08d}.*.npz"))
    if not files:
        raise UsageError(f"{folder}: no credit of step {step} was recorded; train with rollout.record=true")
    found = {}
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as columns:
                held = {name: columns[name] for name in columns.files}
            ends = np.cumsum(held["lengths"])[:-1]
            tokens = {name: np.split(held[name], ends) for name in TOKENS if name in held}
            for place, key in enumerate(zip(held["position"].tolist(), held["member"].tolist(), strict=True)):
                tau = float(held["tau"][place])
                found[key] = CreditOfResponse(
                    float(held["advantage"][place]),
                    bool(held["counted"][place]),
                    None if np.isnan(tau) else tau,
                    {name: parts[place] for name, parts in tokens.items()},
                )
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise UsageError(f"{file}: is not a whole record of credit ({error})") from None
    return found
