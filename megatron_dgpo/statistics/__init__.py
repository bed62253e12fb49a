"""Vocab-parallel log-probability, entropy and Hellinger distance, from hidden states; logits are never stored."""

from megatron_dgpo.statistics.chunked import TokenStatistics, token_statistics
from megatron_dgpo.statistics.dense import dense_statistics

__all__ = ["TokenStatistics", "dense_statistics", "token_statistics"]
