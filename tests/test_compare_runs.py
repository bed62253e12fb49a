"""tools/compare_runs.py as a user calls it, on runs whose means, spreads and faults are known."""

import json
import math
import re
import statistics
from html.parser import HTMLParser

import pytest
import yaml
from scipy import stats

from megatron_dgpo.config_file import setting_names
from tools.compare_runs import main
from tools.comparison import charts
from tools.comparison.intervals import mean_of, verdict, welch
from tools.comparison.runs import Arm, read_run
from tools.comparison.settings import METHOD, SURROUNDINGS, stage_of

METRIC = "eval/accuracy"
# {step: one accuracy a seed} of two arms; the second is 0.1 better with little noise.
LOW = {0: [0.30, 0.34, 0.26], 10: [0.40, 0.46, 0.38], 20: [0.52, 0.55, 0.44]}
HIGH = {0: [0.31, 0.33, 0.27], 10: [0.50, 0.57, 0.46], 20: [0.63, 0.64, 0.55]}


def write_run(folder, seed, accuracy, *, steps=20, planned=20, changes=None, **settings):
    """A run folder. accuracy: {step: value}; changes: {step: {metric: value}}, None in place of a row for no row."""
    config = {"run": {"dir": str(folder), "steps": planned, "seed": seed}, "model": {"path": "/model"}}
    config["data"] = {"train": "/train.jsonl"}
    for section, values in settings.items():
        config[section] = config.get(section, {}) | values
    rows = []
    for step in range(steps + 1):
        row = {"step": step, "time/step_s": 36.0 if step else 500.0}
        if step:
            row |= {
                "rollout/tokens": 100.0,
                "time/rollout_s": 20.0,
                "time/tokens_per_s": 9.0,
                "policy/skipped_steps": 0,
            }
        if step in accuracy:
            row[METRIC] = accuracy[step]
        change = (changes or {}).get(step, {})
        if change is not None:
            rows.append(row | change)
    (folder / "metrics").mkdir(parents=True)
    (folder / "metrics" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_arm(root, name, values, seeds=(1, 2, 3), **settings):
    for place, seed in enumerate(seeds):
        write_run(root / f"{name}_{seed}", seed, {step: at[place] for step, at in values.items()}, **settings)


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def drawn(runs, tmp_path, capsys):
    """The report of the arms whose names are given, one glob each, and its page."""

    def compared(*names, options=()):
        arms = [f"{name}={runs}/{name}_*" for name in names]
        status = main([*arms, *options, "--out", str(tmp_path / "out")])
        assert status == 0, capsys.readouterr().err
        found = json.loads((tmp_path / "out" / "report.json").read_text())
        return found | {"page": (tmp_path / "out" / "report.html").read_text()}

    return compared


@pytest.fixture
def report(drawn, monkeypatch):
    """The same without its charts, which take nearly all of the time."""
    monkeypatch.setattr(charts, "_drawn", lambda *panels, intervals: "")
    return drawn


def warned(report, *parts):
    """Whether one warning has all of these."""
    return any(all(part in text for part in parts) for text in report["warnings"])


def interval(estimate):
    return estimate["low"], estimate["high"]


# Statistics


def test_intervals_are_those_of_scipy():
    first, second = [0.31, 0.42, 0.38, 0.5], [0.2, 0.29, 0.33]
    expected = stats.ttest_1samp(first, 0).confidence_interval(0.95)
    assert (mean_of(first).low, mean_of(first).high) == pytest.approx(expected)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = welch(first, second)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.mean == pytest.approx(statistics.fmean(first) - statistics.fmean(second))


def test_what_a_difference_shows():
    assert verdict(mean_of([0.1, 0.11, 0.12])) == "higher"
    assert verdict(mean_of([-0.1, -0.11, -0.12])) == "lower"
    assert verdict(mean_of([-0.1, 0.11, 0.12])) == "no difference shown"
    assert verdict(mean_of([0.1])) == verdict(welch([0.1], [0.2, 0.3])) == "one seed: no interval"
    # The same runs once more: no spread, and no difference.
    assert verdict(welch([0.5, 0.5], [0.5, 0.5])) == verdict(mean_of([0.0, 0.0])) == "no difference shown"


def test_arms_and_paired_differences(runs, report):
    write_arm(runs, "grpo", LOW, algorithm={"credit": "uniform"})
    write_arm(runs, "dgpo", HIGH)
    found = report("grpo", "dgpo")
    means = {
        name: [statistics.fmean(at[i] for at in values.values()) for i in range(3)]
        for name, values in (("grpo", LOW), ("dgpo", HIGH))
    }
    for arm, values in zip(found["arms"], (LOW, HIGH), strict=True):
        assert arm["steps"] == [0, 10, 20]
        for estimate, expected in ((arm["final"], values[20]), (arm["mean"], means[arm["name"]])):
            assert estimate["mean"] == pytest.approx(statistics.fmean(expected))
            assert interval(estimate) == pytest.approx(stats.ttest_1samp(expected, 0).confidence_interval(0.95))
        for point, at in zip(arm["curves"][METRIC], values.values(), strict=True):
            assert interval(point["value"]) == pytest.approx(stats.ttest_1samp(at, 0).confidence_interval(0.95))
    [difference] = found["differences"]
    assert (difference["test"], difference["seeds"]) == ("paired", [1, 2, 3])
    for measure, pair in (("final", (HIGH[20], LOW[20])), ("mean", (means["dgpo"], means["grpo"]))):
        expected = stats.ttest_rel(*pair).confidence_interval(0.95)
        assert interval(difference[measure]) == pytest.approx(expected)
        assert difference[f"{measure}_shows"] == "higher"
    assert found["warnings"] == [] and "Nothing to warn of" in found["page"]


def test_other_seeds_are_compared_by_welch(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, seeds=(4, 5, 6), algorithm={"tau": 0.1})
    [difference] = report("a", "b")["differences"]
    expected = stats.ttest_ind(HIGH[20], LOW[20], equal_var=False).confidence_interval(0.95)
    assert difference["test"] == "Welch" and difference["seeds"] == []
    assert interval(difference["final"]) == pytest.approx(expected)
    assert difference["final_shows"] == "no difference shown"


def test_seeds_without_a_partner_are_named(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, seeds=(2, 3, 4), algorithm={"tau": 0.1})
    found = report("a", "b")
    [difference] = found["differences"]
    assert (difference["test"], difference["seeds"]) == ("paired", [2, 3])
    expected = stats.ttest_rel(HIGH[20][:2], LOW[20][1:]).confidence_interval(0.95)
    assert interval(difference["final"]) == pytest.approx(expected)
    assert warned(found, "b and a", "seed 1, 4", "leaves out")


def test_a_doubled_seed_is_named_and_not_paired(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, algorithm={"tau": 0.1})
    write_run(runs / "b_again", 3, {0: 0.3, 20: 0.6}, algorithm={"tau": 0.1})
    found = report("a", "b")
    assert found["differences"][0]["test"] == "Welch"
    assert warned(found, "b: several runs have seed 3")


def test_one_seed_has_no_interval_and_says_so(runs, report, capsys):
    write_arm(runs, "a", LOW, seeds=(1,))
    write_arm(runs, "b", HIGH, seeds=(1,), algorithm={"tau": 0.1})
    found = report("a", "b", options=["--baseline", "b"])
    assert interval(found["arms"][0]["final"]) == (None, None)
    [difference] = found["differences"]
    assert difference["arm"] == "a" and difference["test"] == "paired"
    assert difference["final"] == {"mean": pytest.approx(-0.11), "low": None, "high": None}
    assert difference["final_shows"] == "one seed: no interval"
    assert warned(found, "a: one seed, so no interval") and warned(found, "b: one seed, so no interval")
    assert "no interval" in found["page"] and "no interval" in capsys.readouterr().out


# What is missing


def test_a_step_without_a_value_is_left_out_and_named(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, seeds=(1, 2), algorithm={"tau": 0.1})
    # What was not finite is null in a metrics file.
    write_run(runs / "b_3", 3, {0: 0.27, 10: None, 20: 0.55}, algorithm={"tau": 0.1})
    found = report("a", "b")
    assert found["arms"][1]["steps"] == [0, 20]
    assert found["arms"][1]["mean"]["mean"] == pytest.approx(statistics.fmean(HIGH[0] + HIGH[20]))
    assert warned(found, "b: step 10 left out", "b_3")
    assert warned(found, "b and a", "different steps", "steps 0, 20")
    assert found["differences"][0]["steps"] == [0, 20]


def test_a_killed_run_is_named_and_shortens_its_arm(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, seeds=(1, 2), algorithm={"tau": 0.1})
    write_run(runs / "b_3", 3, {0: 0.27, 10: 0.46}, steps=13, algorithm={"tau": 0.1})
    # The line that it was killed in.
    with (runs / "b_3" / "metrics" / "train.jsonl").open("a") as stream:
        stream.write('{"step": 14, "rollout/tok')
    found = report("a", "b")
    assert warned(found, "b_3", "ends at step 13 of 20")
    assert warned(found, "b: step 20 left out", "b_3")
    assert found["arms"][1]["steps"] == [0, 10]
    assert found["arms"][1]["final"]["mean"] == pytest.approx(statistics.fmean(HIGH[10]))
    assert found["differences"][0]["steps"] == [0, 10]
    assert "13 of 20" in found["page"]


def test_rows_that_are_missing_are_named_and_sums_end_before_them(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, seeds=(1, 2), algorithm={"tau": 0.1})
    gap = {step: None for step in (12, 13, 17)}
    write_run(runs / "b_3", 3, {0: 0.27, 10: 0.46, 20: 0.55}, changes=gap, algorithm={"tau": 0.1})
    found = report("a", "b")
    assert warned(found, "b_3", "no metrics of step 12 to 13, 17")
    assert warned(found, "b_3", "tokens are unknown from step 12") and warned(found, "b_3", "hours are unknown")
    points = found["arms"][1]["curves"][METRIC]
    assert [(point["step"], point["tokens"]) for point in points] == [(0, 0), (10, 1000), (20, None)]


def test_steps_that_two_arms_do_not_share(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", {5: HIGH[10], 15: HIGH[20]}, algorithm={"tau": 0.1})
    found = report("a", "b")
    assert found["differences"] == [] and warned(found, "b and a have no step of eval/accuracy in common")


def test_skipped_steps_and_grader_failures_are_named(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, seeds=(1, 2), algorithm={"tau": 0.1})
    faults = {3: {"policy/skipped_steps": 2}, 5: {"policy/skipped_steps": 1, "rollout/grader_failures": 4}}
    write_run(runs / "b_3", 3, {0: 0.27, 20: 0.55}, changes=faults, algorithm={"tau": 0.1})
    found = report("a", "b")
    assert warned(found, "b_3", "3 optimizer steps skipped") and warned(found, "b_3", "4 gradings failed")
    run = found["arms"][1]["runs"][2]
    assert (run["skipped_steps"], run["grader_failures"]) == (3, 4)
    assert found["arms"][0]["runs"][0]["grader_failures"] is None


# What else is shown


def test_tokens_hours_and_phases(runs, report):
    wasted = {step: {"rollout/tokens_wasted": 50.0, "time/policy_s": 10.0} for step in range(1, 11)}
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, changes=wasted, algorithm={"tau": 0.1})
    first, second = report("a", "b")["arms"]
    # The evaluation of the start, 500 s, is none of the hours.
    assert [p["tokens"] for p in first["curves"][METRIC]] == [0, 1000, 2000]
    assert [p["hours"] for p in first["curves"][METRIC]] == pytest.approx([0, 0.1, 0.2])
    assert [p["tokens"] for p in second["runs"][0]["curves"][METRIC]] == [0, 1500, 2500]
    assert first["seconds"] == {"rollout": 20, "step": 36}
    assert second["seconds"] == {"policy": 5, "rollout": 20, "step": 36}


def test_credit_along_training(runs, drawn):
    credit = {step: {"credit/effective_share": 0.9, "credit/tau": 0.01 * step} for step in range(1, 21)}
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH)
    assert "No run has credit/effective_share" in drawn("a", "b")["page"]
    write_arm(runs, "c", HIGH, changes=credit, algorithm={"tau_mode": "effective_share"})
    found = drawn("a", "c")
    assert [p["value"]["mean"] for p in found["arms"][1]["curves"]["credit/tau"]][:2] == pytest.approx([0.01, 0.02])
    assert "Not measured in all runs of these arms: credit/effective_share: a; credit/tau: a" in found["page"]
    assert found["page"].count("<svg") == 2


