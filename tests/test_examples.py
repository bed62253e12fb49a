"""The examples run as their READMEs say; `make demo` itself takes minutes and is run by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dgpo.config import load_config
from megatron_dgpo.metrics import read_metrics

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str) -> None:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_settings_are_valid(path):
    load_config(path)


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
    assert rows[0]["policy/loss"] > 2.5 and rows[-1]["policy/loss"] < 1.5
    assert (tmp_path / "sft" / "hf" / "model.safetensors").is_file()
