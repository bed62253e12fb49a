"""The loss written a second time: transformers and plain PyTorch in float64, one process, nothing of the package's.

Only the definitions of docs/method.md are followed; loops over responses and tokens, no packing, no chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion


@dataclass
class Oracle:
    loss: float
    weights: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


class Row(NamedTuple):
    prompt: list[int]
    response: list[int]
    advantage: float
    old: list[float] | None = None
    """Log-probs of the policy before the first update; None: its own."""
    sampled: list[float] | None = None
    """Those of who sampled."""
    counted: bool = True


def dense_step(
    policy_dir, reference_dir, rows, algorithm, temperature, vocab_size, old_dir=None, max_tokens=1024, start_dir=None
) -> Oracle:
    """One optimizer step's loss, credit weights and gradients. rows: what `Row` is made of.

    old_dir: the policy before the first update, where it is not the current one. start_dir: what the student started
    from, where a teacher is extrapolated.
    """
    policy, reference, old_policy, start = (
        # Experts one by one: the grouped product does not take float64.
        AutoModelForCausalLM.from_pretrained(path or policy_dir, dtype=torch.float64, experts_implementation="eager")
        for path in (policy_dir, reference_dir, old_dir, start_dir)
    )
    total, weights = torch.zeros((), dtype=torch.float64), []
    rows = [Row(*row) for row in rows]
    taken = [row for row in rows if row.counted]
    num_tokens = sum(len(row.response) for row in taken)
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.response]])
        place = slice(len(row.prompt) - 1, -1)
        log_pi = torch.log_softmax(policy(ids).logits[0, place] / temperature, -1)
        with torch.no_grad():
            log_rho = torch.log_softmax(reference(ids).logits[0, place] / temperature, -1)
            log_old = torch.log_softmax(old_policy(ids).logits[0, place] / temperature, -1)
            log_start = torch.log_softmax(start(ids).logits[0, place] / temperature, -1)
        index = torch.tensor(row.response)[:, None]
        chosen, theirs, starts = (values.gather(-1, index)[:, 0] for values in (log_pi, log_rho, log_start))
        old = log_old.gather(-1, index)[:, 0] if row.old is None else row.old
        old = torch.as_tensor(row.sampled if algorithm.old_logprobs == "sampled" else old, dtype=torch.float64)
        scored = (log_pi if algorithm.scored_by == "current" else log_old).detach()
        w = credit(algorithm, scored, log_rho, (chosen - old).tolist(), row.advantage, vocab_size)
        weights.append(w)
        losses = []
        for t in range(len(row.response)):
            taught = algorithm.teacher_extrapolation * (theirs[t] - starts[t]) - (old[t] - starts[t])
            advantage = row.advantage * w[t].item() + algorithm.teacher * taught.item()
            log_ratio = chosen[t] - old[t]
            if algorithm.policy_loss == "sequence_clip":
                log_ratio = chosen[t] - chosen[t].item() + (chosen - old).mean().item()
            loss = policy_loss(algorithm, chosen[t], log_ratio, advantage)
            if algorithm.correction in ("truncate", "mask"):
                loss = loss * correction(algorithm, math.exp(old[t].item() - row.sampled[t]))
            if algorithm.kl in ("k2", "k3"):
                v = theirs[t] - chosen[t]
                loss = loss + algorithm.kl_coefficient * (v**2 / 2 if algorithm.kl == "k2" else v.exp() - 1 - v)
            losses.append(loss + algorithm.entropy_bonus * (log_pi[t].exp() * log_pi[t]).sum())
        if row.counted:
            length = {"token_mean": 1, "sequence_mean": len(losses), "fixed_length": max_tokens}[algorithm.aggregation]
            total = total + sum(losses) / length
    total = total / (num_tokens if algorithm.aggregation == "token_mean" else len(taken))
    total.backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    # Experts by the names of the files; in memory they are stacked.
    return Oracle(total.item(), weights, revert_weight_conversion(policy, gradients))


def advantages(groups, algorithm, weights):
    """[(advantage, whether it counts)] a group, of a step's groups of [(reward, [several rewards], whether right)].

    weights: of the several. Of `algorithm.advantage` mean_std, and what is combined with another stage.
    """
    found = [in_group(group, algorithm, weights) for group in groups]
    mean, divisor = 0.0, 1.0
    if algorithm.advantage in ("decoupled", "batch_std"):
        kept = [value for group in found for value, counts in group if counts]
        mean = sum(kept) / max(len(kept), 1)
        divisor = math.sqrt(sum((a - mean) ** 2 for a in kept) / max(len(kept), 1)) + algorithm.advantage_eps
    factors = [1.0] * len(groups)
    if algorithm.group_weight == "difficulty":
        factors = difficulty(groups, algorithm, weights)
    return [
        [((value - mean) / divisor * factor if counts else 0.0, counts and factor > 0) for value, counts in group]
        for group, factor in zip(found, factors, strict=True)
    ]


def in_group(group, algorithm, weights):
    """[(a response among its own group, whether it is in no conflict with itself)]."""
    rewards, size, eps = [reward for reward, _, _ in group], len(group), algorithm.advantage_eps
    mean = sum(rewards) / size
    if algorithm.advantage == "batch_std":
        return [(r - mean, True) for r in rewards]
    if algorithm.advantage == "mean_mad":
        deviation = sum(abs(r - mean) for r in rewards) / size
        return [((r - mean) / (deviation + eps), True) for r in rewards]
    if algorithm.advantage == "rloo":
        return [(r - (sum(rewards) - r) / (size - 1), True) for r in rewards]
    if algorithm.advantage == "mean_std":
        return [(a, True) for a in standard(rewards, eps)]
    by_reward = [[c * a for a in standard([row[1][k] for row in group], eps)] for k, c in enumerate(weights)]
    found = []
    for terms in zip(*by_reward, strict=True):
        torn = max(terms) > 0 > min(terms)
        found.append((sum(terms), not torn or abs(sum(terms)) >= algorithm.conflict * sum(map(abs, terms))))
    share = sum(counts for _, counts in found) / size
    return [(value * share, counts) for value, counts in found]


def standard(rewards, eps):
    """(r − mean) / (std + eps)."""
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / (deviation + eps) for r in rewards]


def difficulty(groups, algorithm, weights):
    """The weight of each group; 0 where nothing that is compared differs."""
    powers = []
    for group in groups:
        compared = [row[0] for row in group]
        if algorithm.advantage == "decoupled":
            compared = [[r for r, c in zip(row[1], weights, strict=True) if c] for row in group]
        share = sum(right for _, _, right in group) / len(group)
        same = all(values == compared[0] for values in compared)
        powers.append(0.0 if same else math.exp(-(share or 1.0) / algorithm.difficulty_temperature))
    return [sum(power > 0 for power in powers) * power / (sum(powers) or 1.0) for power in powers]


def credit(algorithm, log_pi, log_rho, log_ratios, advantage, vocab_size):
    """[T] weights of a response. log_pi, log_rho: [T, V]; log_ratios: T numbers."""
    if algorithm.credit in ("uniform", "none"):
        return torch.full((len(log_pi),), float(algorithm.credit == "uniform"), dtype=torch.float64)
    if algorithm.credit == "future_kl":
        weights = [future(algorithm, log_ratios[t:], advantage) for t in range(len(log_ratios))]
        return torch.tensor(weights, dtype=torch.float64)
    pi, rho, alpha = log_pi.exp(), log_rho.exp(), algorithm.deviation_alpha
    d = {
        "hellinger2": 1 - (pi * rho).sqrt().sum(-1),
        "alpha": 1 - (pi**alpha * rho ** (1 - alpha)).sum(-1),
        "kl": (pi * (log_pi - log_rho)).sum(-1),
    }[algorithm.deviation]
    h = -(pi * log_pi).sum(-1)
    largest = math.log(vocab_size) if algorithm.entropy_norm == "log_vocab" else h.max()
    s = d.clamp(min=0) * (h / largest) ** algorithm.kappa
    if algorithm.tau_mode == "absolute":
        return len(s) * torch.softmax(s / algorithm.tau, 0)
    below, above = 0.0, 1 / algorithm.tau_min
    for _ in range(100):
        middle = (below + above) / 2
        w = torch.softmax(s * middle, 0)
        more_even = 1 / (len(s) * (w**2).sum()) > algorithm.effective_share
        below, above = (middle, above) if more_even else (below, middle)
    return len(s) * torch.softmax(s * above, 0)


def future(algorithm, log_ratios, advantage):
    """FIPO's weight of a token; log_ratios: its own, and those of the tokens after it."""
    total = 0.0
    for k, x in enumerate(log_ratios):
        if algorithm.dual_clip is None or x <= math.log(algorithm.dual_clip):
            total += 0.5 ** (k / algorithm.future_half_life) * max(-20, min(20, x))
    f = max(algorithm.future_low, min(algorithm.future_high, math.exp(total)))
    return max(0.8, min(1, f)) if advantage < 0 and log_ratios[0] > math.log(algorithm.future_safety) else f


def policy_loss(algorithm, logprob, log_ratio, advantage):
    """Of one token; logprob and log_ratio carry gradients."""
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    ratio, r = log_ratio.exp(), log_ratio.exp().item()
    if algorithm.policy_loss == "clipped_weight":
        return -max(low, min(high, r)) * advantage * logprob
    if algorithm.policy_loss == "decoupled_gradient":
        factor = 1.0
        if advantage < 0 and r < low:
            factor = (r / low) ** algorithm.decay_low
        if advantage > 0 and r > high:
            factor = (high / r) ** (1 / algorithm.decay_high)
        return -advantage * factor * ratio
    loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if algorithm.dual_clip is not None and advantage < 0:
        loss = loss.clamp(max=-algorithm.dual_clip * advantage)
    return loss


def correction(algorithm, q):
    """Weight of a token's policy loss; q: π_old over the sampler's policy."""
    if algorithm.correction == "truncate":
        return min(q, algorithm.correction_high)
    return q if algorithm.correction_low <= q <= algorithm.correction_high else 0.0
