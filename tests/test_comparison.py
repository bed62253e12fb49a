"""examples/comparison: its plan, which runs it starts, and its report, on run folders that are made up here.

With real runs it takes minutes, and is tried by hand, as its README says under Cost.
"""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from examples.comparison import results, run
from examples.comparison.plan import ARMS, BASE, SEEDS, STEPS, STUDY, is_registered, plan
from megatron_dgpo.algorithm.resolve import without_effect
from megatron_dgpo.config_file import config_text, load_config, plain_settings
from megatron_dgpo.manifest import checkpoint_of
from megatron_dgpo.stop import STOPPED
from tests.test_credit_tools import byte_tokenizer, model, record  # noqa: F401 (a fixture)

# Of grpo and of dgpo, by seed; what a run gains over its start.
GAINS = {"grpo": {1: 0.40, 2: 0.44, 3: 0.36}, "dgpo": {1: 0.50, 2: 0.56, 3: 0.48}}
START = 0.3


def make_run(planned, data="d0", start="5a", held_out="7+8", **settings):
    """What a finished run leaves. settings: of it in place of the plan's, by section and name."""
    config = planned.config.model_copy(
        update={section: getattr(planned.config, section).model_copy(update=new) for section, new in settings.items()}
    )
    folder = planned.folder
    gain = GAINS[planned.arm][planned.seed]
    rows = [{"step": step, "rollout/tokens": 100.0, "time/step_s": 36.0} for step in range(1, planned.steps + 1)]
    rows[-1]["eval/accuracy"] = START + gain
    for name in ("metrics", "eval", "hf"):
        (folder / name).mkdir(parents=True)
    rows = [{"step": 0, "eval/accuracy": START}, *rows]
    (folder / "metrics" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(config_text(config))
    (folder / "eval" / "step_00000000.jsonl").write_text(json.dumps({"question": held_out, "answer": "15"}) + "\n")
    machine = {"hosts": {"here": {"device": "a CPU", "count": 2}}, "versions": {"torch": "2"}, "commit": "c0ffee"}
    (folder / "starts.jsonl").write_text(json.dumps(machine) + "\n")
    checkpoint = checkpoint_of(folder / "checkpoints", planned.steps)
    checkpoint.mkdir(parents=True)
    origins = {"model.path": ["somewhere", start], "data.train": ["somewhere", data], "optimizer.lr": ["5e-05"]}
    progress = {"step": planned.steps, "prompts": 0, "weight_version": planned.steps}
    manifest = {"progress": progress, "architecture": {}, "files": {}, "origins": origins}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two arms and three seeds, of two steps each; credit on carries is six times uniform's in dgpo."""

    def on_carries(folder, steps):
        return {step: {"credit": 0.1, "lift": 6.0 if "dgpo" in folder.name else 1.0} for step in steps}

    monkeypatch.setattr(results, "credit_on_carries", on_carries)
    return plan(["grpo", "dgpo"], [1, 2, 3], 2, tmp_path)


@pytest.fixture
def command(study, tmp_path, monkeypatch, capsys):
    """run.py on the study, with runs that `fate` says something of instead of real ones."""
    monkeypatch.setattr(run, "prepare", lambda root, console: None)

    def call(*options, fate=lambda planned: 0):
        started = []

        def train(planned, log, look):
            started.append(planned.name)
            log.write_text("a line\nthe reason\n")
            if not (status := fate(planned)):
                make_run(planned)
            return status

        monkeypatch.setattr(run, "train", train)
        arguments = ["--arms", "grpo,dgpo", "--seeds", "1-3", "--steps", "2", "--runs", str(tmp_path), *options]
        status = run.main(arguments)
        return status, started, capsys.readouterr().out

    return call


# Arms


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_the_method_alone_and_has_an_effect(name):
    study, [planned] = load_config(BASE, [str(STUDY)]), plan([name], [1], STEPS)
    assert without_effect(planned.config) == []
    assert planned.config.batch.minibatches == 4 and planned.config.optimizer == study.optimizer
    own, theirs = plain_settings(planned.config), plain_settings(study)
    changed = {f"{s}.{n}" for s in own for n in own[s] if own[s][n] != theirs[s][n]}
    # The same files, by their full names; and each run has its own folder.
    assert planned.config.model.path == study.model.path.resolve()
    assert planned.config.data.train == study.data.train.resolve()
    changed -= {"run.dir", "model.path", "data.train", "data.eval"}
    allowed = {"reward.overlong", "rollout.dynamic_sampling", "model.reference"}
    assert {setting for setting in changed if not setting.startswith("algorithm.")} <= allowed
    assert ("model.reference" in changed) == (name == "entropy_e80")
    assert set(yaml.safe_load(ARMS[name].read_text())) <= {"algorithm", "reward", "rollout", "model"}


def test_arms_of_credit_differ_from_uniform_in_credit_alone():
    uniform, *others = plan(
        ["uniform", "dgpo", "dgpo_e80", "dgpo_e50", "no_gate_e80", "kl_e80", "entropy_e80"], [1], 40
    )
    credit = {"credit", "tau", "tau_mode", "effective_share", "kappa", "deviation"}
    for other in others:
        left, right = (planned.config.algorithm.model_dump(exclude=credit) for planned in (uniform, other))
        assert left == right
        assert other.config.rollout == uniform.config.rollout and other.config.reward == uniform.config.reward


def test_the_flat_model_is_uniform_everywhere(tmp_path):
    from transformers import AutoModelForCausalLM

    from examples.arithmetic.prepare import make_model

    make_model(1).save_pretrained(tmp_path / "model")
    run.make_flat(tmp_path / "model", tmp_path / "flat")
    flat = AutoModelForCausalLM.from_pretrained(tmp_path / "flat")
    assert flat(torch.tensor([[3, 4, 5]])).logits.abs().max() == 0
    assert load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"].abs().min() > 0


# Plan


def test_seeds_are_the_outer_loop():
    runs = plan(list(ARMS), list(SEEDS), STEPS)
    assert len(runs) == 55 and [planned.seed for planned in runs[:11]] == [1] * 11
    assert [planned.arm for planned in runs[:11]] == list(ARMS) and is_registered(runs)
    assert not is_registered(plan(["grpo"], list(SEEDS), STEPS))
    assert not is_registered(plan(list(ARMS), [1], STEPS))
    assert not is_registered(plan(list(ARMS), list(SEEDS), STEPS, overrides=("optimizer.lr=1",)))


def test_options(capsys):
    options = run._parse(["--seeds", "1-3,7", "--arms", "grpo,dgpo", "optimizer.lr=1"])
    assert (
        options.seeds == [1, 2, 3, 7] and options.arms == ["grpo", "dgpo"] and options.overrides == ["optimizer.lr=1"]
    )
    assert run.main(["--arms", "grp", "--report"]) == 2
    assert run.main(["--report", "optimizer.lrr=1"]) == 2
    errors = capsys.readouterr().err
    assert "no arm" in errors and "grpo" in errors and "optimizer.lrr" in errors


def test_all_runs_once_and_what_is_finished_never_again(command, tmp_path):
    status, started, out = command()
    assert status == 0 and started == ["grpo_1", "dgpo_1", "grpo_2", "dgpo_2", "grpo_3", "dgpo_3"]
    assert "6 of 6: dgpo_3, accuracy 0.300 to 0.780" in out and "remain" not in out
    assert (tmp_path / "report" / "comparison.json").is_file()
    assert command()[1] == []


def test_a_failed_run_is_told_and_tried_again(command, tmp_path):
    status, started, out = command(fate=lambda planned: 3 if planned.name == "dgpo_2" else 0)
    assert status == 1 and len(started) == 6
    assert "dgpo_2 FAILED with status 3" in out and "dgpo_2.log" in out and "the reason" in out
    # The seeds that are whole are reported.
    found = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert found["seeds"] == [1, 3] and found["unfinished"] == ["dgpo_2"]
    status, started, _ = command()
    assert status == 0 and started == ["dgpo_2"]


def test_time_that_is_over_starts_no_run(command):
    status, started, out = command("--hours", "0")
    assert (status, started) == (0, []) and "6 of 6 runs remain, from grpo_1 on" in out


def test_a_stop_ends_the_study(command):
    status, started, out = command(fate=lambda planned: STOPPED if planned.name == "dgpo_1" else 0)
    assert started == ["grpo_1", "dgpo_1"] and "5 of 6 runs remain, from dgpo_1 on" in out
    assert status == 0


def test_a_run_is_asked_to_save_when_the_command_is_ended(study, monkeypatch, tmp_path):
    """The signal that training takes for a request, and its end is waited for."""
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75))); "
    script += "print('up', flush=True); time.sleep(60)"
    popen = run.subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", lambda command, **kw: popen([command[0], "-c", script], **kw))
    log = tmp_path / "log"

    def look(step):
        if "up" in log.read_text():
            signal.raise_signal(signal.SIGINT)

    # A shell's background jobs, perhaps these tests, ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.train(study[0], log, look)
    finally:
        signal.signal(signal.SIGINT, before)
    assert log.read_text().split() == ["up", "saved"]


