"""Micro-batches of a fixed number of sequences each, for tests of what runs them. Runs in ranks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dgpo.config import Parallel
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence


def micro_batches(rows: Sequence[tuple], size: int, parallel: Parallel) -> list[MicroBatch]:
    """Of `size` sequences each, of this replica's share of the rows, which are dealt in turn.

    rows: arguments of `TrainingSequence.of`.
    """
    from megatron_dgpo.model.packed import pack_micro_batches
    from megatron_dgpo.model.parallel import replica

    number, replicas = replica()
    mine = [TrainingSequence.of(*row) for row in rows[number::replicas]]
    return pack_micro_batches([mine[first : first + size] for first in range(0, len(mine), size)], parallel)
