"""The definition: float64, one process, every logit in memory. The oracle of the faster tiers."""

from __future__ import annotations

import torch


def dense_statistics(logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor | None = None):
    """(log π(a), H(π), H²(π, ρ), log ρ(a)), each [N] float64; the last two None without a reference.

    logits, reference_logits: [N, V], already divided by the temperature. Source: arXiv 2605.03327, §3.
    """
    log_pi = torch.log_softmax(logits.double(), -1)
    logprobs = log_pi.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    if reference_logits is None:
        return logprobs, entropy, None, None
    log_rho = torch.log_softmax(reference_logits.double(), -1)
    hellinger2 = -torch.expm1(torch.logsumexp((log_pi + log_rho) / 2, -1)).clamp(max=0)
    return logprobs, entropy, hellinger2, log_rho.gather(-1, targets[:, None])[:, 0]
