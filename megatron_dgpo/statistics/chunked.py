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
    """Sums over this rank's columns, rows of one [8, N] float32 tensor (4 rows without a reference).

    Everything is relative to this rank's maxima: logits of any size keep full precision, and ranks merge exactly.
    """

    max_x: torch.Tensor
    target_x: torch.Tensor
    """x − max_x of the target where this rank owns it, else −∞."""
    sum_x: torch.Tensor
    """Σ e^(x − max_x)."""
    mean_x: torch.Tensor
    """Σ e^(x − max_x)·(x − max_x)."""
    max_y: torch.Tensor | None = None
    target_y: torch.Tensor | None = None
    sum_y: torch.Tensor | None = None
    sum_m: torch.Tensor | None = None
    """Σ e^((x − max_x + y − max_y) / 2); underflows only where H² is 1 to float32."""


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

    Collectives: one all-gather of [8, N] (or [4, N], without a reference) float32 over tp_group forward, none backward.
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
        ctx.columns, ctx.temperature, ctx.chunk = columns, temperature, max(1, size // (4 * max(columns, 1)))
        # A gradient that nobody asked for arrives as None: without an entropy bonus its passes are left out.
        ctx.set_materialize_grads(False)
        owned = (targets >= first) & (targets < first + columns)
        local_targets = (targets - first).clamp(0, max(columns - 1, 0))
        rows = 4 if reference_hidden is None else 8
        partial = torch.zeros(rows, hidden.shape[0], dtype=torch.float32, device=hidden.device)
        if columns == 0:
            # This rank holds padding only: a maximum of minus infinity weighs nothing in the merge.
            partial[0::4] = partial[1::4] = -torch.inf
        for start in range(0, hidden.shape[0] if columns else 0, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            out, index, elsewhere = partial[:, part], local_targets[part, None], ~owned[part]
            x = _shifted_logits(hidden[part], weight[:columns], temperature, out[0])
            out[1] = x.gather(-1, index)[:, 0].masked_fill_(elsewhere, -torch.inf)
            if reference_hidden is not None:
                y = _shifted_logits(reference_hidden[part], reference_weight[:columns], temperature, out[4])
                out[5] = y.gather(-1, index)[:, 0].masked_fill_(elsewhere, -torch.inf)
                torch.sum(torch.lerp(x, y, 0.5).exp_(), -1, out=out[7])
                torch.sum(y.exp_(), -1, out=out[6])
            exponentials = x.exp()
            torch.sum(exponentials, -1, out=out[2])
            torch.sum(exponentials.mul_(x), -1, out=out[3])
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
        grad_logprobs = torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs / ctx.temperature
        for start in range(0, hidden.shape[0] if ctx.columns else 0, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            scale = grad_logprobs[part, None]
            log_pi = _logits(hidden[part], weight[: ctx.columns], ctx.temperature).sub_(lse[part, None])
            # d log π(a)/dx = onehot − π; dH/dx = −π (log π + H).
            if grad_entropy is None:
                grad = log_pi.exp_().mul_(-scale)
            else:
                grad = log_pi.exp()
                entropy_scale = grad_entropy[part, None] / ctx.temperature
                grad.mul_(log_pi.add_(entropy[part, None]).mul_(-entropy_scale).sub_(scale))
            grad.scatter_add_(1, local_targets[part, None], scale * owned[part, None])
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


def _shifted_logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float, maximum: torch.Tensor):
    """Logits less their largest over the columns, which is written to `maximum`."""
    logits = _logits(hidden, weight, temperature)
    torch.amax(logits, -1, out=maximum)
    return logits.sub_(maximum[:, None])


def _merge(partial: torch.Tensor, group: dist.ProcessGroup | None, world: int):
    """Combine the ranks' sums. Collectives: one all-gather over group."""
    if world > 1:
        gathered = torch.empty(world * partial.shape[0], partial.shape[1], dtype=partial.dtype, device=partial.device)
        dist.all_gather_into_tensor(gathered, partial, group=group)
        gathered = gathered.view(world, *partial.shape)
    else:
        gathered = partial[None]
    rows = _Partial(*gathered.unbind(1))
    lse, log_sum, shift = _log_sum(rows.max_x, rows.sum_x)
    logprobs = (rows.target_x + shift).amax(0) - log_sum
    # A rank of padding only has shift −∞ and sum 0: that must not become 0·∞.
    finite = shift.masked_fill(rows.sum_x == 0, 0)
    mean = ((rows.mean_x + rows.sum_x * finite) * shift.exp()).sum(0) / log_sum.exp()
    entropy = (log_sum - mean).clamp_(min=0)
    if rows.max_y is None:
        return logprobs, entropy, lse, None, None
    _, log_sum_y, shift_y = _log_sum(rows.max_y, rows.sum_y)
    # log Σ √(πρ) = lse((x + y)/2) − (lse(x) + lse(y))/2: the maxima cancel, so the size of the logits costs nothing.
    log_bc = (rows.sum_m * ((shift + shift_y) / 2).exp()).sum(0).log() - (log_sum + log_sum_y) / 2
    hellinger2 = torch.expm1(log_bc.clamp_(max=0)).abs_()
    return logprobs, entropy, lse, hellinger2, (rows.target_y + shift_y).amax(0) - log_sum_y


def _log_sum(maxima: torch.Tensor, sums: torch.Tensor):
    """maxima, sums: [ranks, N]. Returns lse [N], lse less the overall maximum [N], and maxima less that [ranks, N]."""
    maximum = maxima.amax(0)
    shift = maxima - maximum
    log_sum = (sums * shift.exp()).sum(0).log()
    return maximum + log_sum, log_sum, shift
