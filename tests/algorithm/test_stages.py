"""The stages beside DGPO's own: numbers worked by hand, exact limits, and properties over random responses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dgpo.algorithm.advantages import (
    decoupled_advantages,
    difficulty_weights,
    group_advantages,
    over_step,
)
from megatron_dgpo.algorithm.credit import (
    credit_concentration,
    credit_weights,
    future_kl_weights,
    segment_ids,
    temperatures_of_share,
)
from megatron_dgpo.algorithm.objective import Signal, policy_objective
from megatron_dgpo.algorithm.outcome import Outcome, step_advantages
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
    centred, every = group_advantages(rewards, 4, "batch_std", 1e-6), torch.ones(8, dtype=torch.bool)
    whole = over_step(centred, every, 1e-6)
    deviation = (rewards.view(2, 4) - rewards.view(2, 4).mean(1, keepdim=True)).square().mean().sqrt()
    torch.testing.assert_close(whole, centred / deviation)
    assert not over_step(torch.zeros(8), every, 1e-6).any()
    # What is left out is in neither mean nor deviation: of 1, 2 and 3 they are 2 and √(2/3).
    some = over_step(torch.tensor([1.0, 9, 2, 3]), torch.tensor([True, False, True, True]), 0.0)
    assert some.tolist() == pytest.approx([-1.2247, 0, 0, 1.2247], abs=1e-4)
    assert not over_step(torch.ones(4), ~every[:4], 1e-6).any()


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


# Several rewards, and weights of groups


def test_decoupled_rewards_worked_by_hand():
    rewards, ones = torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 1]]), torch.ones(2, dtype=torch.float64)
    total, kept = decoupled_advantages(rewards, ones, 4, 1e-6, 0.0)
    assert total.tolist() == pytest.approx([0, 2, -2, 0], abs=1e-4) and kept.all()
    assert over_step(total, kept, 1e-6).tolist() == pytest.approx([0, 1.4142, -1.4142, 0], abs=1e-4)
    # The first and the fourth are pulled both ways; the others weigh the half of the group that is left.
    total, kept = decoupled_advantages(rewards, ones, 4, 1e-6, 0.2)
    assert kept.tolist() == [False, True, True, False]
    assert total.tolist() == pytest.approx([0, 1, -1, 0], abs=1e-4)
    assert over_step(total, kept, 1e-6).tolist() == pytest.approx([0, 1, -1, 0], abs=1e-4)
    # Terms 1 and -0.7: 0.3 is below 0.2 · 1.7 = 0.34, and not below 0.1 · 1.7.
    weights = torch.tensor([1, 0.7], dtype=torch.float64)
    assert decoupled_advantages(rewards, weights, 4, 1e-6, 0.2)[1].tolist() == [False, True, True, False]
    assert decoupled_advantages(rewards, weights, 4, 1e-6, 0.1)[1].all()
    # A reward without a weight pulls nowhere.
    weights = torch.tensor([1, 0], dtype=torch.float64)
    assert decoupled_advantages(rewards, weights, 4, 1e-6, 1.0)[1].all()


def test_difficulty_worked_by_hand():
    every = torch.ones(3, dtype=torch.bool)
    weights = difficulty_weights(torch.tensor([0.25, 0.5, 0.75]), every, 2.0)
    assert weights.tolist() == pytest.approx([1.1273, 0.9948, 0.8779], abs=1e-4)
    # Groups that do not differ are in no sum, and one that does without a right response counts as all right.
    right, differing = torch.tensor([0.25, 1.0, 0.0, 0.75, 0.0]), torch.tensor([True, False, True, True, False])
    expected = difficulty_weights(torch.tensor([0.25, 1.0, 0.75]), every, 2.0).tolist()
    found = difficulty_weights(right, differing, 2.0).tolist()
    assert found == pytest.approx([expected[0], 0, expected[1], expected[2], 0])
    assert difficulty_weights(right, differing & False, 2.0).tolist() == [0] * 5
    # The hardest takes all, and all are alike.
    assert difficulty_weights(torch.tensor([0.25, 0.5, 0.75]), every, 1e-4).tolist() == [3, 0, 0]
    assert difficulty_weights(torch.tensor([0.25, 0.5, 0.75]), every, 1e9).tolist() == pytest.approx([1, 1, 1])


def compared(rewards, weights=None, correct=None, size=4, overlong="none", **algorithm):
    """(advantages, counted) of a step's responses. rewards: [B, K], or [B] without weights."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    several = {f"r{k}": weight for k, weight in enumerate(weights or [])}
    totals = (rewards @ torch.tensor(weights, dtype=torch.float64) if weights else rewards).tolist()
    rows = rewards.tolist() if weights else [()] * len(rewards)
    correct = correct or [total >= 1 for total in totals]
    lengths = [1 + i % 7 for i in range(len(totals))]
    made = [Outcome(t, tuple(r), c, n, n == 7) for t, r, c, n in zip(totals, rows, correct, lengths, strict=True)]
    config = make_config(
        "none",
        algorithm=algorithm,
        reward={"grader": "module:function", "weights": several, "overlong": overlong},
        rollout={"group_size": size, "max_response_tokens": 7},
    )
    return step_advantages(made, config)