@pytest.mark.parametrize(
    "metric, per_problem",
    [
        (METRIC, [1.0, 0.5, 0.0, 0.5]),
        ("eval/aime24/accuracy", [1.0, 0.5, 0.0, 0.5]),
        ("eval/reward", [1.0, 0.75, 0.5, 0.75]),
        ("eval/response_length", [2, 3, 4, 3]),
    ],
)
def test_each_run_has_its_interval_over_problems(runs, report, metric, per_problem):
    """Four problems of two responses each; half a reward is no correct answer."""
    right, wrong = {"reward": 1.0, "token_ids": [7, 1]}, {"reward": 0.5, "token_ids": [7, 7, 7, 1]}
    groups = [(right, right), (right, wrong), (wrong, wrong), (wrong, right)]
    mean = statistics.fmean(per_problem)
    for name, tau in (("a", 0.5), ("b", 0.1)):
        folder = write_run(runs / f"{name}_1", 1, {}, changes={20: {metric: mean}}, algorithm={"tau": tau})
        rows = [{"prompt": i} | response for i, group in enumerate(groups) for response in group]
        responses = folder / metric.rpartition("/")[0] / "step_00000020.jsonl"
        responses.parent.mkdir(parents=True)
        responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = report("a", "b", options=["--metric", metric])
    own = found["arms"][0]["runs"][0]["over_problems"]
    half = stats.t.ppf(0.975, 3) * statistics.stdev(per_problem) / math.sqrt(4)
    assert (own["mean"], *interval(own)) == pytest.approx((mean, mean - half, mean + half))
    assert not warned(found, "evaluated again")


