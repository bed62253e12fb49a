"""The cluster recipes: settings, model and plan belong together, and all fit."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_dgpo import cli
from megatron_dgpo.algorithm.resolve import without_effect
from megatron_dgpo.config_file import load_config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.planning.hardware import GPUS, Cluster
from megatron_dgpo.planning.plan import Plan, Planner, sides_of, workload_of
from megatron_dgpo.planning.sides import refusal, rollout_refusal
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.preflight import check_shared_memory
from megatron_dgpo.weights.architectures import read_architecture
from tools import plan_parallelism

ROOT = Path(__file__).parents[2]
CLUSTER = Cluster(GPUS["h100"], 8)
RECIPES = ("qwen2.5-7b", "qwen2.5-32b", "qwen2.5-72b", "qwen3-30b-a3b", "qwen3-235b-a22b")
# Parameters as their model cards give them, in billions.
PARAMETERS = (7.6, 32.8, 72.7, 30.5, 235.1)


def command(recipe: str) -> list[str]:
    """The arguments of the command that a recipe's README gives for its plan."""
    text = (ROOT / "examples" / recipe / "README.md").read_text().replace("\\\n", " ")
    [line] = re.findall(r"^ +python tools/plan_parallelism.py (.*)$", text, re.MULTILINE)
    return shlex.split(line)


def evaluated(config, architecture, gpus: int, *lengths: int) -> Plan:
    """The plan of a config on so many H100s. lengths: means of prompts and responses."""
    work, (trainer, rollout) = workload_of(config, *lengths), sides_of(config, gpus, 8)
    assert refusal(architecture, trainer, work, 8) is None
    assert rollout_refusal(architecture, rollout, 8) is None
    servers = config.servers
    return Planner(Sizes(architecture), work, CLUSTER).evaluate(
        trainer, rollout, servers.gpu_memory_fraction, servers.max_concurrent
    )


@pytest.mark.parametrize("recipe, billions", list(zip(RECIPES, PARAMETERS, strict=True)), ids=RECIPES)
def test_recipe_fits_its_model_and_gpus(recipe, billions):
    folder = ROOT / "examples" / recipe
    config = load_config(folder / "config.yaml")
    architecture = read_architecture(folder / "model")
    sizes = Sizes(architecture)
    assert sizes.parameters / 1e9 == pytest.approx(billions, abs=0.06)
    options = plan_parallelism._parse(command(recipe))
    assert config.rollout.context_tokens <= architecture.max_positions
    plan = evaluated(config, architecture, options.gpus, options.prompt_tokens, options.response_tokens)
    assert plan.problem is None
    assert plan.trainer_headroom(CLUSTER) > 5 * 2**30


def test_in_turn_on_all_gpus_is_as_fast_as_its_readme_says():
    folder = ROOT / "examples" / "qwen2.5-32b"
    config = load_config(folder / "config.yaml", [str(folder / "in_turn.yaml")])
    plan = evaluated(config, read_architecture(folder / "model"), 128, 200, 4000)
    assert plan.rollout.shared and plan.rollout.sleep
    assert plan.trainer.world_size == plan.rollout.num_workers == 128
    assert plan.problem is None and f": {plan.step_s:.0f} s a step by the plan" in (folder / "README.md").read_text()


def test_servers_that_would_wake_in_too_little_memory_are_refused():
    """Of what the trainer keeps, to the byte; what the planner chose leaves room for the rest."""
    folder, gpu_bytes = ROOT / "examples" / "qwen2.5-32b", GPUS["h100"].memory_bytes
    architecture = read_architecture(folder / "model")

    def config(fraction):
        override = f"servers.gpu_memory_fraction={fraction}"
        return load_config(folder / "config.yaml", [str(folder / "in_turn.yaml"), override])

    check_shared_memory(config(0.61), architecture, 128, gpu_bytes)
    with pytest.raises(UsageError, match="servers.gpu_memory_fraction=0.85 is 67.2 of a GPU's 79.1 GiB") as raised:
        check_shared_memory(config(0.85), architecture, 128, gpu_bytes)
    most = float(re.search(r"let it be (\S+) or less", str(raised.value))[1])
    assert 0.61 < most < 0.75
    check_shared_memory(config(most), architecture, 128, gpu_bytes)
    with pytest.raises(UsageError, match=f"let it be {most:g} or less"):
        check_shared_memory(config(round(most + 0.01, 2)), architecture, 128, gpu_bytes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_readme_shows_what_the_tool_prints(recipe, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert plan_parallelism.main(command(recipe)) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed in (ROOT / "examples" / recipe / "README.md").read_text()


def rows(folder: str) -> list[str]:
    """What the table of a README, one row a method, gives behind the config."""
    text = (ROOT / "examples" / folder / "README.md").read_text()
    return re.findall(r"^\|.*\| `(examples/algorithms/.*)` \|$", text, re.MULTILINE)


# The 1.5B has a 7B's layers, but narrower ones.
SMALL = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
TABLES = [("qwen2.5-32b", "qwen2.5-32b", {}, 128), ("r1-distill", "qwen2.5-7b", {}, 8)]
TABLES += [("r1-distill", "qwen2.5-7b", SMALL, 8)]


@pytest.mark.parametrize("folder, model, changes, gpus", TABLES, ids=["32b", "r1-7b", "r1-1.5b"])
def test_every_row_of_a_papers_table_can_be_run(folder, model, changes, gpus, tmp_path, monkeypatch):
    """Its settings are valid, legal and in no part in vain, and it fits the GPUs."""
    monkeypatch.chdir(ROOT)
    content = json.loads((ROOT / "examples" / model / "model" / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(content))
    architecture = read_architecture(tmp_path)
    assert len(rows(folder)) >= 5
    for row in rows(folder):
        config = load_config(f"examples/{folder}/config.yaml", shlex.split(row))
        assert without_effect(config) == [] and len({path.stem for path in config.data.eval}) in (2, 6)
        plan = evaluated(config, architecture, gpus, 200, 4000)
        assert plan.problem is None and plan.trainer_headroom(CLUSTER) > 5 * 2**30


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_job_is_written(recipe, capsys, monkeypatch):
    """For as many machines as its plan has."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "examples" / recipe / "README.md").read_text().replace("\\\n", " ")
    [line] = re.findall(r"^ +megatron-dgpo launch (.*)$", text, re.MULTILINE)
    assert cli.main(["launch", *shlex.split(line, comments=True), "--dry-run"]) == 0
    job = capsys.readouterr().out
    nodes = int(re.search(r"^#SBATCH --nodes=(\d+)$", job, re.MULTILINE)[1])
    assert nodes * 8 == plan_parallelism._parse(command(recipe)).gpus
    assert f"examples/{recipe}/config.yaml" in job


def test_model_configs_are_hugging_faces(tmp_path):
    """transformers reads them, and finds what our table finds."""
    import transformers

    for recipe in RECIPES:
        folder = ROOT / "examples" / recipe / "model"
        read, ours = transformers.AutoConfig.from_pretrained(folder), read_architecture(folder)
        assert (read.hidden_size, read.num_hidden_layers, read.vocab_size) == (
            ours.hidden_size,
            ours.num_layers,
            ours.vocab_size,
        )
        assert json.loads((folder / "config.json").read_text())["model_type"] == read.model_type
