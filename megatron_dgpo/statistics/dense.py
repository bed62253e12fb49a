"""The definition: float64, one process, every logit in memory. The oracle of the faster tiers."""

from __future__ import annotations

import torch


def dense_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    reference_logits: torch.Tensor | None = None,
    alpha: float | None = 0.5,
):
    """(log π(a), H(π), d(π, ρ), log ρ(a)), each [N] float64; the last two None without a reference.

    alpha: d = 1 − Σ π^α ρ^(1−α), H² at ½; None: KL(π ‖ ρ). logits, reference_logits: [N, V], already divided by the
    temperature. Source: arXiv 2605.03327, §3.
    """
    log_pi = torch.log_softmax(logits.double(), -1)
    logprobs = log_pi.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    if reference_logits is None:
        return logprobs, entropy, None, None
    log_rho = torch.log_softmax(reference_logits.double(), -1)
    if alpha is None:
        deviation = (log_pi.exp() * (log_pi - log_rho)).sum(-1)
    else:
        deviation = -torch.expm1(torch.logsumexp(alpha * log_pi + (1 - alpha) * log_rho, -1)).clamp(max=0)
    return logprobs, entropy, deviation, log_rho.gather(-1, targets[:, None])[:, 0]
