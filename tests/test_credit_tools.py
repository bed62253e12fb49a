"""tools/inspect_credit.py and tools/sweep_credit.py on recordings made up here: no model, no server, no ranks."""

import csv
import html
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch

from examples.arithmetic.carries import carries
from examples.arithmetic.prepare import solve
from megatron_dgpo.algorithm.advantages import group_advantages
from megatron_dgpo.algorithm.objective import token_credit
from megatron_dgpo.algorithm.record import CreditRecord, file_of_credit
from megatron_dgpo.config_file import config_text
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.rollout.recording import file_of_step, write_responses
from megatron_dgpo.rollout.response import Prompt, Response
from megatron_dgpo.statistics import TokenStatistics
from tests.layouts import make_config
from tools import inspect_credit, sweep_credit
from tools.credit import measures
from tools.credit.recorded import open_run, own_rule, read_step, rules_of
from tools.credit.text import marked, text_of, token_texts

HOSTILE = '</script><img src=x onerror=alert(1)><!--<script> https://example.com \\u003c &amp; \u2028 "quoted"'
PIVOTS = "examples.arithmetic.carries:carries"
GROUPS = {
    5: [("7+8+0=15\n3+4+1=8\n#### 85", 1.0), ("7+8+0=15\n3+4+0=7\n#### 75", 0.0)],
    3: [(HOSTILE, 0.0), ("größer als 5 €, 👍", 0.0), ("a", 0.0)],
    9: [("yes", 1.0), ("yes, it is", 1.0)],
}


def byte_tokenizer():
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    Qwen2Config(architectures=["Qwen2ForCausalLM"], vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def made_up(lengths, seed):
    """Float32 [N] by name, as they are of a trained policy: most tokens certain, and like the reference's."""
    draw, count = torch.Generator().manual_seed(seed), sum(lengths)
    logprobs = -torch.rand(count, generator=draw)
    return {
        "logprobs": logprobs,
        "entropy": 2 * torch.rand(count, generator=draw) ** 3,
        "log_ratio": 0.2 * torch.randn(count, generator=draw),
        "deviation": torch.rand(count, generator=draw) ** 4,
        "reference_logprobs": logprobs - torch.rand(count, generator=draw),
        "square_prob": (2 * logprobs).exp(),
    }


def record(folder, model, groups=GROUPS, steps=(1,), reference=True, values=None, **algorithm):
    """A run's folder, as training with rollout.record=true leaves it, with credit by the trainer's own function.

    Responses are sampled by one replica or the other and trained on by the other, in micro-batches of two.
    """
    config = make_config(model, run={"dir": str(folder)}, algorithm=algorithm)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_text(config))
    tokenizer = byte_tokenizer()
    for step in steps:
        sampled, trained = ([], []), ([], [])
        for number, (position, group) in enumerate(groups.items()):
            rewards = torch.tensor([reward for _, reward in group])
            advantages = group_advantages(rewards, len(group), config.algorithm.advantage, 1e-6).tolist()
            for member, (text, reward) in enumerate(group):
                ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
                prompt = Prompt(position, [], f"question {position}", "85")
                spans = [[step, 0, len(ids)]]
                response = Response(prompt, ids, [0.0] * len(ids), "stop", spans, text, reward)
                sampled[number % 2].append((position, response))
                trained[(number + member) % 2].append(
                    TrainingSequence.of([3], ids, advantages[member], key=(position, member))
                )
        for replica in (0, 1):
            positions = [position for position, _ in sampled[replica]]
            responses = [response for _, response in sampled[replica]]
            write_responses(file_of_step(folder / "rollouts", step, replica), responses, positions)
            credit_record = CreditRecord(keeps=True)
            for first in range(0, len(trained[replica]), 2):
                batch = MicroBatch.pack(trained[replica][first : first + 2])
                lengths = batch.cu_responses.diff().tolist()
                known = made_up(lengths, 10 * step + first) if values is None else values(lengths)
                if not reference:
                    del known["deviation"], known["reference_logprobs"]
                statistics = TokenStatistics(
                    known["logprobs"], known["entropy"], known.get("deviation"), known.get("reference_logprobs")
                )
                credit, tau = token_credit(statistics, known["log_ratio"], batch, len(tokenizer), config.algorithm)
                credit_record.add(batch, known, credit, tau)
            credit_record.write(file_of_credit(folder / "rollouts", step, replica), trained[replica])
    return folder


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return record(tmp_path_factory.mktemp("run"), model, steps=(10, 20, 30), tau=0.05, scored_by="old")


