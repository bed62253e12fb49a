"""DGPO written a second time: transformers and plain PyTorch in float64, one process, nothing shared with the package.

Only the definitions of docs/method.md (arXiv 2605.03327) are followed; loops over responses, no packing, no chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion


@dataclass
class Oracle:
    loss: float
    weights: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


def dense_step(policy_dir, reference_dir, rows, algorithm, temperature, vocab_size, old_dir=None) -> Oracle:
    """One optimizer step's loss, credit weights and gradients. rows: (prompt, response, advantage, old log-probs).

    old_dir: the policy before the first update, where it is not the current one; old log-probs are then its own.
    """
    policy, reference, old_policy = (
        # Experts one by one: the grouped product does not take float64.
        AutoModelForCausalLM.from_pretrained(path or policy_dir, dtype=torch.float64, experts_implementation="eager")
        for path in (policy_dir, reference_dir, old_dir)
    )
    total, weights = torch.zeros((), dtype=torch.float64), []
    num_tokens = sum(len(response) for _, response, _, _ in rows)
    for prompt, response, advantage, old in rows:
        ids = torch.tensor([[*prompt, *response]])
        place = slice(len(prompt) - 1, -1)
        log_pi = torch.log_softmax(policy(ids).logits[0, place] / temperature, -1)
        with torch.no_grad():
            log_rho = torch.log_softmax(reference(ids).logits[0, place] / temperature, -1)
            log_old = torch.log_softmax(old_policy(ids).logits[0, place] / temperature, -1)
        index = torch.tensor(response)[:, None]
        chosen = log_pi.gather(-1, index)[:, 0]
        if old is None:
            old = log_old.gather(-1, index)[:, 0]
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        w = torch.ones(len(response), dtype=torch.float64)
        if algorithm.credit == "distribution_guided":
            scored = (log_pi if algorithm.scored_by == "current" else log_old).detach()
            d = 1 - (scored.exp() * log_rho.exp()).sqrt().sum(-1)
            h = -(scored.exp() * scored).sum(-1)
            largest = math.log(vocab_size) if algorithm.entropy_norm == "log_vocab" else h.max()
            s = d.clamp(min=0) * (h / largest) ** algorithm.kappa
            w = len(response) * torch.softmax(s / algorithm.tau, 0)
        weights.append(w)
        ratio = (chosen - torch.as_tensor(old, dtype=torch.float64)).exp()
        clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        token_loss = -torch.minimum(ratio * advantage * w, clipped * advantage * w)
        token_loss = token_loss - algorithm.entropy_bonus * entropy
        by_tokens = algorithm.aggregation == "token_mean"
        total = total + (token_loss.sum() / num_tokens if by_tokens else token_loss.mean() / len(rows))
    total.backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    # Experts by the names of the files; in memory they are stacked.
    return Oracle(total.item(), weights, revert_weight_conversion(policy, gradients))
