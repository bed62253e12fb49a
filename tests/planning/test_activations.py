"""Activations that a stage keeps for the backward pass, against what autograd saves in a real forward pass."""

import pytest
import torch

from tests.layouts import make_config
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_model


def saved_bytes(model_dir, parallel, model, rows, length):
    """{what: bytes} of unique storages that autograd keeps after the forward pass of this rank's layers."""
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.weights.architectures import read_architecture

    init_device()
    config = make_config(model_dir, parallel, model=model)
    architecture = read_architecture(model_dir)
    initialize_parallel(config.parallel, 1)
    [chunk] = build_chunks(config, architecture)
    chunk.train()
    share = config.parallel.tensor if config.parallel.sequence else 1
    dtype = getattr(torch, config.model.dtype)
    hidden = torch.randn(length // share, rows, architecture.hidden_size, dtype=dtype, requires_grad=True)
    kept, tensors = {}, []
    parameters = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    import os, traceback

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in kept:
            stack = [f"{os.path.basename(f.filename)}:{f.lineno}:{f.name}" for f in traceback.extract_stack()[-8:-1]]
            kept[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape), str(tensor.dtype), stack[-3:])
        tensors.append(tensor)
        return tensor

    rotary = chunk.rotary_pos_emb(length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
    return list(kept.values()), out.sum().item()


if __name__ == "__main__":
    import sys, tempfile, pathlib

    d = make_tiny_model(pathlib.Path(tempfile.mkdtemp()) / "m", "qwen3", num_hidden_layers=1)
    for dtype in ("float32", "bfloat16"):
        for world, par in ((1, {}), (2, dict(tensor=2)), (2, dict(tensor=2, sequence=True))):
            for rec in ("none", "selective", "full"):
                r, _ = run_ranks(saved_bytes, world, d, par, dict(dtype=dtype, recompute=rec), 2, 64)[0]
                print(dtype, par, rec, sum(x[0] for x in r))
                if par in ({}, dict(tensor=2, sequence=True)) and rec != "full":
                    for x in r:
                        print("   ", x)
