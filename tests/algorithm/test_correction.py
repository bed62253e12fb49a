"""Correction for the sampler: its weights, where they enter, and what `auto` stands for."""

import math

import pytest
import torch

from megatron_dgpo.algorithm.correction import sampler_ratio, sampler_weights
from megatron_dgpo.algorithm.objective import Signal, policy_objective
from megatron_dgpo.algorithm.resolve import resolved_algorithm, uncorrected
from megatron_dgpo.config import Algorithm
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.statistics import TokenStatistics
from tests.layouts import make_config


def objective(logprobs, sampled, advantages, entropy=None, old=None, **algorithm):
    """(loss sum, normaliser, metrics) of one-token responses."""
    rows = zip(advantages, sampled.tolist(), strict=True)
    batch = MicroBatch.pack([TrainingSequence.of([1], [2], advantage, [sample]) for advantage, sample in rows])
    entropy = torch.zeros_like(logprobs) if entropy is None else entropy
    old = logprobs.detach() if old is None else old
    signal = Signal(TokenStatistics(logprobs, entropy, None, None), old, torch.ones_like(sampled))
    return policy_objective(signal, batch, Algorithm(**algorithm))


def test_worked_by_hand():
    ratio = torch.tensor([0.4, 3.0, 6.0])
    weights, limited = sampler_weights(ratio, "truncate", 0.5, 2.0)
    assert weights.tolist() == pytest.approx([0.4, 2, 2]) and limited.tolist() == [False, True, True]
    weights, limited = sampler_weights(ratio, "mask", 0.5, 5.0)
    assert weights.tolist() == [0, 3, 0] and limited.tolist() == [True, False, True]


def test_ratios_are_bounded_and_carry_no_gradient():
    logprobs = torch.tensor([-1.0, -300.0, 0.0], requires_grad=True)
    ratio = sampler_ratio(logprobs, torch.tensor([-2.0, -1.0, -500.0]))
    assert not ratio.requires_grad
    assert ratio.tolist() == pytest.approx([math.e, math.exp(-20), math.exp(20)], rel=1e-5)


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_a_sampler_that_is_the_policy_changes_no_bit(how):
    logprobs = -3 * torch.rand(20, generator=torch.Generator().manual_seed(1))
    advantages = torch.linspace(-1, 1, 20).tolist()
    plain = objective(logprobs, logprobs, advantages, correction="none")
    corrected = objective(logprobs, logprobs, advantages, correction=how)
    assert torch.equal(plain[0], corrected[0])
    assert plain[2] == corrected[2] and corrected[2]["corrected"] == 0


def test_only_the_policy_s_term_is_weighted():
    """Not the entropy bonus, and not the normaliser."""
    logprobs, sampled = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -1.0])
    entropy = torch.tensor([0.5, 0.25])
    settings = dict(correction="truncate", correction_high=2.0, entropy_bonus=0.1)
    loss, normaliser, metrics = objective(logprobs, sampled, [1.0, 1.0], entropy, **settings)
    assert loss.item() == pytest.approx(-2 - 1 - 0.1 * 0.75) and normaliser == 2
    q = math.exp(2)
    assert metrics["rollout_ratio"].item() == pytest.approx(q + 1) and metrics["corrected"] == 1
    assert metrics["rollout_ratio_squared"].item() == pytest.approx(q * q + 1, rel=1e-5)


def test_the_gradient_s_expectation_is_that_of_the_policy_s_own_samples():
    """A bandit, by enumeration: every action once, its advantage times the sampler's probability of it."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(8, generator=generator, dtype=torch.float64).float().requires_grad_()
    sampler = torch.log_softmax(logits.detach() + 0.5 * torch.randn(8, generator=generator), 0)
    rewards = torch.rand(8, generator=generator)

    def gradient(samplers_logprobs, correction):
        logprobs = torch.log_softmax(logits, 0)
        expected = (rewards * samplers_logprobs.exp()).tolist()
        loss = objective(logprobs, samplers_logprobs, expected, correction=correction, correction_high=1e6)[0]
        return torch.autograd.grad(loss, logits)[0]

    on_policy = gradient(torch.log_softmax(logits, 0).detach(), "none")
    torch.testing.assert_close(gradient(sampler, "truncate"), on_policy, rtol=1e-4, atol=1e-6)
    assert (gradient(sampler, "none") - on_policy).norm() > 0.1 * on_policy.norm()


def test_the_gap_to_the_sampler_is_the_trainer_s_own():
    """With the ratio anchored at the sampler, too, where that of the old log-probs would be 0 by construction."""
    logprobs, sampled = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
    for settings, old in (({"old_logprobs": "sampled"}, sampled), ({"old_logprobs": "recomputed"}, logprobs)):
        metrics = objective(logprobs, sampled, [1.0, 1.0], old=old, **settings)[2]
        assert metrics["logprob_gap"].item() == pytest.approx(0.5)
        assert metrics["rollout_ratio"].item() == pytest.approx(1 + math.exp(0.5))


@pytest.mark.parametrize(
    "staleness, minibatches, given, expected",
    [
        (0, 1, {}, ("recomputed", "none")),
        (0, 4, {}, ("recomputed", "none")),
        # The ratio would be 1 on data of older weights: nothing clipped, nothing corrected.
        (1, 1, {}, ("sampled", "none")),
        (1, 4, {}, ("recomputed", "truncate")),
        (1, 1, {"old_logprobs": "recomputed"}, ("recomputed", "truncate")),
        (2, 4, {"old_logprobs": "sampled"}, ("sampled", "none")),
        (2, 4, {"correction": "none"}, ("recomputed", "none")),
        (0, 1, {"correction": "mask"}, ("recomputed", "mask")),
    ],
)
def test_auto(staleness, minibatches, given, expected):
    sections = dict(rollout={"max_staleness": staleness}, batch={"minibatches": minibatches}, algorithm=given)
    algorithm = resolved_algorithm(make_config("none", **sections))
    assert (algorithm.old_logprobs, algorithm.correction) == expected
    said = uncorrected(make_config("none", **sections))
    assert (said is not None) == (staleness > 0 and expected == ("recomputed", "none"))
