"""The PyTorch tier, on any device: what is computed from one tile of logits."""

from __future__ import annotations

import torch

# Temporaries of the size of a tile, made anew for each, would fragment the C library's heap by hundreds of MB.
NEEDS_SCRATCH = True


def tile_sums(
    x: torch.Tensor,
    y: torch.Tensor | None,
    target: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    alpha: float | None,
) -> None:
    """Write the `Sums` of a tile to out [8 or 4, n]. x, y: [n, columns] float32 logits, used up. scratch: like x.

    alpha: of the deviation, None for KL(π ‖ ρ). target: [n] int64, column of each token's target, outside [0, columns)
    where another tile holds it.
    """
    column = target.clamp(0, x.shape[1] - 1)[:, None]
    elsewhere = column[:, 0] != target
    _subtract_maximum(x, out[0])
    out[1] = x.gather(1, column)[:, 0].masked_fill_(elsewhere, -torch.inf)
    if y is not None:
        _subtract_maximum(y, out[4])
        out[5] = y.gather(1, column)[:, 0].masked_fill_(elsewhere, -torch.inf)
        if alpha is not None:
            torch.sum(torch.lerp(x, y, 1 - alpha, out=scratch).exp_(), -1, out=out[7])
        torch.sum(torch.exp(y, out=scratch), -1, out=out[6])
    exponentials = torch.exp(x, out=scratch)
    if y is not None and alpha is None:
        torch.sum(y.mul_(exponentials), -1, out=out[7])
    torch.sum(exponentials, -1, out=out[2])
    torch.sum(exponentials.mul_(x), -1, out=out[3])


def tile_gradient(
    x: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    dtype: torch.dtype,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the logits x [n, columns], which are used up: g·(onehot − π) − e·π·(log π + H). scratch: like x.

    target, lse, entropy, grad_logprobs, grad_entropy: [n]. Returns [n, columns] in dtype.
    """
    log_pi = x.sub_(lse[:, None])
    if grad_entropy is None:
        grad = log_pi.exp_().mul_(-grad_logprobs[:, None])
    else:
        grad = torch.exp(log_pi, out=scratch)
        grad.mul_(log_pi.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad_logprobs[:, None]))
    column = target.clamp(0, x.shape[1] - 1)[:, None]
    grad.scatter_add_(1, column, grad_logprobs[:, None] * (column == target[:, None]))
    return grad.to(dtype)


def _subtract_maximum(logits: torch.Tensor, maximum: torch.Tensor) -> None:
    torch.amax(logits, -1, out=maximum)
    logits.sub_(maximum[:, None])
