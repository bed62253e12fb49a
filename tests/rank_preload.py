"""What the fork server of tests/ranks.py imports once, so that each rank starts in a moment."""

import os

# Read when OpenMP and Triton are loaded. Several ranks share few cores; without a GPU Triton's kernels, and its own
# library of them, run in its interpreter, which asks again at each call.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import matplotlib.pyplot  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402, F401

import megatron_dgpo.sft  # noqa: E402, F401
import megatron_dgpo.statistics.fused  # noqa: E402, F401
import megatron_dgpo.trainer  # noqa: E402, F401
