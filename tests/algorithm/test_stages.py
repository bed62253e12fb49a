"""The stages beside DGPO's own: numbers worked by hand, exact limits, and properties over random responses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dgpo.algorithm.advantages import group_advantages, over_step
from megatron_dgpo.algorithm.credit import (
    credit_concentration,
    credit_weights,
    future_kl_weights,
    segment_ids,
    temperatures_of_share,
)
from megatron_dgpo.algorithm.objective import Signal, policy_objective
from megatron_dgpo.algorithm.policy_loss import LOSSES, aggregate, at_sequence_level, divergence
from megatron_dgpo.algorithm.resolve import without_effect
from megatron_dgpo.algorithm.shaping import shape_rewards
from megatron_dgpo.config import Algorithm
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.statistics import TokenStatistics
from tests.layouts import make_config

TAU_MIN = 1e-4


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


# Advantages and shaping


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("mean_std", [1.7321, -0.5774, -0.5774, -0.5774]),
        ("mean", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1, -1 / 3, -1 / 3, -1 / 3]),
        ("mean_mad", [2, -2 / 3, -2 / 3, -2 / 3]),
        ("best_of_group", [2.3094, 0, 0, 0]),
        # Σ T r / Σ T = 1 / 10.
        ("length_baseline", [0.9, -0.1, -0.1, -0.1]),
    ],
)
def test_advantages_worked_by_hand(kind, expected):
    rewards, lengths = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1, 2, 3, 4])
    assert group_advantages(rewards, 4, kind, 1e-6, lengths).tolist() == pytest.approx(expected, abs=1e-4)
    equal = torch.tensor([0.11] * 3 + [1.69] * 12)
    assert not group_advantages(equal, 3, kind, 1e-6, torch.arange(15)).any()


def test_two_responses_have_their_sign_for_an_advantage():
    assert group_advantages(torch.tensor([0.2, 0.7]), 2, "mean_std", 1e-9).tolist() == pytest.approx([-1, 1])


def test_a_step_s_deviation():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0])
    centred = group_advantages(rewards, 4, "batch_std", 1e-6)
    whole = over_step(centred, 1e-6)
    deviation = (rewards.view(2, 4) - rewards.view(2, 4).mean(1, keepdim=True)).square().mean().sqrt()
    torch.testing.assert_close(whole, centred / deviation)
    assert not over_step(torch.zeros(8), 1e-6).any()


def test_overlong_responses():
    lengths = torch.tensor([16384, 18432, 20480])
    cut_off, rewards = lengths == 20480, torch.ones(3, dtype=torch.float64)
    shaped, counted = shape_rewards(rewards, lengths, cut_off, "punish", 20480, 4096)
    assert (shaped - 1).tolist() == [0, -0.5, -1] and counted.all()
    # A fifth of the limit is DAPO's buffer.
    assert torch.equal(shape_rewards(rewards, lengths, cut_off, "punish", 20480)[0], shaped)
    shaped, counted = shape_rewards(rewards, lengths, cut_off, "filter", 20480)
    assert torch.equal(shaped, rewards) and counted.tolist() == [True, True, False]
    shaped, counted = shape_rewards(rewards, lengths, cut_off, "none", 20480)
    assert torch.equal(shaped, rewards) and counted.all()


# Policy losses


def gradient(name, log_ratio, advantages, **chosen):
    """(loss, ∂loss/∂log π) of tokens, [N] each."""
    log_ratio = torch.as_tensor(log_ratio, dtype=torch.float64)
    logprobs = (log_ratio - 3).requires_grad_()
    loss = LOSSES[name](logprobs, logprobs + 3, torch.as_tensor(advantages).double(), Algorithm(**chosen)).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), logprobs)[0]


@pytest.mark.parametrize(
    "name, ratio, advantage, chosen, expected",
    [
        ("decoupled_gradient", 0.5, -1.0, {}, 0.3125),
        ("decoupled_gradient", 1.6, 1.0, {}, -1.3856),
        ("ppo_clip", 0.5, -1.0, {}, 0.0),
        ("ppo_clip", 1.6, 1.0, {}, 0.0),
        ("clipped_weight", 1.6, 1.0, {"clip_low": 1.0, "clip_high": 0.28}, -1.28),
        ("ppo_clip", 4.0, -1.0, {}, 4.0),
        ("ppo_clip", 4.0, -1.0, {"dual_clip": 3.0}, 0.0),
        ("ppo_clip", 2.9, -1.0, {"dual_clip": 3.0}, 2.9),
    ],
)
def test_gradients_worked_by_hand(name, ratio, advantage, chosen, expected):
    found = gradient(name, [math.log(ratio)], [advantage], **chosen)[1]
    assert found.item() == pytest.approx(expected, abs=1e-4)


def test_a_dual_clip_bounds_the_loss():
    loss, _ = gradient("ppo_clip", [math.log(4)], [-1.0], dual_clip=3.0)
    assert loss.item() == pytest.approx(3)


@pytest.mark.parametrize("name, jump", [("ppo_clip", True), ("decoupled_gradient", False)])
@pytest.mark.parametrize("bound, advantage", [(0.8, -1.0), (1.2, 1.0)])
def test_continuity_of_the_gradient_at_the_bounds(name, jump, bound, advantage):
    below, above = gradient(name, [math.log(bound) - 1e-6, math.log(bound) + 1e-6], [advantage] * 2)[1].tolist()
    assert (abs(below - above) > 0.7) if jump else abs(below - above) < 1e-5


def test_inside_the_range_both_losses_of_ratios_are_one():
    log_ratio = torch.linspace(math.log(0.81), math.log(1.19), 31)
    for advantage in (-1.5, 2.0):
        plain, decoupled = (gradient(n, log_ratio, [advantage] * 31) for n in ("ppo_clip", "decoupled_gradient"))
        torch.testing.assert_close(plain, decoupled)


def test_without_an_upper_bound_they_weigh_importance():
    log_ratio = torch.linspace(-1, 3, 9)
    expected = -log_ratio.double().exp() * 2
    for name in ("clipped_weight", "decoupled_gradient"):
        found = gradient(name, log_ratio, [2.0] * 9, clip_low=1.0, clip_high=1e9)[1]
        torch.testing.assert_close(found, expected)


def test_a_ratio_of_the_whole_response():
    """Both tokens have e^0.05, and each the gradient of its own log-prob."""
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    log_ratio = at_sequence_level(logprobs, torch.tensor([0.05, 0.05], dtype=torch.float64))
    loss = LOSSES["sequence_clip"](logprobs, log_ratio, torch.tensor([1.0, 2.0]), Algorithm()).loss
    assert loss.tolist() == pytest.approx([-math.exp(0.05), -2 * math.exp(0.05)])
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.05), -2 * math.exp(0.05)])


def test_divergence():
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5], dtype=torch.float64)
    assert divergence(logprobs, reference, "k2").item() == pytest.approx(0.125)
    assert divergence(logprobs, reference, "k3").item() == pytest.approx(0.1065, abs=1e-4)


def test_gradients_of_the_divergences_in_expectation():
    """By enumeration over the vocabulary: k2's is KL(π ‖ ρ)'s, k3's KL(ρ ‖ π)'s."""
    generator = torch.Generator().manual_seed(3)
    logits, other = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    rho = torch.log_softmax(other, 0)

    def grad(value):
        return torch.autograd.grad(value, logits)[0]

    def log_pi():
        return torch.log_softmax(logits, 0)

    kl = {"k2": (log_pi().exp() * (log_pi() - rho)).sum(), "k3": (rho.exp() * (rho - log_pi())).sum()}
    for name, value in kl.items():
        expectation = (log_pi().exp().detach() * divergence(log_pi(), rho, name)).sum()
        torch.testing.assert_close(grad(expectation), grad(value))


# The whole objective


def objective(lengths=(3, 1, 4), credit=None, seed=5, advantages=None, counted=None, **chosen):
    """(loss / normaliser, gradient of the log-probs) of random responses with a reference."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    logprobs, old, rho = (-3 * torch.rand(count, generator=generator) for _ in range(3))
    rows = [
        TrainingSequence.of([1], [2] * n, (advantages or [1.0, -0.5, 0.25])[i], counted=(counted or [True] * 3)[i])
        for i, n in enumerate(lengths)
    ]
    batch, logprobs = MicroBatch.pack(rows), logprobs.requires_grad_()
    mean = None
    if chosen.get("policy_loss") == "sequence_clip":
        ratio = (logprobs - old).detach()
        mean = torch.stack([part.mean() for part in ratio.split(lengths)])
    statistics = TokenStatistics(logprobs, torch.ones(count), torch.zeros(count), rho)
    signal = Signal(statistics, old, torch.ones(count) if credit is None else credit, None, mean)
    loss, normaliser, _ = policy_objective(signal, batch, Algorithm(**chosen), 8)
    return loss.detach() / normaliser, torch.autograd.grad(loss / normaliser, logprobs)[0]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_limits_of_the_objective_hold_exactly():
    assert same(objective(kl="k3", kl_coefficient=0.0), objective())
    for how in ("sequence_clip", "ppo_clip"):
        one = dict(lengths=(1, 1, 1), policy_loss=how)
        assert same(objective(**one, aggregation="sequence_mean"), objective(**one, aggregation="token_mean"))
    alone = objective((1, 1, 1), policy_loss="sequence_clip"), objective((1, 1, 1))
    torch.testing.assert_close(*alone, rtol=1e-6, atol=1e-7)
    assert not same(objective(kl="k2", kl_coefficient=0.1), objective())