def inspected(run, out, *options):
    """The content of the page that the tool writes, and the page."""
    assert inspect_credit.main([str(run), "--out", str(out), *options]) == 0
    page = out.read_text(encoding="utf-8")
    [text] = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    return json.loads(text), page


def refused(tool, capsys, *arguments):
    """The one sentence that the tool ends with."""
    assert tool.main([str(argument) for argument in arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    [line] = found.err.splitlines()
    return line


# Reading


METHODS = [
    dict(tau=0.02, kappa=0.5),
    dict(tau=0.05, entropy_norm="response_max"),
    dict(tau_mode="effective_share", effective_share=0.6),
    dict(credit="future_kl", dual_clip=1.2),
    dict(credit="uniform"),
    dict(credit="none"),
]


@pytest.mark.parametrize("algorithm", METHODS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_runs_own_weights_are_the_trainers(model, tmp_path, algorithm):
    step = read_step(open_run(record(tmp_path, model, **algorithm)), 1)
    assert step.keys == sorted(step.keys) and len(step.keys) == 7
    for (position, member), response in zip(step.keys, step.responses, strict=True):
        assert (response.text, response.reward) == GROUPS[position][member]
    weights = own_rule(step.run.algorithm).weigh(step)
    torch.testing.assert_close(weights, step.tokens["credit"], rtol=0, atol=1e-6)


def test_a_rule_is_what_a_run_with_its_settings_would_have(model, tmp_path):
    """Of the same numbers, by the trainer's own function."""
    others = {
        "DGPO, τ = 0.05": dict(tau=0.05),
        "DGPO, E = 0.8": dict(tau_mode="effective_share", effective_share=0.8),
        "DGPO, E = 0.5": dict(tau_mode="effective_share", effective_share=0.5),
        "no gate, τ = 0.05": dict(tau=0.05, kappa=0.0),
        "no gate, E = 0.8": dict(tau_mode="effective_share", effective_share=0.8, kappa=0.0),
        "uniform": dict(credit="uniform"),
    }
    step = read_step(open_run(record(tmp_path / "run", model, tau=0.05)), 1)
    rules = {rule.name: rule for rule in rules_of(step)}
    assert rules.keys() == others.keys() | {"entropy only, E = 0.8"}
    for name, settings in others.items():
        other = read_step(open_run(record(tmp_path / name, model, **settings)), 1)
        torch.testing.assert_close(rules[name].weigh(step), other.tokens["credit"], rtol=0, atol=1e-6)


def test_every_rule_shares_out_as_many_tokens_as_there_are(run):
    step = read_step(open_run(run), 20)
    for rule in rules_of(step):
        for weights in step.split(rule.weigh(step)):
            assert sum(weights) == pytest.approx(len(weights), rel=1e-5), rule.name


def test_without_a_reference_there_are_the_rules_that_need_none(model, tmp_path):
    step = read_step(open_run(record(tmp_path, model, reference=False, credit="uniform")), 1)
    assert [rule.name for rule in rules_of(step)] == ["uniform", "entropy only, E = 0.8"]
    assert inspect_credit.main([str(tmp_path), "--step", "1", "--out", str(tmp_path / "page.html")]) == 0
    assert sweep_credit.main([str(tmp_path), "--out", str(tmp_path / "sweep")]) == 0


def test_several_rewards_change_nothing_here(model, tmp_path):
    """Beside the settings."""
    run = record(tmp_path / "run", model, tau=0.05)
    before, _ = inspected(run, tmp_path / "before.html", "--step", "1")
    found = swept(run)
    for file in (run / "rollouts").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        several = [row | {"components": {"right": row["reward"], "brief": 0.25}} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in several))
    weights = {"weights": {"right": 1.0, "brief": 0.0}}
    config = make_config(model, run={"dir": str(run)}, algorithm={"tau": 0.05}, reward=weights)
    (run / "config.yaml").write_text(config_text(config))
    assert swept(run) == found
    assert inspected(run, tmp_path / "after.html", "--step", "1")[0] == before
    assert {tuple(r.components.items()) for r in read_step(open_run(run), 1).responses} == {
        (("right", right), ("brief", 0.25)) for right in (0.0, 1.0)
    }


# Text


def test_characters_are_shown_at_their_last_token():
    tokenizer, text = byte_tokenizer(), "a€👍\n"
    found = token_texts(tokenizer, [*tokenizer(text).input_ids, tokenizer.eos_token_id])
    assert [token.shown for token in found] == ["a", "", "", "€", "", "", "", "👍", "\n", "<eos>"]
    assert text_of(found) == text
    assert marked(found, [(1, 2)]) == [False, True, True, True, *[False] * 6]
    assert marked(found, [(2, 9)]) == [False] * 4 + [True] * 5 + [False]


def test_bytes_that_are_no_characters_are_shown_and_soon():
    tokenizer = byte_tokenizer()
    [euro, *rest] = tokenizer("€").input_ids
    for ids in ([euro], [euro] * 40, [euro, tokenizer.eos_token_id], [*rest, *tokenizer("ok").input_ids]):
        found = token_texts(tokenizer, ids)
        assert len(found) == len(ids)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert text_of(found).count("\ufffd") >= 1 and text_of(found).strip("\ufffd") == whole.strip("\ufffd")
        assert "".join(token.shown for token in found).endswith(("\ufffd", "<eos>", "ok"))


# The page


def test_the_page_shows_what_was_recorded(run, tmp_path):
    content, _ = inspected(run, tmp_path / "page.html", "--step", "20")
    step = read_step(open_run(run), 20)
    assert content["rules"][0]["name"] == "DGPO, τ = 0.05" and content["rules"][1]["name"] == "uniform"
    assert len(content["responses"]) == 7
    for place, response in enumerate(content["responses"]):
        assert (response["position"], response["member"]) == step.keys[place]
        assert response["advantage"] == pytest.approx(float(step.advantages[place]))
        assert "".join(response["tokens"]) == step.responses[place].text + "<eos>"
        length = len(response["tokens"])
        for rule in content["rules"]:
            assert sum(rule["weights"][place]) == pytest.approx(length, rel=1e-5)
            squares = sum(weight**2 for weight in rule["weights"][place])
            assert rule["share"][place] == pytest.approx(length / squares, rel=1e-4)
        for name, column in (("d", "deviation"), ("log ρ", "reference_logprobs")):
            assert content["values"][name][place] == pytest.approx(step.split(step.tokens[column])[place], rel=1e-5)
        ratios = [math.exp(value) for value in step.split(step.tokens["log_ratio"])[place]]
        assert content["values"]["ratio"][place] == pytest.approx(ratios, rel=1e-5)
    assert all(share == 1 for share in content["rules"][1]["share"])


def test_a_hostile_response_stays_text_and_nothing_leads_to_the_network(run, tmp_path):
    content, page = inspected(run, tmp_path / "page.html", "--step", "10")
    [hostile] = [r for r in content["responses"] if (r["position"], r["member"]) == (3, 0)]
    assert "".join(hostile["tokens"]) == HOSTILE + "<eos>"
    assert page.count("<script") == page.count("</script") == 2 and "<img" not in page.replace("><img src=x", "")
    assert "<!--" not in page and not re.search(r"https?://|//\w+\.|@import|url\(|\bsrc=(?!x )", page)
    assert "innerHTML" not in page and "default-src 'none'" in page


def test_one_group_alone(run, tmp_path):
    content, _ = inspected(run, tmp_path / "page.html", "--step", "10", "--position", "5")
    assert [(r["position"], r["member"]) for r in content["responses"]] == [(5, 0), (5, 1)]
    assert content["rules"][0]["mean_share"] == pytest.approx(sum(content["rules"][0]["share"]) / 2)


def test_carries_are_the_digits_after_sums_of_ten_and_more():
    text = "7+8+0=15\n3+6+0=9\n5+5+0=10\n#### 1095"
    assert [(text[start:end], start) for start, end in carries(text)] == [("0", 13)]
    assert carries("7+8+0=15\n\n3+6+1=10") == carries("no sums") == []
    # 778 + 345, by a pupil who never forgets.
    text = solve(778, 345, SimpleNamespace(random=lambda: 1.0))
    assert [text[start:end] for start, end in carries(text)] == ["1", "1"]


def test_pivots_have_their_credit_and_its_lift(model, tmp_path):
    """Scores are 0 but on the first carry digit, where e^(s/τ) is 4: it weighs four times as much as any other."""

    def values(lengths):
        known = made_up(lengths, 0)
        known["deviation"] = torch.zeros(sum(lengths))
        for start, length in zip(accumulate([0, *lengths]), lengths, strict=False):
            known["deviation"][start + 13 : start + 14] = math.log(4) / 2 if length > 13 else 0
        return known

    run = record(tmp_path, model, {5: GROUPS[5]}, values=values, kappa=0.0, tau=0.5)
    content, _ = inspected(run, tmp_path / "a.html", "--step", "1", "--pivots", PIVOTS)
    length = len(GROUPS[5][0][0]) + 1
    own, uniform = (next(r for r in content["rules"] if r["name"] == name) for name in ("DGPO, τ = 0.5", "uniform"))
    for response in content["responses"]:
        assert [i for i, pivot in enumerate(response["pivots"]) if pivot] == [13]
    credit = 4 / (length + 3)
    assert own["all_on_pivots"] == pytest.approx({"credit": credit, "lift": credit * length}, rel=1e-5)
    assert own["on_pivots"][0] == pytest.approx({"credit": credit, "lift": credit * length}, rel=1e-5)
    assert uniform["all_on_pivots"] == pytest.approx({"credit": 1 / length, "lift": 1})
    assert inspect_credit.on_pivots([[1.0, 2.0]], [[False, False]]) is None


# The sweep


def hand_worked(folder, model, **algorithm):
    """Scores 0, 0, 0.1, 0.3 in each of two responses of four tokens."""

    def values(lengths):
        scores = torch.tensor([0.0, 0.0, 0.1, 0.3]).repeat(len(lengths))
        # An entropy of log V opens the gate.
        return made_up(lengths, 0) | {"deviation": scores, "entropy": torch.full_like(scores, math.log(258))}

    return record(folder, model, {0: [("abc", 1.0), ("abd", 0.0)]}, values=values, **algorithm)


def swept(run, steps=None):
    return sweep_credit.sweep(open_run(run), steps)


def sweep_files(run, out, *options):
    """What the tool writes there."""
    assert sweep_credit.main([str(run), "--out", str(out), *options]) == 0
    return [(out / name).read_text(encoding="utf-8") for name in ("sweep.json", "sweep.csv", "sweep.html")]


def test_figures_worked_by_hand(model, tmp_path):
    found = swept(hand_worked(tmp_path / "run", model))
    [step] = found["steps"]
    run_step = read_step(open_run(tmp_path / "run"), 1)
    assert run_step.tokens["credit"][:4].tolist() == pytest.approx([0.7931, 0.7931, 0.9687, 1.4451], abs=5e-5)
    own = step["rules"][found["own"]]
    assert own["effective_share"] == pytest.approx(0.93355, abs=5e-6)
    assert own["max_weight"] == pytest.approx(1.4451, abs=5e-5)
    assert own["top1_share"] == own["top10_share"] == pytest.approx(1.4451 / 4, abs=2e-5)
    assert own["right"] == own["wrong"] == {name: own[name] for name in own["right"]}
    # Tokens 0 to 3 of four begin the tenths 0, 2, 5 and 7.
    assert own["deciles"] == [
        pytest.approx(weight, abs=5e-5) if weight else None
        for weight in (0.7931, None, 0.7931, None, None, 0.9687, None, 1.4451, None, None)
    ]
    uniform = step["rules"]["uniform"]
    assert (uniform["effective_share"], uniform["max_weight"], uniform["top10_share"]) == (1, 1, 0.25)
    # The end token scores most, in both; c and d score the same, and half as often each.
    assert [(row["token"], row["count"]) for row in own["by_token"]][:1] == [("<eos>", 2)]
    assert {row["token"] for row in own["by_token"]} == {"<eos>", "a", "b", "c", "d"}
    assert own["by_token"][0]["mean_weight"] == pytest.approx(1.4451, abs=5e-5)
    assert own["by_token"][0]["share_of_credit"] == pytest.approx(1.4451 / 4, abs=2e-5)
    assert sum(row["share_of_credit"] for row in own["by_token"]) == pytest.approx(1)


def test_the_temperature_of_a_share_gives_it(model, tmp_path):
    [step] = swept(hand_worked(tmp_path / "run", model, tau=0.1))["steps"]
    assert step["own_tau"] == 0.1
    scores = [0, 0, 0.1, 0.3]

    def share(tau):
        exponentials = [math.exp(score / tau) for score in scores]
        return sum(exponentials) ** 2 / 4 / sum(e * e for e in exponentials)

    assert share(0.1) == pytest.approx(0.37258, abs=5e-6)
    assert {f"{kappa:g}" for kappa in (0, 0.5, 1, 2)} == step["kappas"].keys()
    for kappa in step["kappas"].values():
        # The gate is open: κ changes nothing.
        assert share(kappa["tau_at_share"]) == pytest.approx(0.8, abs=1e-5)
        for point in kappa["curve"]:
            assert point["effective_share"] == pytest.approx(share(point["tau"]) if point["tau"] > 2e-3 else 0.25, 1e-4)
        assert all(a["effective_share"] <= b["effective_share"] + 1e-6 for a, b in pairwise(kappa["curve"]))


def test_rules_are_compared_within_responses():
    bounds = torch.tensor([0, 4, 7, 8])
    a = torch.tensor([1.0, 2, 3, 4, 1, 1, 2, 1])
    b = torch.tensor([4.0, 3, 2, 1, 1, 1, 2, 1])
    weights = torch.tensor([5.0, 1, 5, 0, 2, 1, 2, 9])
    assert measures.ranks_of(weights, bounds).tolist() == [2.5, 1, 2.5, 0, 1.5, 0, 1.5, 0]
    correlation, overlap = measures.likeness({"a": a, "b": b, "flat": torch.ones(8)}, bounds)
    assert correlation == {"a": {"a": pytest.approx(1), "b": 0}, "b": {"a": 0, "b": pytest.approx(1)}}
    # Opposite in the first response, equal in the second; the third tells nothing apart.
    assert overlap == {"a": {"a": 1, "b": 0.5}, "b": {"a": 0.5, "b": 1}}


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    draw = torch.Generator().manual_seed(3)
    a, b = torch.randint(0, 6, (2, 40), generator=draw).float()
    correlation, _ = measures.likeness({"a": a, "b": b}, torch.tensor([0, 15, 40]))
    expected = (spearmanr(a[:15], b[:15]).statistic + spearmanr(a[15:], b[15:]).statistic) / 2
    assert correlation["a"]["b"] == pytest.approx(expected)


def test_cosines_are_those_of_the_losses_gradients():
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(9, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    chosen, bounds = torch.randint(0, 5, (9,), generator=draw), torch.tensor([0, 4, 7, 9])
    advantages, counted = torch.tensor([1.5, -0.5, 2.0]).double(), [True, True, False]
    weights = {name: torch.rand(9, generator=draw).double() for name in "ab"} | {"uniform": torch.ones(9)}
    log_pi = logits.log_softmax(-1)
    logprobs = log_pi[torch.arange(9), chosen]
    of_tokens = (advantages * torch.tensor(counted)).repeat_interleave(bounds.diff())
    gradients = {
        name: torch.autograd.grad(-(of_tokens * w * logprobs).sum(), logits, retain_graph=True)[0].flatten()
        for name, w in weights.items()
    }
    known = {"logprobs": logprobs.detach(), "square_prob": (2 * log_pi).exp().sum(-1).detach()}
    step = SimpleNamespace(tokens=known, advantages=advantages, counted=counted, cu_seqlens=bounds)
    found = measures.cosines(weights, step)
    for a, ours in gradients.items():
        for b, theirs in gradients.items():
            assert found[a][b] == pytest.approx(float(torch.cosine_similarity(ours, theirs, 0)), abs=1e-12)
    assert found["uniform"]["uniform"] == pytest.approx(1, abs=1e-12)
    assert measures.cosines({"none": torch.zeros(9)}, step) == {"none": {"none": None}}


def test_groups_that_dynamic_sampling_drops(run):
    found = swept(run, "10:30:10")
    assert [step["step"] for step in found["steps"]] == [10, 20, 30]
    assert {json.dumps(step["groups"]) for step in found["steps"]} == {'{"all": 3, "right": [9], "wrong": [3]}'}


def test_files_of_a_sweep_say_the_same_and_are_the_same_each_time(run, tmp_path, capsys):
    files = sweep_files(run, tmp_path / "first", "--steps", "10:20:10")
    # A line a step on the terminal.
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"│ +\d", line)]
    assert [line.split()[1] for line in lines] == ["10", "20"] and all("2 of 3" in line for line in lines)
    assert files == sweep_files(run, tmp_path / "second", "--steps", "10:20:10")
    found, rows, page = json.loads(files[0]), list(csv.DictReader(files[1].splitlines())), files[2]
    own = next(row for row in rows if row["step"] == "20" and row["rule"] == found["own"])
    expected = found["steps"][1]["rules"][found["own"]]
    assert float(own["effective_share"]) == pytest.approx(expected["effective_share"], rel=1e-5)
    assert len(rows) == 2 * (len(found["steps"][0]["rules"]) + len(measures.KAPPAS) * len(measures.TAUS))
    assert page.count("<svg") == page.count("</svg>") == 3 and "Spearman" in page
    assert "://" not in page and "<script" not in page


def test_steps():
    known = list(range(1, 51))
    assert sweep_credit.steps_of(None, known) == known
    assert sweep_credit.steps_of("10:50:10", known) == [10, 20, 30, 40, 50]
    assert sweep_credit.steps_of("7:9", known) == [7, 8, 9] and sweep_credit.steps_of("7", known) == [7]


# Refusals


def test_what_is_not_there_is_one_sentence(run, model, tmp_path, capsys):
    assert "is no run's folder" in refused(sweep_credit, capsys, tmp_path)
    (tmp_path / "config.yaml").write_text(config_text(make_config(model)))
    for tool, options in ((sweep_credit, []), (inspect_credit, ["--step", 1])):
        assert "train with rollout.record=true" in refused(tool, capsys, tmp_path, *options)
    assert "step 11 was not recorded; there are 3, 10 to 30" in refused(inspect_credit, capsys, run, "--step", 11)
    sentence = refused(inspect_credit, capsys, run, "--step", 10, "--position", 4)
    assert "--position=4" in sentence and "positions are 3 to 9" in sentence


@pytest.mark.parametrize("steps", ["ten", "", "1:2:3:4", "10:20:0", "-1", "20:10", "10:40:10", "11"])
def test_steps_that_are_none_are_one_sentence(run, tmp_path, capsys, steps):
    assert f"--steps={steps}: " in refused(sweep_credit, capsys, run, f"--steps={steps}", "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_credit_that_does_not_follow_from_the_settings_is_refused(model, tmp_path, capsys):
    record(tmp_path, model, tau=0.05)
    (tmp_path / "config.yaml").write_text(config_text(make_config(model, algorithm={"tau": 0.05001})))
    for tool, options in ((sweep_credit, []), (inspect_credit, ["--step", 1])):
        sentence = refused(tool, capsys, tmp_path, *options)
        assert "does not follow from the settings" in sentence and "config.yaml" in sentence


def test_files_of_different_runs_are_refused(model, tmp_path, capsys):
    record(tmp_path, model)
    file = file_of_step(tmp_path / "rollouts", 1, 0)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")
    assert "do not belong together: they differ in response 1 at position 9" in refused(sweep_credit, capsys, tmp_path)
    file.write_text("\n".join(lines)[:-9])
    assert f"line {len(lines)} is no recorded response" in refused(sweep_credit, capsys, tmp_path)


def test_numbers_that_are_not_finite_are_refused(model, tmp_path, capsys):
    def values(lengths):
        return made_up(lengths, 0) | {"entropy": torch.full((sum(lengths),), math.nan)}

    record(tmp_path, model, values=values, credit="uniform")
    assert "entropy of step 1 are not all finite" in refused(sweep_credit, capsys, tmp_path)


@pytest.mark.parametrize(
    "name, found",
    [
        ("carries", "expected module:function"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("examples.arithmetic.carries:carry", "AttributeError"),
        ("examples.arithmetic.carries:re", "is of type module"),
        ("math:sqrt", "failed on"),
        ("tests.test_credit_tools:beyond", "gave the span 0 to 999"),
    ],
)
def test_pivots_that_are_none_are_one_sentence(run, capsys, tmp_path, name, found):
    options = ["--step", 10, "--out", tmp_path / "page.html", "--pivots", name]
    sentence = refused(inspect_credit, capsys, run, *options)
    assert f"--pivots={name}: " in sentence and found in sentence
    assert not list(tmp_path.iterdir())


def beyond(text):
    return [(0, 999)]


# A browser


def dumped_dom(page, home):
    """What a browser without network makes of a page. home: its own, whose path must be short for its sockets."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("NOT TESTED: no chromium here, which would open the page")
    command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={home}/profile", "--virtual-time-budget=5000", "--dump-dom", f"file://{page}"]
    environment = os.environ | {"HOME": home, "TMPDIR": home}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_browser_without_network_shows_every_token(run, tmp_path):
    content, _ = inspected(run, tmp_path / "page.html", "--step", "10", "--pivots", PIVOTS)
    with tempfile.TemporaryDirectory() as home:
        dom = dumped_dom(tmp_path / "page.html", home)
    shown = dom[: dom.index('<script type="application/json"')]
    tokens = re.findall(r'<span class="token([^"]*)"[^>]*background: (color-mix[^;]*);[^>]*>([^<]*)</span>', shown)
    assert len(tokens) == sum(len(response["tokens"]) for response in content["responses"])
    marks = [bool(pivot) for pivot, _, _ in tokens]
    assert marks == [pivot for response in content["responses"] for pivot in response["pivots"]] and any(marks)
    assert len({colour for _, colour, _ in tokens}) > 10
    text = html.unescape("".join(text for _, _, text in tokens))
    assert text == "".join("".join(r["tokens"]) for r in content["responses"]).replace("\n", "↵\n")
    assert HOSTILE in text and "<img" not in shown and "<!--" not in shown
