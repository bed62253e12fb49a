"""Every method of examples/algorithms trains, and does the same on one replica as on two."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dgpo.config_file import load_config
from tests.layouts import make_config
from tests.ranks import run_ranks
from tests.test_docs import undocumented
from tools.tiny_models import make_tiny_model

PRESETS = sorted((Path(__file__).parents[1] / "examples" / "algorithms").glob("*.yaml"))
GROUP, LIMIT = 4, 12
WEIGHTS = {"right": 1.0, "brief": 0.5}


def made_up_responses():
    """Of four prompts, in whose groups both rewards and lengths differ; some responses are cut off."""
    from megatron_dgpo.rollout.response import Prompt, Response

    draw = torch.Generator().manual_seed(5)
    found = []
    for index in range(4):
        prompt = Prompt(index, torch.randint(3, 131, (3,), generator=draw).tolist(), "", "")
        for place in range(GROUP):
            length = 2 + (5 * index + 3 * place) % (LIMIT - 1)
            tokens = torch.randint(3, 131, (length,), generator=draw).tolist()
            logprobs = (-5 + torch.rand(length, generator=draw)).tolist()
            reason = "length" if length == LIMIT else "stop"
            components = {"right": float((index + place) % 3 == 0), "brief": (LIMIT - length) / LIMIT}
            reward = sum(WEIGHTS[name] * components[name] for name in WEIGHTS)
            versions = [[0, 0, length]]
            found.append(Response(prompt, tokens, logprobs, reason, versions, reward=reward, components=components))
    return found


def updates(config_file, presets, *overrides):
    """{preset: metrics, and the weights after two minibatches} of this rank, all in one process group."""
    from megatron_dgpo.algorithm.objective import Objective
    from megatron_dgpo.algorithm.record import CreditRecord
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import context_group, context_place, replica, tensor_group, tensor_place
    from megatron_dgpo.model.reference import Reference
    from megatron_dgpo.session import Session
    from megatron_dgpo.update import update

    init_device()
    found = {}
    with Session(load_config(config_file, list(overrides)), "train", 100) as session:
        reference = Reference(session.config, session.architecture)
        folder = session.config.run.dir
        for preset in presets:
            own = f"run.dir={folder / preset.stem}"
            session.config = config = load_config(config_file, [str(preset), *overrides, own])
            session.policy.load(config.model.path)
            frozen = Reference(config, session.architecture) if config.needs_start else reference
            keeps = tensor_place()[0] == context_place()[0] == 0
            record = CreditRecord(keeps) if config.rollout.record else None
            objective = Objective(config, VOCAB, reference.head_weight, tensor_group(), context_group(), record)
            number, replicas = replica()
            responses = made_up_responses()
            groups = {i: responses[i * GROUP : (i + 1) * GROUP] for i in range(4) if i % replicas == number}
            metrics = update(session, objective, frozen if config.needs_reference else None, groups, 1)
            # Whoever does not write keeps nothing.
            assert record is None or not record._parts
            weights = torch.cat([p.detach().flatten() for m in session.policy.modules for p in m.parameters()])
            found[preset.stem] = metrics, weights.clone()
    return found


VOCAB = 131


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    policy, teacher = (make_tiny_model(folder / str(seed), "qwen2", seed=seed, vocab_size=VOCAB) for seed in (1, 2))
    settings = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(policy), "reference": str(teacher), "dtype": "float32"},
        "batch": {"micro_batch_tokens": 40, "minibatches": 2},
        "optimizer": {"lr": 1e-3},
        "rollout": {"group_size": GROUP, "max_response_tokens": LIMIT, "context_tokens": 32},
        "data": {"train": "none"},
        "reward": {"grader": "module:function", "weights": WEIGHTS},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_every_method_on_one_replica_and_on_two(config):
    [alone] = run_ranks(updates, 1, config, PRESETS)
    shared = run_ranks(updates, 2, config, PRESETS)
    before = None
    for name, (metrics, weights) in alone.items():
        assert not undocumented(metrics)
        assert metrics["policy/skipped_steps"] == 0 and metrics["policy/grad_norm"] > 0, name
        for other_metrics, other_weights in (found[name] for found in shared):
            assert other_metrics["policy/loss"] == pytest.approx(metrics["policy/loss"], rel=1e-4, abs=1e-6), name
            assert other_metrics["policy/model_tflop"] == metrics["policy/model_tflop"], name
            assert other_metrics["policy/slowest_rank"] in (0, 1) and not undocumented(other_metrics)
            # Adam's first steps are as large for the smallest gradient as for any: what rounding makes is one of them.
            assert (other_weights - weights).abs().mean() < 1e-5, name
        assert before is None or not torch.equal(before, weights), name
        before = weights
    # Two minibatches: three passes of the update, one of the old policy, one of the reference if there is one.
    tflop = {name: metrics["policy/model_tflop"] for name, (metrics, _) in alone.items()}
    assert tflop["dapo"] * 5 == pytest.approx(tflop["dgpo"] * 4) and tflop["dgpo"] > 0
    assert alone["dgpo_calibrated"][0]["credit/effective_share"] == pytest.approx(0.8, abs=1e-3)
    assert "policy/reference_kl" in alone["grpo"][0] and "policy/reference_kl" not in alone["dapo"][0]
    assert alone["dapo"][0]["policy/counted_share"] == alone["gdpo"][0]["policy/counted_share"] == 1
    assert 0.5 < alone["gd2po"][0]["policy/counted_share"] < 1
    for name, mean in (("right", 6 / 16), ("brief", sum(r.components["brief"] for r in made_up_responses()) / 16)):
        assert alone["gdpo"][0][f"rollout/reward/{name}"] == pytest.approx(mean)
        assert shared[1]["gdpo"][0][f"rollout/reward/{name}"] == pytest.approx(mean)


DGPO = ("dgpo", "dgpo_calibrated")
RECORDED = [preset for preset in PRESETS if preset.stem in (*DGPO, "fipo", "gd2po", "mathforge")]


def recorded(config, folder, world_size, *overrides, presets=RECORDED):
    from megatron_dgpo.algorithm.record import read_credit

    run_ranks(updates, world_size, config, presets, "rollout.record=true", f"run.dir={folder}", *overrides)
    return {preset.stem: read_credit(folder / preset.stem / "rollouts", 1) for preset in presets}


@pytest.fixture(scope="module")
def recorded_alone(config, tmp_path_factory):
    return recorded(config, tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize("layout", ["data", "tensor", "pipeline", "context"])
def test_what_credit_is_made_of_is_recorded_whatever_the_layout(config, recorded_alone, tmp_path, layout):
    for name, found in recorded(config, tmp_path, 2, f"parallel.{layout}=2").items():
        expected = recorded_alone[name]
        assert found.keys() == expected.keys() == {(i, place) for i in range(4) for place in range(GROUP)}
        for key, response in found.items():
            other = expected[key]
            assert (response.advantage, response.counted) == (other.advantage, other.counted)
            assert response.tokens.keys() == other.tokens.keys()
            assert ("deviation" in response.tokens) == (name in DGPO)
            for column, values in response.tokens.items():
                # The second minibatch is of the weights that the first one made.
                assert values == pytest.approx(other.tokens[column], rel=2e-3, abs=2e-3), (name, key, column)


def test_recorded_probabilities_are_the_models(config, recorded_alone):
    """Of the first minibatch, before any update."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(load_config(config, []).model.path, dtype=torch.float64)
    for (position, place), response in sorted(recorded_alone["dgpo"].items())[: 2 * GROUP]:
        made = made_up_responses()[position * GROUP + place]
        with torch.no_grad():
            logits = model(torch.tensor([[*made.prompt.token_ids, *made.token_ids]])).logits[0]
        log_pi = logits[len(made.prompt.token_ids) - 1 : -1].log_softmax(-1)
        assert response.tokens["square_prob"] == pytest.approx((2 * log_pi).exp().sum(-1).numpy(), rel=1e-4)


