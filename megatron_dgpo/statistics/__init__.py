"""Vocab-parallel log-probability, entropy and deviation from a reference; logits are never stored."""

from megatron_dgpo.statistics.dense import dense_statistics
from megatron_dgpo.statistics.vocab_parallel import TokenStatistics, token_statistics

__all__ = ["TokenStatistics", "dense_statistics", "token_statistics"]
