"""Weights & Biases' package, of which a small one that writes down its calls takes the place."""

import importlib
import json
import sys

import pytest

from megatron_dgpo.metrics import MetricsLog, read_metrics
from megatron_dgpo.wandb_run import WandbRun, check_installed
from tests.layouts import make_config

_FAKE = """
calls = []

class Run:
    def __getattr__(self, name):
        return lambda *values, **named: calls.append((name, values, named))

def init(**named):
    calls.append(("init", (), named))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(_FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("wandb")
    del sys.modules["wandb"]


def run(config, steps, done=0, visible=True):
    with MetricsLog(config.run.dir, "train", visible, wandb=WandbRun(config, "train")) as log:
        log.start(done, 4)
        for step in steps:
            log.write(step, {"policy/loss": step / 4})
            log.saved({"memory/checkpoint_gib": 1.5})


def test_it_gets_what_the_file_gets_and_goes_on_as_the_same_run(tmp_path, wandb):
    config = make_config("model", run={"dir": tmp_path / "mine", "wandb": "a project"})
    check_installed(config)
    run(config, [1, 2])
    run(config, [3], done=2)
    assert not run(config, [1], visible=False)
    names = [name for name, _, _ in wandb.calls]
    once = ["init", "define_metric"]
    assert names == [*once, *["log"] * 4, "finish", *once, *["log"] * 2, "finish"]
    first, second = (named for name, _, named in wandb.calls if name == "init")
    assert first == second and len(first["id"]) == 32
    assert first["project"] == "a project" and first["name"] == "mine train" and first["resume"] == "allow"
    assert first["dir"] == str(tmp_path / "mine") and first["config"]["model"]["dtype"] == "float32"
    assert json.dumps(first["config"])
    rows = {}
    for name, values, _ in wandb.calls:
        if name == "log":
            rows.setdefault(values[0]["step"], {}).update(values[0])
    assert list(rows.values()) == read_metrics(tmp_path / "mine" / "metrics" / "train.jsonl")
    # Another folder's is another run.
    run(make_config("model", run={"dir": tmp_path / "other", "wandb": "a project"}), [1])
    assert [named for name, _, named in wandb.calls if name == "init"][2]["id"] != first["id"]


def test_its_end_is_told_and_is_not_the_run_s(tmp_path, wandb, monkeypatch, capsys):
    def broken(*_, **__):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb.Run, "log", broken, raising=False)
    monkeypatch.setattr(wandb.Run, "finish", broken, raising=False)
    config = make_config("model", run={"dir": tmp_path / "mine", "wandb": "a project"})
    run(config, [1, 2])
    assert len(read_metrics(tmp_path / "mine" / "metrics" / "train.jsonl")) == 2
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert told == ["warning: Weights & Biases gets nothing from step 1 on: ConnectionResetError: Connection lost"]
    # Where it breaks off between the last row and the end.
    run(config, [])


def test_a_run_that_fails_has_failed_there_too(tmp_path, wandb):
    config = make_config("model", run={"dir": tmp_path / "mine", "wandb": "a project"})
    run(config, [1])
    with pytest.raises(ZeroDivisionError), MetricsLog(tmp_path, "train", True, wandb=WandbRun(config, "train")) as log:
        log.start(0, 1)
        _ = 1 / 0
    assert [named for name, _, named in wandb.calls if name == "finish"] == [{"exit_code": 0}, {"exit_code": 1}]
