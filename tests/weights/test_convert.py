"""tools/convert_checkpoint.py: the same bytes whichever way round, nothing half-written, every fault named."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dgpo.config import Checkpoint
from megatron_dgpo.weights import convert as convert_module
from megatron_dgpo.weights.convert import Conversion, Job, convert
from tests.checkpoints import save
from tests.layouts import make_config
from tests.ranks import run_ranks
from tools.bench_convert import PeakMemory, generate
from tools.convert_checkpoint import main
from tools.tiny_models import FAMILIES, MIXTURES, make_tiny_model

# Small enough that every tiny model has several files of either format.
FILE_BYTES = 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of one file."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def megatron(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "megatron"
    convert(Job(model, target, "megatron", file_bytes=FILE_BYTES))
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# Round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_round_trip(tmp_path, family, dtype):
    source = make_tiny_model(tmp_path / "source", family, dtype=getattr(torch, dtype))
    megatron, sharded, back = tmp_path / "megatron", tmp_path / "sharded", tmp_path / "back"
    convert(Job(source, megatron, "megatron", file_bytes=FILE_BYTES))
    assert len(list(megatron.glob("*.distcp"))) > 1
    convert(Job(megatron, sharded, "hf", file_bytes=FILE_BYTES))
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert_same(weights(sharded), weights(source))
    # From several files to one again: every file is what transformers wrote in the first place, byte for byte.
    convert(Job(sharded, back, "hf"), verify=True)
    assert {file.name for file in back.iterdir()} == {file.name for file in source.iterdir()}
    for file in source.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list(tmp_path.glob(".writing_*"))


def test_sharded_output_loads_in_transformers(megatron, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    convert(Job(megatron, tmp_path / "hf", "hf", dtype="bfloat16", file_bytes=FILE_BYTES), workers=2)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert loaded.dtype == torch.bfloat16
    assert not any(info.values())
    expected = {name: tensor.bfloat16() for name, tensor in weights(tmp_path / "hf").items()}
    assert_same(loaded.state_dict(), expected)
    AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == 2


def load_both_ways(model_dir, megatron_dir, parallel):
    """Differences between the trainer's weights from one and the other, and Megatron's own reading of the latter."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.weights.architectures import read_architecture
    from megatron_dgpo.weights.load import load_weights, named_shards

    init_device()
    config = make_config(model_dir, parallel)
    initialize_parallel(config.parallel, 1)
    architecture = read_architecture(megatron_dir)
    place = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()

    def loaded(folder):
        chunks = build_chunks(config, architecture)
        load_weights(chunks, architecture, folder, *place)
        return chunks

    expected = dict(named_shards(loaded(model_dir)))
    ours = loaded(megatron_dir)
    differences = [name for name, shard in named_shards(ours) if not torch.equal(shard, expected[name])]
    for chunk in ours:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(ours)}
    # Of Transformer Engine's FP8 recipes, of which a converted model has none.
    state = {name: {k: v for k, v in part.items() if "_extra_state" not in k} for name, part in state.items()}
    dist_checkpointing.load(state, str(megatron_dir))
    differences += [f"{name}*" for name, shard in named_shards(ours) if not torch.equal(shard, expected[name])]
    return differences, len(expected)


@pytest.mark.parametrize(
    "family, parallel",
    [
        *itertools.product(("qwen2", "qwen3"), ({"tensor": 2, "pipeline": 2}, {"pipeline": 2, "chunks_per_stage": 2})),
        *((family, {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2}) for family in MIXTURES),
    ],
)
def test_trainer_and_megatron_load_it_in_any_layout(tmp_path, family, parallel):
    source = make_tiny_model(tmp_path / "source", family)
    convert(Job(source, tmp_path / "megatron", "megatron", file_bytes=FILE_BYTES))
    world_size = parallel["pipeline"] * parallel.get("tensor", 1)
    for differences, count in run_ranks(load_both_ways, world_size, source, tmp_path / "megatron", parallel):
        assert not differences and count > 10


