"""Bad input: one clear message, a failing exit status, nothing started and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_dgpo import preflight
from megatron_dgpo.cli import main
from megatron_dgpo.config_file import load_config, setting_names
from megatron_dgpo.errors import UsageError
from tests.layouts import make_config
from tools.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture
def case(tmp_path, model, monkeypatch):
    """A working set of settings to spoil; `fails(expected, ...)` runs a command on it."""
    return Case(tmp_path, model)


class Case:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.data = folder / "problems.jsonl"
        self.data.write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+2", "answer": "4"}\n')
        self.settings = {
            "run": {"dir": str(folder / "run")},
            "model": {"path": str(model), "dtype": "float32"},
            "rollout": {"context_tokens": 32, "max_response_tokens": 16, "prompts_per_step": 2, "group_size": 2},
            "data": {"train": str(self.data), "eval": str(self.data)},
            "reward": {"grader": "exact"},
        }

    def copy_model(self) -> Path:
        """A copy of the model that may be spoilt; the settings point to it."""
        copy = self.folder / "model"
        copy.mkdir()
        for file in self.model.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        self.settings["model"]["path"] = str(copy)
        return copy

    def edit_config(self, folder: Path, **changes) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def fails(self, capsys, expected: list[str], *overrides: str, command: str = "train") -> None:
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        before = {str(path) for path in self.folder.rglob("*")}
        assert main([command, str(config), *overrides]) == 2
        message = capsys.readouterr().err
        for part in expected:
            assert part in message, message
        assert "Traceback" not in message
        assert len(message.strip().splitlines()) == 1, message
        assert {str(path) for path in self.folder.rglob("*")} == before


def test_unknown_setting_names_the_nearest(case, capsys):
    case.fails(capsys, ["algorithm.tua", "did you mean 'algorithm.tau'"], "algorithm.tua=1")


def test_unknown_section(case, capsys):
    case.fails(capsys, ["'algoritm'", "'algorithm'"], "algoritm.tau=1")


def test_value_out_of_range(case, capsys):
    case.fails(capsys, ["algorithm.tau", "-1"], "algorithm.tau=-1")


def test_override_without_a_section(case, capsys):
    case.fails(capsys, ["tau=1", "section.name=value"], "tau=1")


def test_missing_setting(case, capsys):
    del case.settings["data"]["train"]
    case.fails(capsys, ["data.train", "missing"])


def test_config_file_missing(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such config file" in capsys.readouterr().err


def test_tensor_parallel_does_not_divide_the_heads(case, capsys):
    case.fails(capsys, ["parallel.tensor=3 does not divide num_attention_heads=4", "use 1 or 2"], "parallel.tensor=3")


def test_pipeline_does_not_divide_the_layers(case, capsys):
    case.fails(capsys, ["num_hidden_layers=4", "use 1, 2 or 4"], "parallel.pipeline=3")


def test_interleaving_without_a_pipeline(case, capsys):
    case.fails(capsys, ["parallel.chunks_per_stage=2"], "parallel.chunks_per_stage=2")


def test_sequence_parallelism_without_tensor_parallelism(case, capsys):
    case.fails(capsys, ["parallel.sequence"], "parallel.sequence=true")


def test_world_size_that_the_parallel_sizes_do_not_fill(case):
    """Ranks that torchrun started: three of them for two tensor-parallel ranks."""
    config = case.folder / "config.yaml"
    config.write_text(yaml.safe_dump(case.settings))
    environment = os.environ | {
        "RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"
    }  # fmt: skip
    command = [sys.executable, "-m", "megatron_dgpo.cli", "train", str(config), "parallel.tensor=2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "parallel.tensor=2 × parallel.pipeline=1 = 2 ranks do not fill 3 ranks" in result.stderr
    assert "Traceback" not in result.stderr


def test_model_directory_missing(case, capsys):
    case.settings["model"]["path"] = str(case.folder / "nowhere")
    case.fails(capsys, ["nowhere", "does not exist"])


def test_model_without_config(case, capsys):
    (case.copy_model() / "config.json").unlink()
    case.fails(capsys, ["config.json is missing"])


def test_model_without_weights(case, capsys):
    (case.copy_model() / "model.safetensors").unlink()
    case.fails(capsys, ["neither model.safetensors nor"])


def test_model_without_tokenizer(case, capsys):
    folder = case.copy_model()
    for file in folder.glob("token*"):
        file.unlink()
    case.fails(capsys, ["no tokenizer"])


def test_model_file_cut_short(case, capsys):
    path = case.copy_model() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    case.fails(capsys, ["model.safetensors is damaged or cut short"])


def test_model_that_lacks_a_tensor(case, capsys):
    path = case.copy_model() / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path)
    case.fails(capsys, ["model.layers.2.mlp.up_proj.weight is missing"])


def test_model_with_a_misshapen_tensor(case, capsys):
    path = case.copy_model() / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path)
    case.fails(capsys, [name, "[95, 64]", "[96, 64]"])


def test_unsupported_architecture(case, capsys):
    case.edit_config(case.copy_model(), architectures=["GPT2LMHeadModel"])
    case.fails(capsys, ["GPT2LMHeadModel is not supported", "Qwen2ForCausalLM"])


def test_unsupported_rope(case, capsys):
    case.edit_config(case.copy_model(), rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    case.fails(capsys, ["rope type yarn"])


def test_experts_of_a_dense_model(case, capsys):
    case.fails(capsys, ["parallel.expert=2", "no mixture of experts"], "parallel.expert=2", "parallel.data=2")


def test_layouts_that_a_mixture_cannot_have(case, capsys):
    case.settings["model"]["path"] = str(make_tiny_model(case.folder / "mixture", "mixtral"))
    capsys.readouterr()
    case.fails(capsys, ["parallel.expert=3", "number of experts=8"], "parallel.expert=3", "parallel.data=3")
    case.fails(
        capsys, ["parallel.expert=4", "parallel.tensor × context × data = 2"], "parallel.expert=4", "parallel.data=2"
    )
    case.fails(capsys, ["parallel.sequence=true"], "parallel.tensor=2")
    case.fails(capsys, ["servers.expert_parallel=true", "CPU"], "servers.expert_parallel=true")
    case.edit_config(case.folder / "mixture", hidden_act="gelu")
    case.fails(capsys, ["hidden_act='gelu'", "'silu'"])


def test_row_that_is_not_json(case, capsys):
    case.data.write_text(case.data.read_text() + "{question: 3}\n")
    case.fails(capsys, ["problems.jsonl:3", "not JSON"])


def test_row_that_lacks_a_field(case, capsys):
    case.data.write_text(case.data.read_text() + '{"question": "1"}\n')
    case.fails(capsys, ["problems.jsonl:3", "'answer'"])


def test_prompt_longer_than_the_context(case, capsys):
    case.data.write_text(json.dumps({"question": "1" * 40, "answer": "2"}) + "\n")
    case.fails(capsys, ["problems.jsonl:1", "40", "16"])


def test_context_longer_than_the_model(case, capsys):
    case.fails(capsys, ["rollout.context_tokens=300", "256"], "rollout.context_tokens=300")


def test_empty_data_set(case, capsys):
    case.data.write_text("")
    case.fails(capsys, ["problems.jsonl"])


def test_data_file_missing(case, capsys):
    case.settings["data"]["train"] = str(case.folder / "problem.jsonl")
    case.fails(capsys, ["problem.jsonl", "problems.jsonl"])


def test_output_that_cannot_be_written(case, capsys):
    case.settings["run"]["dir"] = str(case.data / "run")
    case.fails(capsys, ["run.dir", "cannot be written"])


def test_unknown_grader(case, capsys):
    case.fails(capsys, ["reward.grader", "exact"], "reward.grader=exakt")


def test_grader_that_cannot_be_imported(case, capsys):
    case.fails(capsys, ["no_such_module"], "reward.grader=no_such_module:f")


def test_responses_do_not_fill_minibatches(case, capsys):
    case.fails(capsys, ["batch.minibatches=3"], "batch.minibatches=3")


def test_server_on_another_machine_cannot_share_memory(case, capsys):
    case.fails(capsys, ["http://10.0.0.1:8000", "memory"], "servers.addresses=['http://10.0.0.1:8000']")


@pytest.mark.parametrize(
    "address",
    [
        "http://[bad",
        "http://[::1",
        "ftp://a",
        "a:8000",
        "http://a:99999",
        "http://a:x",
        "http://a/v1",
        "http://a b",
        "[]",
    ],
)
def test_an_address_that_is_none(case, capsys, address):
    case.fails(capsys, [f"'{address}'", "http://host:8000"], f"servers.addresses=['{address}']")


def test_addresses_of_servers(case, capsys):
    """IPv6, too; the first that is wrong is named."""
    good = "'http://[::1]:8000', 'http://localhost', 'https://127.0.0.1:1'"
    case.fails(capsys, ["'http://a:b'", "such as"], f"servers.addresses=[{good}, 'http://a:b']")
    case.fails(capsys, ["names a server twice"], f"servers.addresses=[{good}, 'http://localhost']")
    case.fails(capsys, ["servers.min_serving=4", "3 servers"], f"servers.addresses=[{good}]", "servers.min_serving=4")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["servers.sleep=true"], ["rollout.max_staleness=2", "servers.sleep=true has their GPUs"]),
        (["rollout.replay=/tmp"], ["rollout.max_staleness=2 with rollout.replay", "set it to 0"]),
        (["run.steps=2"], ["rollout.max_staleness=2", "run.steps=2", "1 to 4 is usual"]),
    ],
)
def test_staleness_that_cannot_be(case, capsys, overrides, expected):
    case.fails(capsys, expected, "rollout.max_staleness=2", "run.steps=9", *overrides)


def test_rewards_that_cannot_be_decoupled(case, capsys):
    decoupled, weights = "algorithm.advantage=decoupled", "reward.weights={right: 1, brief: 0.5}"
    own = "reward.grader=tests.rewards.graders:several"
    expected = [decoupled, "reward.weights names none", "reward.weights={right: 1, format: 0.2}"]
    case.fails(capsys, expected, decoupled, own)
    expected = ["reward.overlong=punish", decoupled, "use filter"]
    case.fails(capsys, expected, decoupled, own, weights, "reward.overlong=punish")
    expected = ["reward.grader=exact gives one number", "reward.weights are for right, brief", "module:function"]
    case.fails(capsys, expected, weights)


def test_responses_of_an_evaluation_that_are_all_the_same(case, capsys):
    expected = ["eval.samples=8 with eval.temperature=0", "set eval.samples=1, or a temperature such as 1"]
    case.fails(capsys, expected, "eval.samples=8")
    expected = ["eval.top_p=0.95 with eval.temperature=0", "set eval.top_p=1, or a temperature such as 1"]
    case.fails(capsys, expected, "eval.top_p=0.95")


def test_a_package_that_is_not_installed(case, capsys, tmp_path, monkeypatch):
    expected = ["run.wandb=mine, but the package wandb is not installed", "pip install wandb"]
    # What it leaves behind is no package.
    (tmp_path / "wandb" / "latest-run").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    case.fails(capsys, expected, "run.wandb=mine")


def test_more_processes_than_a_cpu_can_run(case, capsys):
    case.fails(capsys, ["1 ranks", "1000000 vLLM workers", "CPU cores"], "servers.count=1000000")


def test_a_transport_for_gpus(case, capsys):
    case.fails(capsys, ["weight_sync.transport=ipc is for GPUs"], "weight_sync.transport=ipc")


def test_memory_is_shared_on_one_machine(tmp_path):
    with pytest.raises(
        UsageError, match="weight_sync.transport=auto shares memory .* of this job are on 2; use shards"
    ):
        preflight._check_rollouts(make_config("unused"), nodes=2)
    # Recorded responses need no server.
    preflight._check_rollouts(make_config("unused", rollout={"replay": tmp_path}), nodes=2)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        # NCCL would say "Duplicate GPU", after minutes.
        (["servers.count=7", "parallel.data=2"], ["= 2 and", "= 7 GPUs", "more than the 8", "servers.sleep=true"]),
        # vLLM would say "IPC handle not found for GPU UUID".
        (["servers.count=2", "servers.sleep=true"], ["= 2 workers", "= 1 ranks", "servers.tensor be 1"]),
        # The other rank's buffer would be opened, and so freed, by nobody.
        (["servers.sleep=true", "parallel.data=2"], ["= 1 workers", "= 2 ranks", "servers.tensor be 2"]),
        (["weight_sync.transport=ipc"], ["weight_sync.transport=ipc", "set servers.sleep=true"]),
        (["weight_sync.transport=memory"], ["weight_sync.transport=memory is for the CPU"]),
        (["servers.sleep=true", "weight_sync.transport=shards"], ["servers.sleep", "use ipc"]),
        (["parallel.data=9", "rollout.prompts_per_step=9"], ["9 ranks here", "8 GPUs"]),
    ],
)
def test_layouts_that_eight_gpus_cannot_have(case, capsys, monkeypatch, overrides, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    case.fails(capsys, expected, *overrides)


def test_a_folder_that_the_system_refuses(case, capsys, monkeypatch):
    loop = case.folder / "loop"
    loop.symlink_to(loop)
    case.fails(capsys, ["run.dir", "cannot be written"], f"run.dir={loop}/x")

    is_dir = Path.is_dir

    def refuse(path):
        # As for a user who may not enter its parent; tests may run as root.
        if path == case.model:
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    case.fails(capsys, [str(case.model), "Permission denied"])


def test_a_model_given_to_eval_is_taken_as_it_is(case, capsys):
    config = case.folder / "config.yaml"
    config.write_text(yaml.safe_dump(case.settings))
    assert main(["eval", str(config), "--model", "no #such"]) == 2
    assert "model directory no #such does not exist" in capsys.readouterr().err


def test_a_job_whose_gpus_pytorch_does_not_see(case, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    case.fails(capsys, ["PyTorch sees no GPU", "SLURM_GPUS_ON_NODE=8", "MEGATRON_DGPO_DEVICE=cpu"])


def test_checkpoint_of_another_model(case, capsys):
    from dataclasses import asdict

    from megatron_dgpo.weights.architectures import read_architecture

    folder = case.folder / "run" / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    theirs = asdict(read_architecture(case.model)) | {"num_layers": 8}
    (folder / "manifest.json").write_text(json.dumps({"progress": {}, "architecture": theirs, "files": {}}))
    case.fails(capsys, ["step_00000003", "another model", "num_layers is 8 there and 4 in model.path"])


def test_a_run_is_not_continued_with_other_prompts(case, capsys):
    from dataclasses import asdict

    from megatron_dgpo.config import Config
    from megatron_dgpo.manifest import origins
    from megatron_dgpo.weights.architectures import read_architecture

    folder = case.folder / "run" / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    manifest = {
        "progress": {"step": 3},
        "architecture": asdict(read_architecture(case.model)),
        "files": {},
        "origins": origins(Config.model_validate(case.settings), "train"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    case.fails(capsys, ["run.seed=7, but it is 1 in the run", "step_00000003", "another run.dir"], "run.seed=7")
    case.fails(capsys, ["rollout.group_size=4", "or rollout.group_size=2 as it was"], "rollout.group_size=4")
    sft = [f"sft.data={case.data}", "sft.response_field=answer"]
    case.fails(capsys, ["command=sft, but it is train in the run"], *sft, command="sft")
    # What may change comes as far as the next check.
    case.fails(capsys, ["run.steps=2, but this run has done 3 steps"], "run.steps=2", "optimizer.lr=1")
    case.data.write_text(case.data.read_text() + '{"question": "3+3", "answer": "6"}\n')
    case.fails(capsys, [f"data.train={case.data} holds other rows than", "the problems of the run"])


def test_eval_without_a_checkpoint(case, capsys):
    case.fails(capsys, ["no checkpoint", "--model"], command="eval")


def test_sft_without_data(case, capsys):
    case.fails(capsys, ["sft.data"], command="sft")


# What needs no run


def test_settings_are_listed_with_what_they_mean(capsys):
    assert main(["settings", "algorithm"]) == 0
    section = capsys.readouterr().out
    assert "algorithm.tau = 0.5   [number, > 0]\n    Temperature of the softmax" in section
    assert main(["settings"]) == 0
    everything = capsys.readouterr().out
    assert section in everything and all(f"{name} = " in everything for name in setting_names())
    with pytest.raises(SystemExit):
        main(["settings", "algoritm"])
    assert "invalid choice: 'algoritm'" in capsys.readouterr().err


def test_the_resolved_config_is_shown_and_nothing_starts(case, capsys, tmp_path):
    config = case.folder / "config.yaml"
    config.write_text(yaml.safe_dump(case.settings))
    assert main(["train", str(config), "algorithm.tau=0.25", "--show-config"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(shown) == load_config(config, ["algorithm.tau=0.25"])
    assert not (case.folder / "run").exists()


def test_a_run_is_drawn(capsys, tmp_path):
    assert main(["plot", str(tmp_path / "run")]) == 2
    assert "run/metrics/train.jsonl: no such file; expected the run.dir" in capsys.readouterr().err
    metrics = tmp_path / "run" / "metrics" / "train.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps({"step": step, "rollout/reward": 0.1 * step}) + "\n" for step in range(5)))
    assert main(["plot", str(tmp_path / "run")]) == 0
    picture = Path(capsys.readouterr().out.strip())
    assert picture == tmp_path / "run" / "plot.png" and picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_named_alone(capsys):
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails
from megatron_dgpo.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "typed, told",
    [
        ("optimizer.lrr=1", "unknown setting 'optimizer.lrr'"),
        ("model.path=/no/model", "model directory /no/model does not exist"),
        ("model.reference=/no/model", "model directory /no/model does not exist"),
        ("data.train=/no/file", "data.train=/no/file does not exist"),
        ("data.eval=[/no/file]", "data.eval=/no/file does not exist"),
    ],
)
def test_mistyped_names_are_told_before_anything_heavy_is_imported(model, tmp_path, typed, told):
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n')
    config = tmp_path / "config.yaml"
    config.write_text(f"model:\n  path: {model}\ndata:\n  train: {data}\n")
    command = [sys.executable, "-c", _WITHOUT_TORCH, "train", str(config), typed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and told in done.stderr, done.stderr
