"""Before anything imports Triton: without a GPU its kernels, and its own library of them, run in its interpreter."""

import importlib
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("megatron_dgpo.statistics.fused")
    # Not for the servers that tests start.
    del os.environ["TRITON_INTERPRET"]