def test_an_eval_file_that_was_written_again_is_named(runs, report):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, algorithm={"tau": 0.1})
    (runs / "b_2" / "eval").mkdir()
    (runs / "b_2" / "eval" / "step_00000020.jsonl").write_text('{"prompt": 0, "reward": 1.0, "token_ids": []}\n')
    assert warned(report("a", "b"), "b_2", "evaluated again", "1 in its eval file", "0.64 in its metrics")


# Settings


def test_every_setting_has_a_stage():
    assert {stage_of(name) for name in setting_names()} == METHOD.keys() | SURROUNDINGS.keys()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"algorithm": {"tau": 0.1, "kappa": 0.0}}, None),
        ({"algorithm": {"tau": 0.1, "policy_loss": "sequence_clip"}}, ("2 stages", "credit (algorithm.tau)")),
        ({"optimizer": {"lr": 1e-5}, "batch": {"minibatches": 2}}, None),
        ({"optimizer": {"lr": 1e-5}, "rollout": {"group_size": 4}}, ("2 stages", "sampling (rollout.group_size)")),
        ({"reward": {"grader": "a:b", "weights": {"right": 1.0}}}, None),
        (
            {"reward": {"weights": {"right": 1.0}}, "algorithm": {"advantage": "decoupled", "conflict": 0.2}},
            ("2 stages", "reward (reward.weights)", "advantage (algorithm.advantage, algorithm.conflict)"),
        ),
        ({"data": {"train": "/other.jsonl"}}, ("data (data.train)", "same problems")),
        ({"data": {"eval": ["/a.jsonl", "/b.jsonl"]}}, ("data (data.eval)", "same problems")),
        ({"model": {"reference": "/other"}}, ("model (model.reference)", "start")),
        ({"eval": {"samples": 4}}, ("evaluation (eval.samples)", "measured")),
        ({"parallel": {"tensor": 2}}, ("execution (parallel.tensor)", "hours")),
        ({}, ("b and a do not differ in any setting",)),
    ],
)
def test_arms_that_differ_in_more_than_one_stage(runs, report, settings, expected):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, **settings)
    found = report("a", "b")
    assert warned(found, *expected) if expected else found["warnings"] == []
    names = [f"{section}.{name}" for section, values in settings.items() for name in values]
    assert {setting["name"] for setting in found["settings"]} == set(names)
    assert all(name in found["page"] for name in names)