def test_groups_that_are_equal_have_no_loss_beside_difficulty():
    rewards = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0.5, 0, 0, 0]
    advantages, counted = compared(rewards, advantage="mean_mad", group_weight="difficulty")
    assert counted.tolist() == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4
    plain, _ = compared(rewards, advantage="mean_mad")
    [harder, easier] = torch.softmax(torch.tensor([-0.25, -1.0]) / 2, 0).tolist()
    assert advantages.tolist() == pytest.approx(
        [*[0] * 4, *(plain[4:8] * 2 * harder).tolist(), *[0] * 4, *(plain[12:] * 2 * easier).tolist()], abs=1e-6
    )
    # Decoupled, they differ where one of their rewards does, though the sum is the same.
    rewards = [[1, 0], [0, 1], [1, 0], [0, 1], [1, 1], [1, 1], [1, 1], [1, 1]]
    for kind, expected in (("decoupled", [True] * 4 + [False] * 4), ("mean_std", [False] * 8)):
        found = compared(rewards, [1.0, 1.0], advantage=kind, group_weight="difficulty")
        assert found[1].tolist() == expected
    # Not where the one that does has no weight.
    watched = [[1, 0], [1, 1], [1, 0], [1, 1], [1, 0], [0, 0], [0, 0], [0, 0]]
    found = compared(watched, [1.0, 0.0], advantage="decoupled", group_weight="difficulty")
    assert found[1].tolist() == [False] * 4 + [True] * 4


def test_what_was_cut_off_is_compared_with_and_not_counted():
    rewards = [[1, 0.1], [0, 0.7], [1, 0.3], [0, 0.2], [0, 0.9], [1, 0.6], [0, 0.8], [1, 0.5]]
    plain, every = compared(rewards, [1.0, 0.5], advantage="decoupled")
    filtered, counted = compared(rewards, [1.0, 0.5], advantage="decoupled", overlong="filter")
    assert torch.equal(filtered, plain) and every.all()
    assert counted.tolist() == [True] * 6 + [False, True]
    _, kept = compared(rewards, [1.0, 0.5], advantage="decoupled", conflict=0.9)
    _, both = compared(rewards, [1.0, 0.5], advantage="decoupled", conflict=0.9, overlong="filter")
    assert not kept.all() and both.tolist() == (kept & counted).tolist()


def test_kl_of_a_response_is_taken_off_its_reward():
    """1 - 0.1 * 2 and 0 - 0.1 * -1: apart by 0.7, where the rewards alone are apart by 1."""
    made = [Outcome(1.0, (), True, 3, False, kl=2.0), Outcome(0.0, (), False, 3, False, kl=-1.0)]
    for kl, apart in (("reward", 0.7), ("k2", 1.0)):
        algorithm = {"advantage": "rloo", "kl": kl, "kl_coefficient": 0.1}
        advantages, _ = step_advantages(made, make_config("none", algorithm=algorithm, rollout={"group_size": 2}))
        assert advantages.tolist() == pytest.approx([apart, -apart])


KINDS = ["mean_std", "mean", "rloo", "mean_mad", "batch_std", "best_of_group", "length_baseline"]


