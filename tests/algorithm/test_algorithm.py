"""Advantages, credit and policy loss against loops over single numbers, and the method's invariants."""

import math

import pytest
import torch

from megatron_dgpo.algorithm.advantages import group_advantages
from megatron_dgpo.algorithm.credit import (
    credit_concentration,
    credit_weights,
    gated_scores,
    segment_ids,
)
from megatron_dgpo.algorithm.objective import Signal, policy_objective
from megatron_dgpo.algorithm.policy_loss import aggregate, ppo_clip
from megatron_dgpo.config import Algorithm
from megatron_dgpo.micro_batch import MicroBatch, TrainingSequence
from megatron_dgpo.statistics import TokenStatistics

LENGTHS = [5, 1, 0, 12, 200]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
N = sum(LENGTHS)


def scores(seed=0):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed))


def test_group_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    got = group_advantages(rewards, 4, "mean_std", 1e-6)
    assert got[:4].tolist() == pytest.approx([1, -1, -1, 1], rel=1e-4)
    assert got[4:].tolist() == [0, 0, 0, 0]
    assert group_advantages(rewards, 4, "mean", 1e-6)[:4].tolist() == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize("kind", ["mean_std", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_no_advantage(kind, dtype):
    """Whatever their mean is rounded to; beside them a group that differs has its own."""
    for size in (3, 7, 12, 16):
        rewards = [0.11] * size + [1.69] * size + [-1e6 / 3] * size + [1.0] + [0.0] * (size - 1)
        got = group_advantages(torch.tensor(rewards, dtype=dtype), size, kind, 1e-6)
        assert got.dtype == torch.float32
        assert got[: 3 * size].tolist() == [0.0] * 3 * size
        assert got[3 * size :].count_nonzero() == size and abs(got[3 * size :].sum().item()) < 1e-5


def test_the_sampler_s_policy_is_compared_with_the_trainer_s():
    """Sums over micro-batches are those of the whole batch; of the gaps the largest is kept as it is."""
    generator = torch.Generator().manual_seed(11)
    responses = [[5, 6, 7], [8], [9, 10, 11, 12]]
    ours = [(-3 * torch.rand(len(r), generator=generator)).tolist() for r in responses]
    theirs = [[value + 0.3 * (-1) ** i for i, value in enumerate(row)] for row in ours]
    theirs[2][1] = ours[2][1] - 2.5
    sequences = [TrainingSequence.of([1, 2], *row) for row in zip(responses, [1.0, -1.0, 0.5], theirs, strict=True)]
    found = []
    for part, rows in ((sequences[:2], ours[:2]), (sequences[2:], ours[2:])):
        logprobs = torch.tensor([value for row in rows for value in row])
        statistics = TokenStatistics(logprobs, torch.ones_like(logprobs), None, None)
        signal = Signal(statistics, logprobs, torch.ones_like(logprobs))
        found.append(policy_objective(signal, MicroBatch.pack(part), Algorithm())[2])
    gaps = [a - b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    kl = sum(math.exp(gap) - 1 - gap for gap in gaps)
    assert sum(part["rollout_kl"].item() for part in found) == pytest.approx(kl, rel=1e-5)
    assert [part["largest_logprob_gap"].item() for part in found] == pytest.approx([0.3, 2.5], rel=1e-5)


@pytest.mark.parametrize("tau", [0.01, 0.5, 10.0])
def test_weights_are_each_response_s_own_softmax(tau):
    got = credit_weights(scores(), CU, tau)
    for start, stop in zip(CU[:-1], CU[1:], strict=True):
        expected = (stop - start) * torch.softmax(scores()[start:stop].double() / tau, 0)
        torch.testing.assert_close(got[start:stop].double(), expected, rtol=1e-5, atol=1e-6)
        assert got[start:stop].sum().item() == pytest.approx((stop - start).item(), rel=1e-5)


def test_equal_scores_give_equal_weights():
    """π = ρ: all distances are 0, whatever the entropies; step 0 is GRPO."""
    zero = gated_scores(torch.zeros(N), scores(), CU, kappa=1.0, vocab_size=50, entropy_norm="log_vocab")
    assert torch.equal(credit_weights(zero, CU, 0.5), torch.ones(N))


def test_large_tau_is_grpo():
    torch.testing.assert_close(credit_weights(scores(), CU, 1e6), torch.ones(N), rtol=0, atol=1e-5)


def test_tiny_tau_gives_all_to_the_best_token():
    weights = credit_weights(scores(), CU, 1e-6)
    assert torch.isfinite(weights).all()
    last = weights[CU[-2] :]
    assert last.max().item() == pytest.approx(200) and last.argmax() == scores()[CU[-2] :].argmax()


def test_gate():
    distance, entropy = scores(1), scores(2) * 3
    plain = dict(vocab_size=50, entropy_norm="log_vocab")
    torch.testing.assert_close(
        gated_scores(distance, entropy, CU, kappa=2.0, **plain), distance * (entropy / math.log(50)) ** 2
    )
    assert torch.equal(gated_scores(distance, entropy, CU, kappa=0.0, **plain), distance)
    by_response = gated_scores(distance, entropy, CU, kappa=1.0, vocab_size=50, entropy_norm="response_max")
    for start, stop in zip(CU[:-1], CU[1:], strict=True):
        if stop > start:
            expected = distance[start:stop] * entropy[start:stop] / entropy[start:stop].max()
            torch.testing.assert_close(by_response[start:stop], expected)
    certain = gated_scores(distance, torch.zeros(N), CU, kappa=1.0, vocab_size=50, entropy_norm="response_max")
    assert torch.equal(certain, torch.zeros(N))


def test_concentration():
    uniform = credit_concentration(torch.ones(N), CU)
    filled = torch.tensor([length > 0 for length in LENGTHS])
    torch.testing.assert_close(uniform["effective_share"], filled.float())
    torch.testing.assert_close(uniform["max_weight"], filled.float())
    torch.testing.assert_close(uniform["top10_share"], torch.tensor([1 / 5, 1, 0, 2 / 12, 20 / 200]))
    torch.testing.assert_close(uniform["top1_share"], torch.tensor([1 / 5, 1, 0, 1 / 12, 2 / 200]))
    weights = credit_weights(scores(), CU, 0.05)
    got = credit_concentration(weights, CU)
    for row, (start, stop) in enumerate(zip(CU[:-1], CU[1:], strict=True)):
        part = weights[start:stop].sort(descending=True).values
        if len(part):
            assert got["effective_share"][row].item() == pytest.approx(
                (part.sum() ** 2 / (len(part) * (part**2).sum())).item(), rel=1e-4
            )
            for name, share in (("top1_share", 0.01), ("top10_share", 0.1)):
                expected = part[: math.ceil(share * len(part))].sum() / part.sum()
                assert got[name][row].item() == pytest.approx(expected.item(), rel=1e-4)


def naive_ppo(ratio, advantage, low, high):
    return -min(ratio * advantage, max(min(ratio, 1 + high), 1 - low) * advantage)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4), (0.0, 0.0)])