def test_a_teacher_alone_gives_each_token_its_own_advantage():
    generator = torch.Generator().manual_seed(5)
    logprobs, old, rho = (-3 * torch.rand(8, generator=generator) for _ in range(3))
    _, found = objective(credit=torch.zeros(8), teacher=0.5, clip_high=1e6, clip_low=1.0)
    torch.testing.assert_close(found, -0.5 * (rho - old) * (logprobs - old).exp() / 8)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "fixed_length"])
def test_what_does_not_count_might_as_well_not_be_there(how):
    loss, found = objective(counted=[True, True, False], aggregation=how)
    generator = torch.Generator().manual_seed(5)
    logprobs, old, _ = (-3 * torch.rand(8, generator=generator) for _ in range(3))
    assert not found[4:].any() and found[:4].any()
    rows = [TrainingSequence.of([1], [2] * n, a) for n, a in ((3, 1.0), (1, -0.5))]
    statistics = TokenStatistics(logprobs[:4], torch.ones(4), None, None)
    signal = Signal(statistics, old[:4], torch.ones(4))
    total, normaliser, _ = policy_objective(signal, MicroBatch.pack(rows), Algorithm(aggregation=how), 8)
    assert loss.item() == pytest.approx((total / normaliser).item(), rel=1e-6)