def test_values_of_the_settings_by_arm(runs, report):
    write_arm(runs, "a", LOW, rollout={"dynamic_sampling": True})
    write_arm(runs, "b", HIGH, seeds=(1, 2))
    several = {"eval": ["/a.jsonl", "/b.jsonl"]}
    write_run(runs / "b_3", 3, {0: 0.27, 20: 0.55}, algorithm={"dual_clip": 3.0}, data=several)
    found = report("a", "b")
    values = {setting["name"]: setting["values"] for setting in found["settings"]}
    assert values == {
        "data.eval": {"a": ["[]"], "b": ["[]", "[/a.jsonl, /b.jsonl]"]},
        "rollout.dynamic_sampling": {"a": ["true"], "b": ["false"]},
        "algorithm.dual_clip": {"a": ["null"], "b": ["null", "3.0"]},
    }
    assert warned(found, "b: its runs differ among themselves in algorithm.dual_clip, data.eval")


# The page


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_hostile_text_stays_text(runs, tmp_path, capsys):
    evil, formula = "</style><script>alert(1)</script>", "$\\frac{1}$ [bold]x[/] <img onerror>"
    metric = "eval/<script>$x_"
    template = f"{evil}{{prompt}}"
    write_arm(runs, "a", LOW, data={"template": template}, changes={20: {metric: 1}})
    write_arm(runs, "b", HIGH, changes={20: {metric: 2}})
    arms = [f"{evil}={runs}/a_*", f"{formula}={runs}/b_*"]
    assert main([*arms, "--metric", metric, "--out", str(tmp_path)]) == 0
    elements = Elements((tmp_path / "report.html").read_text())
    assert not elements.names & {"script", "img", "link", "iframe"}
    assert not {name for name in elements.attributes if name.startswith("on")}
    for text in (evil, formula, template, metric):
        assert text in elements.text
    assert "[bold]x[/]" in capsys.readouterr().out


