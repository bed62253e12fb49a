"""Reinforcement learning of large language models with DGPO (arXiv 2605.03327) on Megatron-Core and vLLM.

`megatron_dgpo.cli` is the command, `megatron_dgpo.trainer` the loop. Importing the package itself loads nothing else.
"""

__version__ = "0.1.0"