@pytest.fixture(scope="module")
def response_kl(config):
    """[16] Σ log π(a) − log ρ(a) of the made-up responses, by transformers in float64."""
    from transformers import AutoModelForCausalLM

    settings = load_config(config, []).model
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (settings.path, settings.reference)]
    found = []
    for made in made_up_responses():
        chosen = []
        for model in models:
            with torch.no_grad():
                logits = model(torch.tensor([[*made.prompt.token_ids, *made.token_ids]])).logits[0]
            log_pi = logits[len(made.prompt.token_ids) - 1 : -1].log_softmax(-1)
            chosen.append(log_pi.gather(-1, torch.tensor(made.token_ids)[:, None]).sum())
        found.append((chosen[0] - chosen[1]).item())
    return torch.tensor(found)


@pytest.mark.parametrize("layout", ["data", "tensor", "pipeline", "context"])
def test_kl_is_taken_off_the_reward_of_whole_responses_in_every_layout(config, response_kl, tmp_path, layout):
    """With credit that asks for the reference once more, and without; of one optimizer step, and of two."""
    coefficient = 0.3
    presets = [preset for preset in PRESETS if preset.stem in ("rloo", "dgpo")]
    rewards = torch.tensor([made.reward for made in made_up_responses()]) - coefficient * response_kl
    groups = rewards.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    deviation = groups.std(1, keepdim=True, correction=0)
    expected = {"rloo": centred * GROUP / (GROUP - 1), "dgpo": centred / (deviation + 1e-6)}
    overrides = ["algorithm.kl=reward", f"algorithm.kl_coefficient={coefficient}", f"parallel.{layout}=2"]
    for minibatches in (1, 2):
        folder = tmp_path / str(minibatches)
        found = recorded(config, folder, 2, *overrides, f"batch.minibatches={minibatches}", presets=presets)
        for name, responses in found.items():
            advantages = torch.tensor([responses[key].advantage for key in sorted(responses)])
            torch.testing.assert_close(advantages, expected[name].flatten().float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_kl_of_coefficient_0_changes_no_bit(config, minibatches):
    presets = [preset for preset in PRESETS if preset.stem in ("rloo", "dgpo")]
    several = f"batch.minibatches={minibatches}"
    plain, taken = (
        run_ranks(updates, 1, config, presets, several, f"algorithm.kl={kl}", "algorithm.kl_coefficient=0")[0]
        for kl in ("none", "reward")
    )
    for name, (metrics, weights) in plain.items():
        assert torch.equal(weights, taken[name][1]) and metrics["policy/loss"] == taken[name][0]["policy/loss"]
        assert "policy/response_kl" not in metrics and taken[name][0]["policy/response_kl"] != 0


def test_the_number_of_replicas_changes_no_bit_of_what_kl_leaves(config, tmp_path):
    presets = [preset for preset in PRESETS if preset.stem in ("rloo", "dgpo")]
    overrides = ["algorithm.kl=reward", "algorithm.kl_coefficient=0.3"]
    alone, shared = (recorded(config, tmp_path / str(n), n, *overrides, presets=presets) for n in (1, 2))
    for name, found in alone.items():
        assert {k: r.advantage for k, r in found.items()} == {k: r.advantage for k, r in shared[name].items()}


def of_equal_rewards(*arguments):
    """`updates` of responses whose rewards are all 1."""
    made = [replace(r, reward=1.0, components={"right": 1.0, "brief": 0.0}) for r in made_up_responses()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(updates.__globals__, "made_up_responses", lambda: made)
        return updates(*arguments)


def test_groups_that_only_kl_tells_apart_count(config):
    presets = [preset for preset in PRESETS if preset.stem == "rloo"]
    [found] = run_ranks(of_equal_rewards, 1, config, presets, "algorithm.group_weight=difficulty")
    assert found["rloo"][0]["policy/counted_share"] == 1 and found["rloo"][0]["policy/grad_norm"] > 0


def test_a_teacher_extrapolated_by_1_is_the_teacher(config):
    """Bit for bit; by more it is not, wherever the frozen models' weights rest."""

    def weights(name, *overrides):
        # One by one: of several in a session the later ones begin with the earlier ones' moments.
        presets = [preset for preset in PRESETS if preset.stem == name]
        return run_ranks(updates, 1, config, presets, *overrides)[0][name][1]

    taught, beyond = weights("distillation"), weights("exopd")
    assert torch.equal(weights("exopd", "algorithm.teacher_extrapolation=1"), taught)
    assert torch.equal(weights("exopd", "model.reference_offload=true"), beyond)
    assert not torch.equal(beyond, taught)


def test_weights_follow_from_what_is_recorded(recorded_alone):
    """To the last bits, and so offline as in the trainer."""
    from megatron_dgpo.algorithm.credit import credit_weights, gated_scores, temperatures_of_share

    for name, settings in (("dgpo", {}), ("dgpo_calibrated", {"share": 0.8})):
        for (_, response), made in zip(
            sorted(recorded_alone[name].items(), key=lambda item: item[0]), made_up_responses(), strict=True
        ):
            tokens = {column: torch.from_numpy(values) for column, values in response.tokens.items()}
            bounds = torch.tensor([0, len(made.token_ids)])
            scores = gated_scores(
                tokens["deviation"], tokens["entropy"], bounds, kappa=1, vocab_size=VOCAB, entropy_norm="log_vocab"
            )
            tau = temperatures_of_share(scores, bounds, settings["share"], 1e-4) if settings else 0.5
            weights = credit_weights(scores, bounds, tau)
            torch.testing.assert_close(weights, tokens["credit"], rtol=0, atol=1e-6)
            assert tokens["credit"].sum() == pytest.approx(len(made.token_ids), abs=1e-3)
            assert (response.tau is None) == (not settings)


def test_a_record_that_is_not_there_or_not_whole_is_one_sentence(recorded_alone, tmp_path):
    from megatron_dgpo.algorithm.record import file_of_credit, read_credit
    from megatron_dgpo.errors import UsageError

    with pytest.raises(UsageError, match="no credit of step 3 was recorded; train with rollout.record=true"):
        read_credit(tmp_path, 3)
    file_of_credit(tmp_path, 3, 0).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UsageError, match="is not a whole record"):
        read_credit(tmp_path, 3)


def test_overlong_responses_are_compared_with_and_not_trained_on():
    from megatron_dgpo.update import compared, training_sequences

    responses = made_up_responses()
    cut_off = [response.finish_reason == "length" for response in responses]
    assert 0 < sum(cut_off) < len(responses)
    rollout = {"group_size": GROUP, "max_response_tokens": LIMIT}
    found = {}
    for how in ("none", "filter", "punish"):
        config = make_config("none", rollout=rollout, reward={"overlong": how})
        groups = [training_sequences(config, i, responses[i * GROUP : (i + 1) * GROUP], 1) for i in range(4)]
        found[how] = compared([pair for group in groups for pair in group], config)
    assert [not sequence.counted for sequence in found["filter"]] == cut_off
    assert all(sequence.counted for how in ("none", "punish") for sequence in found[how])
    advantages = {how: [sequence.advantage for sequence in found[how]] for how in found}
    assert advantages["filter"] == advantages["none"] != advantages["punish"]
