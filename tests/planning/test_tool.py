"""tools/plan_parallelism.py as a user calls it: good input, bad input, and files that the trainer reads."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_dgpo.config_file import load_config
from megatron_dgpo.planning.hardware import GPUS, Cluster
from megatron_dgpo.planning.plan import Planner
from megatron_dgpo.planning.sides import TrainerSide, Workload
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.weights.architectures import read_architecture
from tools.plan_parallelism import main

MODEL = str(Path(__file__).parents[2] / "examples" / "qwen2.5-7b" / "model")
SMALL = [MODEL, "--gpus", "8", "--prompts", "32", "--group", "8", "--max-response-tokens", "2048"]


@pytest.mark.parametrize("nodes, placement", [(1, "any"), (2, "shared"), (2, "separate")])
def test_plan_is_written_as_settings_and_json(tmp_path, capsys, nodes, placement):
    gpus = ["--gpus", str(8 * nodes)]
    asked = [*SMALL, *gpus, "--placement", placement]
    assert main([*asked, "--write", str(tmp_path / "plan"), "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    for word in ("layouts run", "why the closest fails", "activations", "vLLM KV cache", "policy: update", "bound"):
        assert word in out
    settings = yaml.safe_load((tmp_path / "plan" / "settings.yaml").read_text())
    settings["model"]["path"], settings["data"] = "model", {"train": "train.jsonl"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = load_config(tmp_path / "config.yaml")
    bare = {"model": {"path": "model"}, "data": {"train": "train.jsonl"}}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(bare))
    assert load_config(tmp_path / "bare.yaml", (tmp_path / "plan" / "overrides.txt").read_text().split()) == config
    job = (tmp_path / "plan" / "job.sbatch").read_text()
    assert f"#SBATCH --nodes={nodes}\n" in job and "#SBATCH --gpus-per-node=8\n" in job
    assert ("\nROLLOUT_NODES=1\n" in job) == (placement == "separate")
    assert f"parallel.tensor={config.parallel.tensor}" in job and str(Path("config.yaml").resolve()) in job
    everything = json.loads((tmp_path / "plan.json").read_text())
    chosen = everything["chosen"]
    assert chosen["settings"]["parallel"] == config.parallel.model_dump()
    running = [plan for plan in everything["plans"] if plan["problem"] is None]
    assert chosen["step_s"] <= 1.03 * min(plan["step_s"] for plan in running)
    assert all(max(sum(stage.values()) for stage in plan["stages"]) <= GPUS["h100"].memory_bytes for plan in running)
    # The written config, given back, is the same plan.
    given = [*gpus, "--config", str(tmp_path / "config.yaml")]
    assert main([MODEL, *given, "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())["chosen"]
    assert again["trainer"] == chosen["trainer"] and again["rollout"] == chosen["rollout"]
    assert again["step_s"] == pytest.approx(chosen["step_s"], rel=0.02)


def test_failures_say_what_is_too_much_and_what_helps(capsys):
    assert main([*SMALL, "--placement", "separate", "--rows", "100"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "does not divide num_attention_heads=28" in out
    model = str(Path(MODEL).parents[1] / "qwen2.5-72b" / "model")
    assert main([model, "--gpus", "8", "--rows", "100"]) == 1
    captured = capsys.readouterr()
    assert "no layout runs: use more GPUs" in captured.err
    assert "GiB available" in " ".join(captured.out.split())


def test_a_failure_names_the_changes_that_make_it_fit(capsys):
    """And they do: the layout with them is among those that run."""
    assert main([*SMALL, "--placement", "separate", "--rows", "40"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"needs \d+\.\d GiB on stage \d: 79\.1 GiB available; \S+=\S+.* brings? it to \d+\.\d GiB", out)
    sizes = Sizes(read_architecture(Path(MODEL)))
    planner = Planner(sizes, Workload(32, 8, 200, 2000, 1024, 2048), Cluster(GPUS["h100"], 8))
    plain = TrainerSide(2, 1, 2)
    problem = planner.problem(plain)
    assert problem.startswith("needs ") and "still too much" not in problem
    names = re.findall(r"(\w+)=\w+", problem)
    fields = {"recompute": "full", "sequence": True, "distributed_optimizer": True, "reference_offload": "host"}
    renamed = {"reference_offload": "reference"}
    changed = replace(plain, **{renamed.get(name, name): fields[name] for name in names})
    assert planner.problem(changed) is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere", "--gpus", "8"], ("nowhere", "does not exist")),
        ([MODEL, "--gpus", "12"], ("--gpus=12", "--gpus-per-node=8")),
        ([MODEL, "--gpus", "8", "--gpu", "h900"], ("--gpu=h900", "a100")),
        ([MODEL, "--gpus", "8", "--response-tokens", "9000"], ("--response-tokens=9000", "8192")),
        ([MODEL, "--gpus", "8", "--max-response-tokens", "200000"], ("max_position_embeddings", "131072")),
        ([MODEL, "--gpus", "8", "--config", "nowhere.yaml"], ("nowhere.yaml", "no such config")),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


@pytest.mark.parametrize("gpus", ("0", "-1", "many"))
def test_numbers_are_checked(gpus, capsys):
    with pytest.raises(SystemExit) as stop:
        main([MODEL, "--gpus", gpus])
    assert stop.value.code == 2 and "--gpus" in capsys.readouterr().err


def test_gpu_from_a_file(tmp_path, capsys):
    path = tmp_path / "gpu.yaml"
    fields = dict(name="Big", memory_bytes=2e11, flops=1e15, memory_bandwidth=5e12, node_bandwidth=5e11)
    path.write_text(yaml.safe_dump(fields))
    assert main([*SMALL, "--gpu", str(path)]) == 2
    assert "network_bandwidth" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(fields | {"network_bandwidth": -1}))
    assert main([*SMALL, "--gpu", str(path)]) == 2
    assert "network_bandwidth=-1" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(fields | {"network_bandwidth": "5e10"}))
    assert main([*SMALL, "--gpu", str(path)]) == 0
    assert "8 × Big" in capsys.readouterr().out