# FIPO


FUTURE = dict(half_life=32.0, low=0.8, high=1.2, dual_clip=None, safety=4.0)


def test_future_kl_worked_by_hand():
    ratios = torch.tensor([0.1, -0.2, 0.3])
    found = future_kl_weights(ratios, torch.ones(3), ends([3]), **FUTURE | {"half_life": 1.0, "low": 1.0})
    assert found.tolist() == pytest.approx([1.0779, 1, 1.2], abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 10**6), st.sampled_from([0.5, 3.0, 500.0]))
def test_future_kl_is_its_sum(lengths, seed, half_life):
    """Also of empty responses, and never over a response's end."""
    cu = ends(lengths)
    ratios = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    advantages = torch.tensor([(-1.0) ** i for i in range(len(lengths))])[segment_ids(cu)]
    chosen = FUTURE | {"half_life": half_life, "low": 1e-9, "high": 1e9, "dual_clip": 2.0, "safety": 1.5}
    found = future_kl_weights(ratios, advantages, cu, **chosen)
    x = [value if value <= math.log(2) else 0.0 for value in ratios.tolist()]
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        for t in range(start, stop):
            f = math.exp(sum(2 ** (-(k - t) / half_life) * x[k] for k in range(t, stop)))
            unsafe = advantages[t] < 0 and ratios[t] > math.log(1.5)
            assert found[t].item() == pytest.approx(max(0.8, min(1.0, f)) if unsafe else f, rel=1e-5)


def test_future_kl_s_limits():
    ratios = torch.randn(12, generator=torch.Generator().manual_seed(1)) / 10
    once = ratios.double().exp().clamp(0.8, 1.2).float()
    now = future_kl_weights(ratios, torch.ones(12), ends([7, 5]), **FUTURE | {"half_life": 1e-3})
    alone = future_kl_weights(ratios, torch.ones(12), ends([1] * 12), **FUTURE)
    assert torch.equal(now, once) and torch.equal(alone, once)
    assert torch.equal(future_kl_weights(torch.zeros(12), torch.ones(12), ends([12]), **FUTURE), torch.ones(12))


# DGPO at a given effective share


def weights_of(scores, cu, share, tau_min=TAU_MIN):
    tau = temperatures_of_share(scores, cu, share, tau_min)
    return credit_weights(scores, cu, tau), tau


def test_weights_worked_by_hand():
    scores, cu = torch.tensor([0, 0, 0.1, 0.3]), ends([4])
    for tau, expected, share in (
        (0.5, [0.7931, 0.7931, 0.9687, 1.4451], 0.93355),
        (0.1, [0.1613, 0.1613, 0.4384, 3.2391], 0.37258),
    ):
        weights = credit_weights(scores, cu, tau)
        assert weights.tolist() == pytest.approx(expected, abs=1e-4)
        assert credit_concentration(weights, cu)["effective_share"].item() == pytest.approx(share, abs=1e-5)
        assert weights_of(scores, cu, share)[1].item() == pytest.approx(tau, rel=1e-4)