@st.composite
def rewards_of_groups(draw):
    """[B, K] of groups of four, in some of which all are equal in one reward or all."""
    groups, several = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = torch.rand(groups, 4, several, generator=generator, dtype=torch.float64)
    values = values.round() if draw(st.booleans()) else values
    equal = torch.rand(groups, 1, several, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return torch.where(equal, values[:, :1] * 1.69 + 0.11, values).view(-1, several)


@settings(max_examples=100, deadline=None)
@given(rewards_of_groups(), st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from(["none", "difficulty"]))
def test_equal_rewards_and_the_order_of_groups(rewards, conflict, group_weight):
    several = rewards.shape[1]
    how = dict(weights=[1.0, 0.5, 0.25][:several], advantage="decoupled", conflict=conflict, group_weight=group_weight)
    advantages, counted = compared(rewards, **how)
    assert torch.isfinite(advantages).all()
    groups = rewards.view(-1, 4, several)
    equal = (groups == groups[:, :1]).all(2).all(1)
    if conflict == 0:
        assert not advantages.view(-1, 4)[equal].any()
    assert not compared(torch.full_like(rewards, 0.11), **how)[0].any()
    if group_weight == "difficulty":
        assert not counted.view(-1, 4)[equal].any()
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(several))
    # The lengths stay in their places: nothing here looks at them.
    moved, also = compared(groups[order].reshape(-1, several), **how)
    torch.testing.assert_close(moved.view(-1, 4), advantages.view(-1, 4)[order], rtol=1e-5, atol=1e-6)
    assert torch.equal(also.view(-1, 4), counted.view(-1, 4)[order])


@settings(max_examples=50, deadline=None)
@given(rewards_of_groups(), st.sampled_from(KINDS), st.sampled_from(["none", "filter", "punish"]))
def test_one_reward_of_weight_one_is_a_plain_reward(rewards, kind, overlong):
    """Bit for bit; and decoupled it is mean_std over a deviation that all share."""
    single = rewards[:, 0]
    plain = compared(single, advantage=kind, overlong=overlong)
    named = compared(single[:, None], [1.0], advantage=kind, overlong=overlong)
    assert torch.equal(plain[0], named[0]) and torch.equal(plain[1], named[1])
    decoupled, _ = compared(single[:, None], [1.0], advantage="decoupled")
    mean_std = compared(single, advantage="mean_std")[0]
    torch.testing.assert_close(decoupled, mean_std / (mean_std.square().mean().sqrt() + 1e-6), rtol=1e-5, atol=1e-6)


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
            f = max(1e-9, min(1e9, f))
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


@pytest.mark.parametrize(
    "algorithm, model, expected",
    [
        (dict(teacher_extrapolation=1.25), {}, "algorithm.teacher_extrapolation=1.25 has no effect"),
        (dict(teacher=1.0), {"start": "/start"}, "model.start=/start has no effect"),
        (dict(kl="reward", kl_coefficient=0.0), {}, "algorithm.kl=reward has no effect"),
        (dict(kl_coefficient=0.5), {}, "algorithm.kl_coefficient=0.5 has no effect"),
    ],
)
def test_settings_of_frozen_models_without_effect_are_named(algorithm, model, expected):
    [text] = without_effect(make_config("none", algorithm=algorithm, model=model))
    assert text.startswith(expected)


def test_settings_of_frozen_models_with_effect_are_not_named():
    taught = {"teacher": 1.0, "teacher_extrapolation": 1.25, "kl": "reward", "kl_coefficient": 0.5}
    assert without_effect(make_config("none", algorithm=taught, model={"start": "/start"})) == []


def test_settings_of_advantages_without_effect_are_named():
    decoupled = {"advantage": "decoupled", "conflict": 0.2}
    weights = {"weights": {"right": 1, "brief": 0.5}}
    assert without_effect(make_config("none", algorithm=decoupled, reward=weights)) == []
    [text] = without_effect(make_config("none", algorithm={"conflict": 0.2}, reward=weights))
    assert text == "algorithm.conflict=0.2 has no effect but with algorithm.advantage=decoupled"
    [text] = without_effect(make_config("none", algorithm=decoupled, reward={"weights": {"right": 1, "brief": 0}}))
    assert "algorithm.conflict=0.2 has no effect: one reward is in no conflict with itself" in text
    [text] = without_effect(make_config("none", algorithm={"difficulty_temperature": 3}))
    assert text == "algorithm.difficulty_temperature=3.0 has no effect with algorithm.group_weight=none"
    difficulty = {"difficulty_temperature": 3, "group_weight": "difficulty"}
    assert without_effect(make_config("none", algorithm=difficulty)) == []


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
