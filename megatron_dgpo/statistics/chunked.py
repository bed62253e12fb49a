"""The PyTorch tier: logits exist one chunk of tokens at a time, forward and backward, on any device.

Each tensor-parallel rank holds V/tp columns. Per token it needs only running maxima, scaled sums and the target's
logit, which merge associatively across ranks: one packed all-gather a call, whatever the number of chunks. Backward
recomputes the policy's chunk from the saved log-sum-exp: grad_logits = g·(onehot − π) − e·π·(log π + H).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

# Bytes of one float32 logits chunk: large enough for efficient products, small beside any model.
CHUNK_BYTES = 16 * 2**20


class TokenStatistics(NamedTuple):
    """Per token, [N] float32, the same on every tensor-parallel rank. The last two are None without a reference."""

    logprobs: torch.Tensor
    """log π(a); differentiable."""
    entropy: torch.Tensor
    """H(π) in nats; differentiable."""
    hellinger2: torch.Tensor | None
    """H²(π, ρ) in [0, 1]; carries no gradient."""
    reference_logprobs: torch.Tensor | None
    """log ρ(a); carries no gradient."""


class _Partial(NamedTuple):
    """Sums over this rank's columns, rows of one [9, N] float32 tensor (5 rows without a reference).

    A log-sum-exp is kept as a maximum and the sum of exponentials scaled by it, so that ranks merge exactly.
    """

    max_x: torch.Tensor
    sum_x: torch.Tensor
    mean_x: torch.Tensor
    """Σ e^(x − max_x)·(x − max_x)."""
    target_x: torch.Tensor
    """x of the target where this rank owns it, else 0."""
    max_y: torch.Tensor | None = None
    sum_y: torch.Tensor | None = None
    target_y: torch.Tensor | None = None
    max_m: torch.Tensor | None = None
    sum_m: torch.Tensor | None = None


def token_statistics(
    hidden_states: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    reference_hidden_states: torch.Tensor | None = None,
    reference_head_weight: torch.Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenStatistics:
    """Statistics of π = softmax(x / temperature) and ρ, x = hidden_states @ head_weightᵀ, over the true vocabulary.

    hidden_states, reference_hidden_states: [N, H], the same on every rank of tp_group. head_weight,
    reference_head_weight: [V_padded / tp, H], this rank's rows in rank order; rows at or beyond `vocab_size` are
    padding and take part in nothing. targets: [N] int64, below vocab_size.

    Gradients flow to hidden_states and head_weight through `logprobs` and `entropy`, never to the reference. The
    gradient of hidden_states is this rank's share of a sum over tp_group: whatever replicated the hidden states
    (`copy_to_tensor_model_parallel_region`, or the gather of sequence parallelism) must reduce it.

    Collectives: one all-gather of [9, N] (or [4, N]) float32 over tp_group forward, none backward.
    Source: arXiv 2605.03327, §3, written as log-sum-exps: log Σ √(πρ) = lse((x + y)/2) − (lse(x) + lse(y))/2.
    """
    values = _Statistics.apply(
        hidden_states,
        head_weight,
        targets,
        None if reference_hidden_states is None else reference_hidden_states.detach(),
        None if reference_head_weight is None else reference_head_weight.detach(),
        temperature,
        vocab_size,
        tp_group,
        chunk_bytes,
    )
    return TokenStatistics(*values)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, reference_hidden, reference_weight, temperature, vocab_size, group, size):
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        first = rank * weight.shape[0]
        columns = max(0, min(weight.shape[0], vocab_size - first))
        local_targets = targets - first
        owned = (local_targets >= 0) & (local_targets < columns)
        ctx.chunk = max(1, size // (4 * max(columns, 1)))
        ctx.temperature, ctx.columns = temperature, columns
        rows = 4 if reference_hidden is None else 9
        partial = torch.zeros(rows, hidden.shape[0], dtype=torch.float32, device=hidden.device)
        if columns == 0:
            # This rank holds padding only: a maximum of minus infinity weighs nothing in the merge.
            partial[[0] if rows == 4 else [0, 4, 7]] = -torch.inf
        else:
            safe_targets = local_targets.clamp(0, columns - 1)
            for start in range(0, hidden.shape[0], ctx.chunk):
                part = slice(start, start + ctx.chunk)
                x = _logits(hidden[part], weight[:columns], temperature)
                index = safe_targets[part, None]
                out = partial[:, part]
                out[3] = x.gather(-1, index)[:, 0]
                if reference_hidden is not None:
                    y = _logits(reference_hidden[part], reference_weight[:columns], temperature)
                    out[6] = y.gather(-1, index)[:, 0]
                    _scaled_sum(torch.add(x, y).mul_(0.5), out[7], out[8])
                    _scaled_sum(y, out[4], out[5])
                exponentials = _scaled_sum(x, out[0], out[1], keep=True)
                # x was shifted by its maximum in place.
                torch.sum(exponentials.mul_(x), -1, out=out[2])
            partial[3].masked_fill_(~owned, 0)
            if rows == 9:
                partial[6].masked_fill_(~owned, 0)
        logprobs, entropy, lse, hellinger2, reference_logprobs = _merge(partial, group, world)
        ctx.save_for_backward(hidden, weight, local_targets, owned, lse, entropy)
        ctx.mark_non_differentiable(*(t for t in (hellinger2, reference_logprobs) if t is not None))
        return logprobs, entropy, hellinger2, reference_logprobs

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, *_):
        hidden, weight, local_targets, owned, lse, entropy = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Sums over tokens: float32 whatever the weight's dtype, rounded once.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        for start in range(0, hidden.shape[0] if ctx.columns else 0, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            log_pi = _logits(hidden[part], weight[: ctx.columns], ctx.temperature).sub_(lse[part, None])
            grad = log_pi.exp()
            entropy_scale = grad_entropy[part, None]
            # dH/dx = -π (log π + H); d log π(a)/dx = onehot - π.
            log_pi.add_(entropy[part, None]).mul_(entropy_scale).add_(grad_logprobs[part, None])
            grad.mul_(log_pi).neg_()
            rows = owned[part].nonzero()[:, 0]
            grad[rows, local_targets[part][rows]] += grad_logprobs[part][rows]
            grad.div_(ctx.temperature)
            grad = grad.to(hidden.dtype)
            if needs_hidden:
                torch.mm(grad, weight[: ctx.columns], out=grad_hidden[part])
            if needs_weight:
                _add_product(grad_weight[: ctx.columns], grad.t(), hidden[part])
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = torch.mm(hidden, weight.t()).float()
    return logits if temperature == 1 else logits.div_(temperature)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


def _scaled_sum(values: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor, keep: bool = False):
    """maximum = max over columns, total = Σ e^(values − maximum); shifts `values` in place by the maximum."""
    maximum.copy_(values.amax(-1))
    values.sub_(maximum[:, None])
    exponentials = values.exp() if keep else values.exp_()
    torch.sum(exponentials, -1, out=total)
    return exponentials


def _merge(partial: torch.Tensor, group: dist.ProcessGroup | None, world: int):
    """Combine the ranks' sums. Collectives: one all-gather over group."""
    if world > 1:
        gathered = torch.empty(world * partial.shape[0], partial.shape[1], dtype=partial.dtype, device=partial.device)
        dist.all_gather_into_tensor(gathered, partial, group=group)
        gathered = gathered.view(world, *partial.shape)
    else:
        gathered = partial[None]
    rows = _Partial(*gathered.unbind(1))
    maximum = rows.max_x.amax(0)
    scale = torch.exp(rows.max_x - maximum)
    total = (rows.sum_x * scale).sum(0)
    # A rank of padding only has max −∞ and sum 0: its shift must not become 0·∞.
    shift = torch.where(rows.sum_x > 0, rows.max_x - maximum, 0)
    mean = ((rows.mean_x + rows.sum_x * shift) * scale).sum(0) / total
    log_total = total.log()
    lse = maximum + log_total
    logprobs = rows.target_x.sum(0) - lse
    entropy = (log_total - mean).clamp_(min=0)
    if rows.max_y is None:
        return logprobs, entropy, lse, None, None
    lse_y, lse_m = _logsumexp(rows.max_y, rows.sum_y), _logsumexp(rows.max_m, rows.sum_m)
    log_bc = lse_m - (lse + lse_y) / 2
    hellinger2 = torch.expm1(log_bc).neg_().clamp_(0, 1)
    return logprobs, entropy, lse, hellinger2, rows.target_y.sum(0) - lse_y


def _logsumexp(maxima: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    maximum = maxima.amax(0)
    return maximum + (sums * torch.exp(maxima - maximum)).sum(0).log()
