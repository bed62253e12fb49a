"""Model directories and checkpoints of others: config.json, safetensors, their index, .metadata, .distcp, manifests."""

import json
import pickle
import shutil
import struct
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dgpo import legality
from megatron_dgpo.config import Parallel
from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import Layout
from megatron_dgpo.manifest import MANIFEST, check_architecture, newest, read_manifest
from megatron_dgpo.weights.architectures import FAMILIES, read_architecture
from megatron_dgpo.weights.convert import Job, convert
from megatron_dgpo.weights.directory import HfDirectory
from megatron_dgpo.weights.distributed import DistributedCheckpoint
from megatron_dgpo.weights.formats import INDEX, SINGLE
from megatron_dgpo.weights.load import check_weights
from tests.fuzz import fuzz
from tests.fuzz.json_text import nearly
from tools.bench_convert import generate
from tools.tiny_models import FAMILIES as DENSE
from tools.tiny_models import MIXTURES, SIZES

TINY = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, vocab_size=7, head_dim=4)
# Of 4,096 layers, or 131,072 mixtures of experts, and three tensors each.
MOST_TENSORS = 3 * 2**17 + 12 * 2**12


def outcome(call, *arguments):
    """What it returns, or None where it raised one sentence."""
    try:
        return call(*arguments)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1, error
        assert len(str(error)) < 1500, error
        return None


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("fuzz") / "hf", 1, **TINY)


@pytest.fixture(scope="module")
def megatron(hf):
    target = hf.parent / "megatron"
    convert(Job(hf, target, "megatron"))
    return target


@pytest.fixture(scope="module")
def copies(hf, megatron):
    """Of both, for examples to change a file of, as every example does anew."""
    return shutil.copytree(hf, hf.parent / "hf2"), shutil.copytree(megatron, hf.parent / "megatron2")


def config_of(name: str) -> dict:
    sizes = SIZES | (DENSE | MIXTURES)[FAMILIES[name].name] | {"vocab_size": 131}
    return {"architectures": [name], "model_type": FAMILIES[name].name, "eos_token_id": 2, **sizes}


KEYS = (
    "head_dim",
    "rope_scaling",
    "rope_theta",
    "quantization_config",
    "layer_types",
    "use_sliding_window",
    "mlp_bias",
)
KEYS += ("sliding_window", "max_window_layers", "num_local_experts", "attention_bias", "hidden_act", "rms_norm_eps")
parallels = st.builds(
    Parallel.model_construct,
    tensor=st.integers(1, 3),
    pipeline=st.integers(1, 3),
    data=st.integers(1, 2),
    expert=st.integers(1, 3),
    chunks_per_stage=st.integers(1, 2),
    sequence=st.booleans(),
)


@fuzz
@given(content=st.sampled_from(list(FAMILIES)).flatmap(lambda name: nearly(config_of(name), KEYS)), parallel=parallels)
def test_config(copies, content, parallel):
    folder = copies[0].parent / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    architecture = outcome(read_architecture, folder)
    if architecture:
        assert len(architecture.hf_shapes) <= MOST_TENSORS
        legality.first(legality.of_model(architecture, Layout.from_config(parallel), folder))
        outcome(check_weights, architecture, folder)


def tensors_of(kind, folder, architecture):
    weights = kind(folder, architecture)
    for name in architecture.parameters:
        for _, tensor in weights.tensors(name):
            tensor.float().sum()
    return weights


@fuzz
@given(data=st.data())
def test_safetensors(hf, copies, data):
    content = (hf / SINGLE).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = data.draw(nearly(json.loads(content[8 : 8 + size])))
    size = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    (copies[0] / SINGLE).write_bytes(struct.pack("<Q", size) + header + content[8 + size :])
    outcome(tensors_of, HfDirectory, copies[0], read_architecture(hf))


