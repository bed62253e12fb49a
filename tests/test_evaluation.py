"""What is said of responses to sets of problems: by set, over sets, and how sure it is."""

import dataclasses
import json
import random
import statistics
from types import SimpleNamespace

import pytest
from scipy import stats

from megatron_dgpo import evaluation
from megatron_dgpo.evaluation import evaluate, load_sets, report
from megatron_dgpo.manifest import Progress
from megatron_dgpo.metrics import accuracy_interval
from megatron_dgpo.rollout.response import Prompt, Response
from tests.layouts import make_config
from tests.test_docs import undocumented

K = 2


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(evaluation, "from_rank_0", lambda function: function())


def problems(rewards):
    """A problem for each pair of rewards."""
    return [Prompt(index, [7], "?", "!", {"rewards": pair}) for index, pair in enumerate(rewards)]


def answered(prompts, progress):
    """In place of a RolloutSource: responses whose rewards are in the problems' rows."""
    empty = Response(Prompt(0, [], "", ""), [1, 2, 3], [0.0] * 3, "stop", [[0, 0, 3]])
    return [dataclasses.replace(empty, prompt=p, reward=reward) for p in prompts for reward in p.row["rewards"]]


def evaluated(tmp_path, sets):
    config = make_config("unused", run={"dir": tmp_path}, eval={"samples": K, "temperature": 1.0})
    return evaluate(config, SimpleNamespace(evaluate=answered), sets, Progress(step=4))


def prompts_in(file):
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def test_one_set_has_its_metrics_and_file_without_a_name(tmp_path):
    sets = {"eval": problems([(1, 1), (1, 0), (0, 0.5)])}
    metrics = evaluated(tmp_path, sets)
    low, high = accuracy_interval(K, [2, 1, 0])
    assert metrics == {
        "eval/accuracy": 0.5,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/reward": pytest.approx(3.5 / 6),
        "eval/response_length": 3.0,
        "eval/pass_at_2": pytest.approx(2 / 3),
    }
    assert not undocumented(metrics)
    assert prompts_in(tmp_path / "eval" / "step_00000004.jsonl") == [0, 0, 1, 1, 2, 2]
    assert report(sets, K, metrics) == [f"eval: problems=3 avg@2=0.5000 [{low:.3f}, {high:.3f}] pass@2=0.6667"]


def test_several_sets_have_their_own_and_their_mean(tmp_path):
    """A mean over sets, not over problems: a small set counts as a large one does."""
    sets = {"eval/aime24": problems([(1, 1), (1, 0), (0, 0)]), "eval/amc": problems([(1, 1)])}
    metrics = evaluated(tmp_path, sets)
    assert not undocumented(metrics)
    assert (metrics["eval/aime24/accuracy"], metrics["eval/amc/accuracy"], metrics["eval/accuracy"]) == (0.5, 1.0, 0.75)
    assert metrics["eval/pass_at_2"] == pytest.approx((2 / 3 + 1) / 2)
    assert {"eval/aime24/accuracy_low", "eval/amc/accuracy_high"} < metrics.keys()
    assert not {"eval/accuracy_low", "eval/accuracy_high"} & metrics.keys()
    assert prompts_in(tmp_path / "eval" / "aime24" / "step_00000004.jsonl") == [0, 0, 1, 1, 2, 2]
    assert prompts_in(tmp_path / "eval" / "amc" / "step_00000004.jsonl") == [0, 0]
    lines = report(sets, K, metrics)
    assert [line.split(" avg@")[0] for line in lines] == [
        "eval/aime24: problems=3",
        "eval/amc: problems=1",
        "eval: mean over 2 sets",
    ]
    assert lines[-1] == "eval: mean over 2 sets avg@2=0.7500 pass@2=0.8333"


def test_no_sets_no_metrics(tmp_path):
    assert evaluated(tmp_path, {}) == {} and not (tmp_path / "eval").exists()


def test_sets_are_called_as_their_files_are(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_prompts", lambda config, path, setting, tokenizer: [path.name, "2", "3"])
    for files, expected in (
        ("a/test.jsonl", {"eval": ["test.jsonl", "2"]}),
        (["a/x.jsonl", "b/y.parquet"], {"eval/x": ["x.jsonl", "2"], "eval/y": ["y.parquet", "2"]}),
        (None, {}),
    ):
        config = make_config("unused", data={"train": "x", "eval": files}, eval={"problems": 2})
        assert load_sets(config, None) == expected


# Intervals


def wilson(correct, problems):
    return stats.binomtest(correct, problems).proportion_ci(method="wilson")


@pytest.mark.parametrize("correct, problems", [(30, 30), (0, 30), (1, 1), (0, 1)])
def test_problems_that_are_all_alike_are_an_answer_each(correct, problems):
    """However many responses each has: what other problems would be like, these do not say."""
    for samples in (1, 8):
        counts = [samples * (correct > 0)] * problems
        assert accuracy_interval(samples, counts) == pytest.approx(tuple(wilson(correct, problems)))


def test_interval_of_single_answers():
    """Wilson's but for the variance, which is a sample's: 500 are worth 499."""
    assert accuracy_interval(1, [1, 0] * 200 + [0] * 100) == pytest.approx(tuple(wilson(200, 500)), abs=1e-4)


def test_problems_that_differ_by_chance_alone_are_worth_their_responses():
    wide, narrow = accuracy_interval(32, [16] * 10), accuracy_interval(32, [16, 17] * 5)
    assert wide[1] - wide[0] > 0.5 and narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * (0.25 / 320) ** 0.5, rel=0.02)


def test_interval_is_that_of_a_bootstrap_over_problems():
    draw = random.Random(1)
    correct = [draw.choice([0, 1, 5, 16, 27, 32]) for _ in range(60)]
    means = sorted(statistics.fmean(draw.choices(correct, k=60)) / 32 for _ in range(4000))
    assert accuracy_interval(32, correct) == pytest.approx((means[100], means[-101]), abs=0.015)


def test_interval_holds_what_it_should():
    """Over draws of 30 problems whose shares are spread as those of AIME are: many near 0, some near 1."""
    draw, held = random.Random(2), 0
    for _ in range(400):
        shares = [draw.betavariate(0.4, 0.6) for _ in range(30)]
        low, high = accuracy_interval(8, [sum(draw.random() < share for _ in range(8)) for share in shares])
        held += low <= 0.4 <= high
    assert 0.92 <= held / 400 <= 0.98