def test_ppo_clip(low, high):
    ratios = torch.tensor([0.3, 0.85, 1.0, 1.15, 1.3, 3.0])
    for advantage in (-1.5, 0.0, 2.0):
        logprobs = (ratios.log() - 2).requires_grad_()
        advantages = torch.full_like(ratios, advantage)
        settings = Algorithm(clip_low=low, clip_high=high)
        loss, clipped_low, clipped_high = ppo_clip(logprobs, logprobs + 2, advantages, settings)
        expected = [naive_ppo(r, advantage, low, high) for r in ratios.tolist()]
        assert loss.tolist() == pytest.approx(expected, rel=1e-5)
        loss.sum().backward()
        cut_off = clipped_low | clipped_high
        assert (logprobs.grad[cut_off] == 0).all()
        assert torch.equal(clipped_low, (ratios < 1 - low) & (advantages < 0))
        assert torch.equal(clipped_high, (ratios > 1 + high) & (advantages > 0))


def test_aggregation_adds_up_over_micro_batches():
    values = scores(5)
    parts = [values[a:b] for a, b in zip(CU[:-1], CU[1:], strict=True)]
    every, some = torch.ones(5, dtype=torch.bool), torch.tensor([True, False, True, True, False])
    for counted in (every, some):
        taken = [part for part, c in zip(parts, counted.tolist(), strict=True) if c]
        expected = {
            "token_mean": torch.cat(taken).mean().item(),
            "sequence_mean": sum(part.mean().item() for part in taken if len(part)) / len(taken),
            # Never the longest that there is.
            "fixed_length": sum(part.sum().item() for part in taken) / (len(taken) * 300),
        }
        for how, value in expected.items():
            total, count = aggregate(values, segment_ids(CU), CU.diff(), counted, how, 300)
            assert (total / count).item() == pytest.approx(value, rel=1e-5) and count.dtype == torch.int64
            split = [
                aggregate(part, torch.zeros(len(part)).long(), CU.diff()[i : i + 1], counted[i : i + 1], how, 300)
                for i, part in enumerate(parts)
            ]
            assert sum(s.item() for s, _ in split) == pytest.approx(total.item(), rel=1e-5)
            assert sum(c.item() for _, c in split) == count.item()


def test_what_does_not_count_may_be_anything():
    values = torch.tensor([1.0, math.nan, 2.0], requires_grad=True)
    counted = torch.tensor([True, False, True])
    total, count = aggregate(values, torch.arange(3), torch.ones(3), counted, "token_mean", 1)
    total.backward()
    assert total == 3 and count == 2 and values.grad.tolist() == [1, 0, 1]