# Report


def test_measures_and_paired_differences(study, tmp_path):
    for planned in study:
        make_run(planned)
    found = results.report(study, tmp_path / "report")
    assert found["seeds"] == [1, 2, 3] and found["commits"] == ["c0ffee"]
    first = found["arms"]["grpo"]["runs"][0]
    assert first["mean_accuracy"] == pytest.approx(START + 0.2) and first["final_accuracy"] == pytest.approx(0.7)
    assert first["tokens"] == {0: 0, 2: 200} and first["hours"] == pytest.approx(0.02) and first["seed"] == 1
    own = found["differences"]["grpo"]["dgpo"]
    assert own["mean_accuracy"]["mean"] == pytest.approx((0.10 + 0.12 + 0.12) / 6)
    assert own["mean_accuracy"]["shows"] == own["final_accuracy"]["shows"] == "higher"
    assert own["carries_lift"]["mean"] == 5
    assert json.loads((tmp_path / "report" / "comparison.json").read_text())["differences"] == found["differences"]
    assert (tmp_path / "report" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "grpo" in (tmp_path / "report" / "report.html").read_text()


def test_one_seed_has_no_interval(study, tmp_path):
    for planned in study[:2]:
        make_run(planned)
    found = results.report(study, tmp_path / "report")
    assert found["seeds"] == [1] and found["differences"]["grpo"]["dgpo"]["mean_accuracy"]["low"] is None
    assert found["differences"]["grpo"]["dgpo"]["mean_accuracy"]["shows"] == "one seed: no interval"


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(data="d1"), "data.train"),
        (dict(start="5b"), "model.path"),
        (dict(held_out="7+9"), "different problems"),
        (dict(optimizer={"lr": 1e-3}), "optimizer.lr=0.001"),
        (dict(run={"seed": 9}), "run.seed=9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_pair_is_refused(study, tmp_path, change, named):
    for planned in study[:2]:
        make_run(planned, **(change if planned.arm == "dgpo" else {}))
    with pytest.raises(results.UsageError, match="dgpo_1") as refused:
        results.report(study, tmp_path / "report")
    assert named in str(refused.value)
    assert not Path(tmp_path / "report").exists()


def test_nothing_to_report(study, tmp_path):
    make_run(study[0])
    with pytest.raises(results.UsageError, match="no seed is finished in every arm.*dgpo_1"):
        results.report(study, tmp_path / "report")


def test_credit_on_carries_is_of_the_recorded_weights(model, tmp_path):  # noqa: F811
    """Two responses have a carry due at one of their digits; a token is a byte."""
    tokenizer = byte_tokenizer()
    folder = record(tmp_path / "uniform", model, steps=(10, 20), credit="uniform")
    found = results.credit_on_carries(folder, [10, 20])
    step = results.read_step(results.open_run(folder), 10)
    assert tokenizer.vocab_size == len(tokenizer)
    assert found[10]["credit"] == pytest.approx(2 / len(step.tokens["credit"])) and found[20]["lift"] == 1
    guided = record(tmp_path / "dgpo", model, steps=(10,), tau=0.05)
    assert results.credit_on_carries(guided, [10])[10]["lift"] != 1