def save_checkpoint(model_dir, folder, parallel, stacked=True):
    """A training checkpoint, or, not stacked, the model alone with a tensor of its own for every layer."""
    from megatron.core import dist_checkpointing

    from megatron_dgpo.manifest import Progress
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.weights.architectures import read_architecture

    init_device()
    config = make_config(model_dir, parallel, model={"dtype": "bfloat16"})
    initialize_parallel(config.parallel, 1)
    architecture = read_architecture(model_dir)
    policy = Policy(config, architecture, 1)
    policy.load(model_dir)
    if stacked:
        return save(folder, policy, architecture, Progress(), Checkpoint())
    folder.mkdir(exist_ok=True)
    state = policy.modules[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
    dist_checkpointing.save(state, str(folder))
    return folder


@pytest.mark.parametrize(
    "family, parallel",
    [("qwen2", {"tensor": 2, "pipeline": 2}), ("llama", {}), ("mixtral", {"expert": 2, "pipeline": 2})],
)
def test_policy_of_a_training_checkpoint(tmp_path, capsys, family, parallel):
    source = make_tiny_model(tmp_path / "source", family, dtype=torch.bfloat16)
    (checkpoint, *_) = run_ranks(save_checkpoint, 4 if parallel else 1, source, tmp_path / "run", parallel)
    fails(capsys, ["config.json is missing", "--like"], checkpoint, tmp_path / "hf")
    assert main([str(checkpoint), str(tmp_path / "hf"), "--like", str(source), "--verify"]) == 0
    assert_same(weights(tmp_path / "hf"), weights(source))
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    other = make_tiny_model(tmp_path / "other", family, num_hidden_layers=2)
    fails(capsys, ["another model", "num_layers"], checkpoint, tmp_path / "hf2", "--like", other)


def test_layers_that_are_not_stacked(tmp_path):
    source = make_tiny_model(tmp_path / "source", "qwen3", dtype=torch.bfloat16)
    run_ranks(save_checkpoint, 2, source, tmp_path / "megatron", {"tensor": 2}, False)
    convert(Job(tmp_path / "megatron", tmp_path / "hf", "hf", like=source))
    assert_same(weights(tmp_path / "hf"), weights(source))


def test_tensors_that_follow_from_others_are_left_out(tmp_path):
    source = make_tiny_model(tmp_path / "source", "qwen2")
    expected = weights(source)
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    edit_weights(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()} | rotary))
    convert(Job(source, tmp_path / "megatron", "megatron"))
    convert(Job(tmp_path / "megatron", tmp_path / "hf", "hf"))
    assert_same(weights(tmp_path / "hf"), expected)


# Memory


def extra_bytes(job) -> int:
    with PeakMemory() as peak:
        start = peak.bytes
        convert(job)
    return peak.bytes - start


def test_memory_stays_at_a_few_tensors(tmp_path):
    """The allowance is far below the model; `tools/bench_convert.py` measures the bound itself on 9 GB."""
    widths = {"hidden_size": 1024, "intermediate_size": 4096, "num_key_value_heads": 8, "vocab_size": 49152}
    source = generate(tmp_path / "source", 14, **widths, head_dim=32)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    largest, allowance = 2 * 49152 * 1024, 96 * 2**20
    assert size > 2 * (2 * largest + allowance)
    for job in (
        Job(source, tmp_path / "megatron", "megatron", file_bytes=largest),
        Job(tmp_path / "megatron", tmp_path / "back", "hf"),
    ):
        # In a process of its own: the heap of this one is in pieces from the tests before.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(extra_bytes, job).result() < 2 * largest + allowance, job.kind


# Faults


