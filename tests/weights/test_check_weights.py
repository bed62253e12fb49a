"""Models that would be loaded wrongly are refused before anything starts: quantised, odd tensors, foreign tokens."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dgpo.errors import UsageError
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.convert import Job, convert
from megatron_dgpo.weights.formats import INDEX
from megatron_dgpo.weights.load import check_weights
from tests.test_cli import Case
from tools.tiny_models import make_tiny_model, make_tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAST = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of tied embeddings."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen2")


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, *expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_weights(read_architecture(folder), folder)
    assert all(part in str(caught.value) for part in expected), caught.value
    assert len(str(caught.value).splitlines()) == 1


def add_tensors(folder, **tensors) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def fp8(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("fp8") / "model"
    convert(Job(model, target, "fp8"))
    return target


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_our_own_fp8_export_is_refused(fp8, tmp_path, capsys, command):
    case = Case(tmp_path, fp8)
    case.fails(capsys, ["config.json", "quantization_config", "quantised"], f"sft.data={case.data}", command=command)


def test_quantised_weights_are_known_by_their_type(model, fp8, tmp_path):
    """Where nothing else says so."""
    folder = shutil.copytree(fp8, tmp_path / "copy")
    shutil.copy(model / "config.json", folder)
    (folder / "hf_quant_config.json").unlink()
    refused(folder, "model.safetensors", "F8_E4M3", "BF16")


def test_export_of_a_quantised_source_does_not_copy_its_description(fp8, tmp_path):
    with pytest.raises(UsageError, match="quantised"):
        convert(Job(fp8, tmp_path / "out", "hf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.bias", "model.layers.4.mlp.down_proj.weight"])
def test_tensors_that_would_be_left_out_are_named(copy, name):
    add_tensors(copy, **{name: torch.zeros(4)})
    refused(copy, "model.safetensors", name, "not part of the model")


def test_tied_head_must_be_the_embedding(copy, monkeypatch):
    monkeypatch.setattr("megatron_dgpo.weights.load._COMPARED_NUMBERS", 1000)
    embedding = load_file(copy / "model.safetensors")[EMBEDDING]
    add_tensors(copy, **{HEAD: embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    check_weights(read_architecture(copy), copy)
    for other in (embedding.clone(), embedding[:-1].clone()):
        other[-1, -1] += 1
        add_tensors(copy, **{HEAD: other})
        refused(copy, "tie_word_embeddings=true", HEAD, EMBEDDING)


def test_other_type_of_model(copy):
    edit_config(copy, model_type="llama")
    refused(copy, "model_type='llama'", "Qwen2ForCausalLM")


@pytest.mark.parametrize(
    "index",
    ["[]", "{", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../model.safetensors"}}'],
)
def test_faulty_index_is_named(copy, index):
    (copy / INDEX).write_text(index)
    refused(copy, INDEX)


def test_tokens_without_an_embedding(copy, tmp_path, capsys):
    case = Case(tmp_path, copy)
    make_tokenizer(151).save_pretrained(copy)
    case.fails(capsys, ["tokenizer", "150", "vocab_size=131"])
    make_tokenizer(131).save_pretrained(copy)
    for file, ids in (("config.json", 131), ("generation_config.json", [2, 400])):
        before = (copy / file).read_text()
        (copy / file).write_text(json.dumps(json.loads(before) | {"eos_token_id": ids}))
        case.fails(capsys, [file, "eos_token_id=", "vocab_size=131"])
        (copy / file).write_text(before)