@fuzz
@given(data=st.data())
def test_index(hf, copies, data):
    architecture = read_architecture(hf)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(architecture.hf_shapes, SINGLE)}
    shutil.copy(hf / SINGLE, copies[0])
    (copies[0] / INDEX).write_bytes(data.draw(nearly(index)))
    try:
        outcome(tensors_of, HfDirectory, copies[0], architecture)
    finally:
        (copies[0] / INDEX).unlink()


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes changed, put in, taken out or repeated, or all of it cut short."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.integers(0, 8))
        new = draw(st.binary(max_size=8) | st.just(bytes(changed[at : at + 64])))
        changed[at : at + length] = new
    return bytes(changed[: draw(st.none() | st.integers(0, len(changed)))])


# What a writer of pickles could put there: PyTorch's classes empty, or with fields of other types.
def pickles(content: bytes):
    table = pickle.loads(content)
    key = next(iter(table.state_dict_metadata))
    index = next(iter(table.storage_data))
    entry, place = table.state_dict_metadata[key], table.storage_data[index]
    parts = [table, entry, entry.properties, entry.chunks[0], index, place]
    junk = st.sampled_from(
        [None, 1, -1, 2**70, "", "../x", (1,), [1], {}, torch.Size([3]), torch.Size([-1]), entry, place]
    )

    @st.composite
    def build(draw):
        part = draw(st.sampled_from(parts))
        fields = dict(part.__dict__)
        name = draw(st.sampled_from(list(fields)))
        try:
            object.__setattr__(part, name, draw(junk))
            return pickle.dumps(table)
        except Exception:
            # Such a table cannot even be written.
            return b""
        finally:
            part.__dict__.update(fields)

    return build()


@fuzz
@given(data=st.data())
def test_metadata(megatron, copies, data):
    content = (megatron / ".metadata").read_bytes()
    strategy = data.draw(st.sampled_from([damaged(content), pickles(content), st.binary(max_size=64)]))
    (copies[1] / ".metadata").write_bytes(data.draw(strategy))
    for file in megatron.glob("*.distcp"):
        shutil.copy(file, copies[1])
    outcome(tensors_of, DistributedCheckpoint, copies[1], read_architecture(megatron))


@fuzz
@given(data=st.data())
def test_distcp(megatron, copies, data):
    shutil.copy(megatron / ".metadata", copies[1])
    (file,) = megatron.glob("*.distcp")
    (copies[1] / file.name).write_bytes(data.draw(damaged(file.read_bytes())))
    outcome(tensors_of, DistributedCheckpoint, copies[1], read_architecture(megatron))


@fuzz
@given(data=st.data())
def test_manifest(hf, copies, data):
    folder = copies[0].parent / "checkpoints"
    (folder / "step_00000001").mkdir(parents=True, exist_ok=True)
    (folder / "step_00000001" / "common.pt").write_bytes(b"12345")
    manifest = {
        "progress": {"step": 1, "prompts": 2, "weight_version": 1},
        "architecture": {"family": "llama", "num_layers": 1},
        "layout": asdict(Layout(tensor=2, sequence=True)),
        "origins": {"model.path": ["m", "0a"]},
        "files": {"common.pt": [5, 1]},
    }
    (folder / "step_00000001" / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(folder / "step_00000001") == manifest
    (folder / "step_00000001" / MANIFEST).write_bytes(data.draw(nearly(manifest)))
    path = newest(folder)
    if path:
        found = read_manifest(path)
        assert all(isinstance(found["progress"][name], int) for name in ("step", "prompts", "weight_version"))
        outcome(check_architecture, path, found, read_architecture(hf))


def test_an_architecture_of_long_words(hf):
    theirs = {"family": ["x" * 3000], "num_layers": 10**400, "y" * 3000: 1}
    with pytest.raises(UsageError, match="a checkpoint of another model: ") as error:
        check_architecture(hf, {"architecture": theirs}, read_architecture(hf))
    assert len(str(error.value)) < 1500
    assert str(error.value).endswith("that this run was started with")