def test_one_file_without_a_network_and_the_same_bytes_each_time(runs, drawn):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH, changes={1: {"credit/effective_share": 0.9}}, algorithm={"tau": 0.1})
    page = drawn("a", "b")["page"]
    assert set(re.findall(r"\w+://[^\s\"'<]+", page)) == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert not Elements(page).attributes & {"src", "srcset"} and "@import" not in page
    assert set(re.findall(r'href="(.)', page)) <= {"#"}
    names = re.findall(r'id="([^"]*)"', page)
    assert len(names) == len(set(names))
    assert drawn("a", "b")["page"] == page


def test_curves_that_no_run_has_are_said_to_be_missing(runs, drawn):
    nothing = {step: {"rollout/tokens": None, "time/step_s": None} for step in range(1, 21)}
    write_arm(runs, "a", {10: LOW[10]}, changes=nothing)
    write_arm(runs, "b", {10: HIGH[10]}, changes=nothing, algorithm={"tau": 0.1})
    assert drawn("a", "b")["page"].count("not measured in these runs") == 2


# Bad input


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["a={}/a_*"], ("one arm, 'a'", "two or more")),
        (["a={}/a_*", "{}/b_*"], ("expected NAME=GLOB",)),
        (["a={}/a_*", "={}/b_*"], ("expected NAME=GLOB",)),
        (["a={}/a_*", "a={}/b_*"], ("arm 'a' is given twice",)),
        (["a={}/a_*", "b={}/nothing_*"], ("arm 'b'", "no folder matches", "nothing_*")),
        (["a={}/a_*", "b={}/[ab]_1"], ("a_1", "arm 'a'", "arm 'b'")),
        (["a={}/a_*", "b={}/empty"], ("empty", "no metrics/train.jsonl")),
        (["a={}/a_*", "b={}/b_*", "--baseline", "grpo"], ("--baseline='grpo'", "'a', 'b'")),
        (["a={}/a_*", "b={}/b_*", "--metric", "eval/acuracy"], ("--metric=eval/acuracy", "did you mean eval/accuracy")),
        (["a={}/a_*", "b={}/b_*", "--metric", "zzz"], ("--metric=zzz", "it has eval/accuracy, policy/skipped_steps")),
        (["a={}/a_*", "b={}/b_*", "--out", "{}/a_1/config.yaml"], ("config.yaml",)),
    ],
)
def test_bad_arguments(runs, capsys, arguments, parts):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH)
    (runs / "empty").mkdir()
    assert refused([argument.replace("{}", str(runs)) for argument in arguments], capsys, *parts)