@st.composite
def responses(draw):
    """Scores as of a language model: most of them tiny, a few large; some equal; lengths from 0."""
    lengths = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.rand(sum(lengths), generator=generator) ** draw(st.sampled_from([1, 4, 20]))
    kind = draw(st.sampled_from(["any", "equal", "two values"]))
    scores = scores.round() if kind == "two values" else scores * 0 + 0.3 if kind == "equal" else scores
    return scores, ends(lengths)


@settings(max_examples=150, deadline=None)
@given(responses(), st.sampled_from([0.05, 0.5, 0.8, 0.99, 1.0]))
def test_the_invariants_of_a_given_share(made, share):
    scores, cu = made
    weights, tau = weights_of(scores, cu, share)
    lengths = cu.diff()
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    sums = torch.zeros(len(lengths)).index_add(0, segment_ids(cu), weights)
    torch.testing.assert_close(sums, lengths.float(), rtol=1e-5, atol=1e-5)
    found = credit_concentration(weights, cu)
    bound = tau <= TAU_MIN * (1 + 1e-6)
    for i, (start, stop) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        if stop == start:
            continue
        mine, its = weights[start:stop], scores[start:stop]
        assert found["effective_share"][i] >= share - 2e-6
        if not bound[i]:
            assert found["effective_share"][i].item() == pytest.approx(share, abs=2e-6)
        assert mine.max() <= math.sqrt((stop - start) / share) * (1 + 1e-5)
        order = its.argsort()
        assert (mine[order].diff() >= 0).all()
        if (its == its[0]).all():
            assert torch.equal(mine, torch.ones(stop - start))
        # Alone as among the others.
        assert torch.equal(weights_of(its, ends([stop - start]), share)[0], mine)
    if share == 1:
        assert torch.equal(weights, torch.ones(len(weights)))


@settings(max_examples=50, deadline=None)
@given(responses(), st.floats(0.1, 50), st.floats(-3, 3))
def test_a_given_share_knows_no_scale(made, factor, offset):
    """Unless tau_min binds: the entropies' divisor has no effect."""
    scores, cu = made[0].double(), made[1]
    weights, tau = weights_of(scores, cu, 0.7)
    others, tau_of_others = weights_of(scores * factor + offset, cu, 0.7)
    free = ((tau > 2 * TAU_MIN) & (tau_of_others > 2 * TAU_MIN))[segment_ids(cu)]
    torch.testing.assert_close(weights[free], others[free], rtol=2e-3, atol=2e-4)


def test_noise_of_float32_does_not_become_credit():
    generator = torch.Generator().manual_seed(4)
    noise = 1e-7 * torch.rand(1000, generator=generator)
    weights, tau = weights_of(noise, ends([1000]), 0.5)
    assert tau.item() == pytest.approx(TAU_MIN) and (weights - 1).abs().max() < 2e-3


# What changes nothing


def test_settings_without_effect_are_named():
    assert without_effect(make_config("none")) == []
    [text] = without_effect(make_config("none", algorithm={"policy_loss": "clipped_weight"}))
    assert "algorithm.policy_loss=clipped_weight has no effect with batch.minibatches=1" in text
    several = dict(batch={"minibatches": 2})
    assert without_effect(make_config("none", algorithm={"policy_loss": "clipped_weight"}, **several)) == []
    sampled = {"policy_loss": "clipped_weight", "old_logprobs": "sampled"}
    assert without_effect(make_config("none", algorithm=sampled)) == []
    [text] = without_effect(make_config("none", algorithm=sampled | {"correction": "mask"}))
    assert "algorithm.correction=mask" in text
    [text] = without_effect(make_config("none", algorithm={"credit": "future_kl", "scored_by": "old"}, **several))
    assert "algorithm.credit=future_kl" in text


@pytest.mark.parametrize("name", LOSSES)
def test_with_one_minibatch_all_losses_have_one_gradient(name):
    advantages = torch.linspace(-1, 1, 9).double()
    _, found = gradient(name, torch.zeros(9), advantages)
    torch.testing.assert_close(found, -advantages)


def test_a_response_that_ranks_share_is_counted_by_one():
    values, cu = torch.rand(9, generator=torch.Generator().manual_seed(2)), ends([4, 0, 5])
    for how, tokens in (("token_mean", 9), ("sequence_mean", 0), ("fixed_length", 0)):
        arguments = values, segment_ids(cu), cu.diff(), torch.ones(3, dtype=torch.bool), how, 16
        assert aggregate(*arguments)[1] == (tokens or 3)
        assert aggregate(*arguments, counts_responses=False)[1] == tokens
