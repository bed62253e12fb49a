"""Hugging Face -> Megatron -> Hugging Face gives back the same bytes, files and all, in every layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.layouts import LAYOUTS, MIXTURE_LAYOUTS, make_config
from tests.ranks import run_ranks
from tools.tiny_models import FAMILIES, MIXTURES, make_tiny_model


def round_trip(model_dirs, targets, parallel, dtype, file_bytes=5 * 10**9):
    """Export every model; returns this rank's part of write_slices, and the stream's tensors, of each."""
    from megatron.core import parallel_state

    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.weights import export
    from megatron_dgpo.weights.architectures import read_architecture
    from megatron_dgpo.weights.load import load_weights
    from tests.full_tensors import write_slices

    init_device()
    export.FILE_BYTES = file_bytes
    written = {}
    for name, model_dir in model_dirs.items():
        config = make_config(model_dir, parallel, model={"dtype": dtype})
        architecture = read_architecture(model_dir)
        if not parallel_state.model_parallel_is_initialized():
            initialize_parallel(config.parallel, 1)
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        chunks = build_chunks(config, architecture)
        load_weights(chunks, architecture, model_dir, rank, size)
        export.export_hf(chunks, architecture, model_dir, targets[name], getattr(torch, dtype))
        shared = {n: torch.zeros(shape, dtype=getattr(torch, dtype)) for n, shape in architecture.hf_shapes.items()}
        write_slices(chunks, architecture, shared)
        written[name] = shared
    return written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(tmp_path, layout, dtype):
    sources = {family: make_tiny_model(tmp_path / family, family, dtype=getattr(torch, dtype)) for family in FAMILIES}
    sources["qwen3-tied"] = make_tiny_model(tmp_path / "tied", "qwen3", tie_word_embeddings=True, dtype=torch.float32)
    if dtype == "bfloat16":
        sources.pop("qwen3-tied")
    check(sources, tmp_path, *LAYOUTS[layout], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", MIXTURE_LAYOUTS)
def test_round_trip_of_mixtures(tmp_path, layout, dtype):
    sources = {family: make_tiny_model(tmp_path / family, family, dtype=getattr(torch, dtype)) for family in MIXTURES}
    check(sources, tmp_path, *MIXTURE_LAYOUTS[layout], dtype)


def check(sources, tmp_path, world_size, parallel, dtype):
    targets = {name: tmp_path / "out" / name for name in sources}
    results = run_ranks(round_trip, world_size, sources, targets, parallel, dtype)
    for name, source in sources.items():
        files = {path.name for path in source.iterdir()}
        assert {path.name for path in targets[name].iterdir()} == files
        for file in files:
            if file.endswith(".safetensors"):
                expected, found = load_file(source / file), load_file(targets[name] / file)
                assert expected.keys() == found.keys()
                for tensor in expected:
                    assert expected[tensor].dtype == found[tensor].dtype
                    assert torch.equal(expected[tensor], found[tensor]), tensor
                    # Zeros elsewhere: what the ranks wrote adds up to the tensor.
                    assert torch.equal(sum(written[name][tensor] for written in results), expected[tensor]), tensor
            else:
                assert (source / file).read_bytes() == (targets[name] / file).read_bytes(), file


def test_exported_model_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_tiny_model(tmp_path / "source", "llama")
    run_ranks(round_trip, 2, {"llama": source}, {"llama": tmp_path / "out"}, {"tensor": 2}, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_several_files_and_a_stored_head(tmp_path):
    """A tied head that the source has comes back; every file is within the limit, and the index agrees with all."""
    source, target = make_tiny_model(tmp_path / "source", "qwen3", tie_word_embeddings=True), tmp_path / "out"
    expected = load_file(source / "model.safetensors")
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"].clone()
    save_file(expected, source / "model.safetensors", metadata={"format": "pt"})
    run_ranks(round_trip, 2, {"tied": source}, {"tied": target}, {"pipeline": 2}, "float32", 10**5)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in target.glob("*.safetensors")}
    assert len(files) > 1
    assert index["weight_map"] == {tensor: file for file, tensors in files.items() for tensor in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in files.values()]
    assert max(sizes) <= 10**5 and sum(sizes) == index["metadata"]["total_size"]
    found = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
