"""The examples run as their READMEs say; `make demo` itself takes minutes and is run by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_dgpo.algorithm.resolve import without_effect
from megatron_dgpo.config_file import load_config
from megatron_dgpo.metrics import read_metrics
from tests.test_docs import undocumented

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str) -> None:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr


PRESETS = sorted((EXAMPLES / "algorithms").glob("*.yaml"))
CONFIGS = sorted(path for path in EXAMPLES.glob("*/*.yaml") if path not in PRESETS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_settings_are_valid(path):
    """Those of a run; others beside them are read over them."""
    run = path.with_name("config.yaml")
    load_config(run if run.exists() else path, [str(path)])


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_a_method_is_a_few_settings_over_those_of_a_run(path):
    """What it names has its value, all else is the run's, and with several minibatches nothing of it is in vain."""
    base = EXAMPLES / "arithmetic" / "config.yaml"
    run, with_preset = load_config(base), load_config(base, [str(path), "batch.minibatches=2"])
    named = yaml.safe_load(path.read_text())
    assert named.keys() <= {"algorithm", "reward", "rollout"} and "credit" in named["algorithm"]
    for section in ("algorithm", "reward", "rollout"):
        expected = getattr(run, section).model_dump() | named.get(section, {})
        assert getattr(with_preset, section).model_dump() == expected
    assert without_effect(with_preset) == []
    assert with_preset.data == run.data and with_preset.model == run.model


def test_gsm8k_runs_three_steps(tmp_path):
    config = EXAMPLES / "gsm8k" / "config.yaml"
    if not load_config(config).data.train.is_file():
        pytest.skip(f"NOT TESTED: {load_config(config).data.train} is not here")
    run(str(EXAMPLES / "gsm8k" / "prepare.py"), "--out", str(tmp_path / "model"))
    overrides = [f"model.path={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}"]
    run("-m", "megatron_dgpo.cli", "train", str(config), *overrides)
    rows = read_metrics(tmp_path / "run" / "metrics" / "train.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["rollout/tokens"] > 0 for row in rows[1:])


def test_arithmetic_warm_up_learns(tmp_path):
    folder = EXAMPLES / "arithmetic"
    run(str(folder / "prepare.py"), "--out", str(tmp_path / "data"))
    overrides = [
        f"model.path={tmp_path / 'data' / 'model'}",
        f"data.train={tmp_path / 'data' / 'train.jsonl'}",
        f"sft.data={tmp_path / 'data' / 'sft.jsonl'}",
        f"run.dir={tmp_path / 'sft'}",
        "sft.steps=40",
    ]
    run("-m", "megatron_dgpo.cli", "sft", str(folder / "sft.yaml"), *overrides)
    rows = read_metrics(tmp_path / "sft" / "metrics" / "sft.jsonl")
    assert not undocumented(rows[-1])
    assert rows[0]["policy/loss"] > 2.5 and rows[-1]["policy/loss"] < 1.5
    assert (tmp_path / "sft" / "hf" / "model.safetensors").is_file()