@pytest.mark.parametrize(
    "file, content, parts",
    [
        ("metrics/train.jsonl", "", ("no step is in it yet",)),
        ("metrics/train.jsonl", '{"step": 0}\n[1]\n', ("line 2", "expected an object with a 'step'")),
        ("metrics/train.jsonl", '{"step": "x"}\n', ("line 1", "expected an object with a 'step'")),
        ("metrics/train.jsonl", b"\xff\xfe", ("cannot be read",)),
        ("metrics/train.jsonl", '{"step": 0, "eval/accuracy": 0.1}\n{"step": 5}\n', None),
        (
            "metrics/train.jsonl",
            '{"step": 7, "eval/accuracy": 1e400}\n',
            ("--metric=eval/accuracy: not in", "no finite value"),
        ),
        ("metrics/train.jsonl", '{"step": 7, "eval/accuracy": 0.5}\n', ("arm 'b'", "no step has eval/accuracy in all")),
        ("config.yaml", None, ("config.yaml: no such file",)),
        (
            "config.yaml",
            "model: {path: m}\nalgorithm: {ta: 1}\ndata: {train: t}\n",
            ("unknown setting 'algorithm.ta'",),
        ),
        ("eval/step_00000020.jsonl", '{"prompt": 0}\n', ("step_00000020.jsonl", "not a file of responses")),
        ("eval/step_00000020.jsonl", "{", ("step_00000020.jsonl", "not a file of responses")),
    ],
)
def test_files_that_are_not_a_runs(runs, tmp_path, capsys, file, content, parts):
    write_arm(runs, "a", LOW)
    write_arm(runs, "b", HIGH)
    path = runs / "b_2" / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [f"a={runs}/a_*", f"b={runs}/b_*", "--out", str(tmp_path / "out")]
    if parts is None:
        assert main(arguments) == 0
    else:
        assert refused(arguments, capsys, "b_2", *parts)


def refused(arguments, capsys, *parts):
    status = main(arguments)
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("compare_runs: ") and error.count("\n") == 1
    assert all(part in error for part in parts), error
    return True


def test_no_arguments(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "NAME=GLOB" in capsys.readouterr().err


def test_runs_are_by_seed_whatever_their_folders_are_called(runs):
    for name, seed in (("x", 10), ("y", 9)):
        write_run(runs / name, seed, {0: 0.1})
    folders = sorted(runs.iterdir())
    assert [read_run(folder).seed for folder in folders] == [10, 9]
    assert Arm("a", [read_run(folder) for folder in folders]).doubled_seeds == []