def fails(capsys, expected: list[str], *arguments) -> None:
    """The command ends with one sentence, and leaves the target's folder as it was."""
    folder = Path(arguments[1]).parent
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert len(message.strip().splitlines()) == 1, message
    assert sorted(folder.rglob("*")) == before


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAST = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda t: t.pop(LAST), [LAST, "is missing"]),
        (lambda t: t.update(surplus=torch.zeros(2)), ["model.safetensors", "surplus", "not part of the model"]),
        (lambda t: t.update({LAST: torch.zeros(64, 95)}), [LAST, "[64, 95]", "[64, 96]"]),
        (lambda t: t.update({LAST: torch.zeros(64, 96).to(torch.int8)}), [LAST, "I8", "BF16"]),
        (lambda t: t.update({LAST: t[LAST].bfloat16()}), [LAST, "bfloat16", "float32", "--dtype"]),
    ],
    ids=["missing", "extra", "misshapen", "wrong type", "mixed types"],
)
def test_faulty_tensor_is_named(model, tmp_path, capsys, change, expected):
    source = copy_of(model, tmp_path / "source")
    edit_weights(source, change)
    fails(capsys, expected, source, tmp_path / "out")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def test_files_cut_short_or_missing_are_named(model, megatron, tmp_path, capsys):
    source = copy_of(model, tmp_path / "hf")
    cut(source / "model.safetensors")
    fails(capsys, ["model.safetensors", "cut short"], source, tmp_path / "out")
    source = copy_of(megatron, tmp_path / "megatron")
    cut(source / "__2_0.distcp")
    fails(capsys, ["__2_0.distcp", "cut short"], source, tmp_path / "out")
    (source / "__2_0.distcp").unlink()
    fails(capsys, ["__2_0.distcp", "is missing"], source, tmp_path / "out")
    cut(source / ".metadata")
    fails(capsys, [".metadata", "cut short"], source, tmp_path / "out")
    fails(capsys, ["nowhere", "neither"], tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"intermediate_size": 128}, ["linear_fc1.weight", "[4, 192, 64]", "[4, 256, 64]"]),
        ({"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}, ["layer_norm_weight", "[4, 64]", "[5, 64]"]),
        ({"tie_word_embeddings": True}, ["output_layer.weight", "not part of the model"]),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, ["linear_qkv.bias", "is missing"]),
    ],
    ids=["misshapen", "layers", "extra", "missing"],
)
def test_faulty_tensor_of_megatron_is_named(megatron, tmp_path, capsys, change, expected):
    source = copy_of(megatron, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    fails(capsys, expected, source, tmp_path / "out")


def test_nothing_is_overwritten_without_force(model, megatron, tmp_path, capsys):
    target = copy_of(model, tmp_path / "out")
    edit_weights(target, lambda tensors: tensors.pop(LAST))
    before = (target / "model.safetensors").read_bytes()
    fails(capsys, ["out exists", "--force"], megatron, target)
    assert (target / "model.safetensors").read_bytes() == before
    fails(capsys, ["both source and target"], model, model, "--to", "hf", "--force")
    assert main([str(megatron), str(target), "--force"]) == 0
    assert_same(weights(target), weights(model))


def flip_byte(file: Path, value: bytes) -> None:
    """Change one byte of the weights `value` in a file."""
    content = bytearray(file.read_bytes())
    content[content.index(value) + len(value) // 2] ^= 1
    file.write_bytes(content)


def test_verify_finds_a_flipped_byte(model, megatron, tmp_path, capsys):
    value = bytes(load_file(model / "model.safetensors")[LAST].view(torch.uint8).flatten().tolist())
    target = copy_of(model, tmp_path / "hf")
    assert main([str(megatron), str(target), "--verify"]) == 0
    flip_byte(target / "model.safetensors", value)
    fails(capsys, [LAST, "differs"], megatron, target, "--verify")
    target = copy_of(megatron, tmp_path / "megatron")
    assert main([str(model), str(target), "--verify"]) == 0
    (file,) = (file for file in target.glob("*.distcp") if value in file.read_bytes())
    flip_byte(file, value)
    fails(capsys, [LAST, "differs"], model, target, "--verify")


# Interruption


def die_at_third_file(source, target, kind):
    """In a process of its own: kill -9 when two files are complete and the third is half-written."""
    write, calls = Conversion.write, []

    def write_or_die(self, number, count):
        calls.append(number)

        def count_or_die(nbytes):
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        write(self, number, count_or_die)

    Conversion.write = write_or_die
    convert(Job(Path(source), Path(target), kind, file_bytes=FILE_BYTES))


@pytest.mark.parametrize("kind", ["megatron", "hf"])
def test_a_killed_conversion_goes_on(model, megatron, tmp_path, monkeypatch, kind):
    source = copy_of({"megatron": model, "hf": megatron}[kind], tmp_path / "source")
    target = tmp_path / "out"
    call = f"from tests.weights.test_convert import *; die_at_third_file({str(source)!r}, {str(target)!r}, {kind!r})"
    assert subprocess.run([sys.executable, "-c", call]).returncode == -signal.SIGKILL
    assert not target.exists()
    written, write = [], Conversion.write
    monkeypatch.setattr(Conversion, "write", lambda self, n, count: (written.append(n), write(self, n, count)))
    job = Job(source, target, kind, file_bytes=FILE_BYTES)
    convert(job)
    count = len(Conversion(job, target).files)
    assert written == list(range(2, count))
    convert(job, verify=True)
    assert not list(tmp_path.glob(".writing_*"))


def test_what_was_made_of_another_source_is_not_used(model, tmp_path):
    source, target = copy_of(model, tmp_path / "source"), tmp_path / "out"
    call = f"from tests.weights.test_convert import *; die_at_third_file({str(source)!r}, {str(target)!r}, 'megatron')"
    subprocess.run([sys.executable, "-c", call])
    edit_weights(source, lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    job = Job(source, target, "megatron", file_bytes=FILE_BYTES)
    convert(job)
    convert(job, verify=True)


def test_only_one_conversion_at_a_time(model, tmp_path, capsys):
    job = Job(model, tmp_path / "out", "megatron")
    with convert_module._claimed(job):
        fails(capsys, ["another conversion", "is running"], model, tmp_path / "out")


# FP8


@pytest.fixture(scope="module")
def fp8(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("fp8") / "model"
    assert main([str(model), str(target), "--to", "fp8", "--verify"]) == 0
    return target


def test_fp8_is_what_modelopt_exports(model, fp8, tmp_path):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    inputs = torch.arange(3, 20)[None]
    quantized = mtq.quantize(quantized, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, lambda m: m(inputs))
    export_hf_checkpoint(quantized, export_dir=tmp_path / "modelopt")
    assert_same(weights(fp8), weights(tmp_path / "modelopt"))
    for file, key in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        ours, theirs = (json.loads((folder / file).read_text())[key] for folder in (fp8, tmp_path / "modelopt"))
        assert ours == theirs


def test_fp8_runs_in_vllm(model, fp8):
    """On CPU, where vLLM runs FP8 through PyTorch: near the original's log-probs, and not equal to them."""
    code = """if __name__ == "__main__":
        import json, sys
        from vllm import LLM, SamplingParams
        llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**26,
                  skip_tokenizer_init=True, enable_chunked_prefill=False, max_num_batched_tokens=8192)
        options = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": list(range(3, 35))}], options)
        print("RESULT", json.dumps([[p.logprob for p in row.values()][0] for row in output.prompt_logprobs[1:]]))
    """
    script = fp8.parent / "serve.py"
    script.write_text(code)
    # vLLM leaves sockets and a file there.
    with tempfile.TemporaryDirectory() as folder:
        environment, command = os.environ | {"TMPDIR": folder}, [sys.executable, script, fp8]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("RESULT")) or [result.stderr]
    found = torch.tensor(json.loads(line.removeprefix("RESULT")))
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        logprobs = AutoModelForCausalLM.from_pretrained(model)(tokens).logits.log_softmax(-1)
    expected = logprobs[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    difference = (found - expected).abs()
    assert 0 < difference.max() < 0.5 and difference.mean() < 0.1, difference
