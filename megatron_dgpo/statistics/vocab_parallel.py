"""Log-probability, entropy and deviation from the reference of every token from hidden states, tile by tile of logits.

Each tensor-parallel rank holds V/tp columns and goes through them in tiles of some tokens by some columns, so that the
products are efficient whatever the vocabulary. A tile is reduced to a few sums a token (`sums`), tiles and ranks merge
associatively: one packed all-gather a call. Backward makes each tile of the policy's logits again and turns it into
its gradient: g·(onehot − π) − e·π·(log π + H).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from megatron_dgpo.statistics import chunked
from megatron_dgpo.statistics.sums import empty_sums, finish, merge, num_sums

_TILE_COLUMNS = 4096
TILE_ROWS = 4096
# On CPU a tile and its temporaries stay in the cache. On a GPU it should be large: every tile adds to float32
# sums of H × (rows + columns), which at 4096 × 4096 cost about a tenth of the products.
TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}


class TokenStatistics(NamedTuple):
    """Per token, [N] float32, the same on every tensor-parallel rank. The last two are None without a reference."""

    logprobs: torch.Tensor
    """log π(a); differentiable."""
    entropy: torch.Tensor
    """H(π) in nats; differentiable."""
    deviation: torch.Tensor | None
    """d(π, ρ): H² in [0, 1], or what `alpha` asks for; carries no gradient."""
    reference_logprobs: torch.Tensor | None
    """log ρ(a); carries no gradient."""


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
    alpha: float | None = 0.5,
    tier: Literal["auto", "chunked", "triton"] = "auto",
    tile_bytes: int | None = None,
    check_finite: bool = False,
) -> TokenStatistics:
    """Statistics of π = softmax(x / temperature) and ρ, x = hidden_states @ head_weightᵀ, over the true vocabulary.

    hidden_states, reference_hidden_states: [N, H], the same on every rank of tp_group. head_weight,
    reference_head_weight: [V_padded / tp, H], this rank's rows in rank order; rows at or beyond `vocab_size` are
    padding and take part in nothing. targets: [N] int64, below vocab_size. alpha: the deviation is 1 − Σ π^α ρ^(1−α),
    0 < α < 1, H² at ½; None: KL(π ‖ ρ). tier: `auto` is triton on GPUs where it is
    installed. tile_bytes: of one float32 tile of logits, of which a few exist at a time.

    Gradients flow to hidden_states and head_weight through `logprobs` and `entropy`, never to the reference.
    The gradient of hidden_states is this rank's share of a sum over tp_group: whatever replicated the hidden states
    (`copy_to_tensor_model_parallel_region`, or the gather of sequence parallelism) must reduce it. The gradient of a
    weight that Megatron's DDP gave a float32 `main_grad` is added there, and to nothing else.

    Raises FloatingPointError with check_finite, naming the input and its first token or row that is not finite.
    Collectives: one all-gather of [8, N] (or [4, N], without a reference) float32 over tp_group forward, none backward.
    Source: arXiv 2605.03327, §3.
    """
    if check_finite:
        first = _first_row(head_weight, tp_group)
        _check("hidden_states", hidden_states, "token")
        _check("head_weight", head_weight, "vocabulary row", first)
        _check("reference_hidden_states", reference_hidden_states, "token")
        _check("reference_head_weight", reference_head_weight, "vocabulary row", first)
    if tier == "auto":
        tier = "triton" if hidden_states.is_cuda and importlib.util.find_spec("triton") else "chunked"
    reference = reference_hidden_states, reference_head_weight
    values = _Statistics.apply(
        hidden_states,
        head_weight,
        targets,
        *(None if tensor is None else tensor.detach() for tensor in reference),
        1 / temperature,
        vocab_size,
        tp_group,
        alpha,
        tier,
        tile_bytes or TILE_BYTES[hidden_states.device.type],
    )
    return TokenStatistics(*values)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        targets,
        reference_hidden,
        reference_weight,
        scale,
        vocab_size,
        group,
        alpha,
        tier,
        tile_bytes,
    ):
        first = _first_row(weight, group)
        ctx.columns = max(0, min(weight.shape[0], vocab_size - first))
        ctx.scale, ctx.tile_bytes, ctx.tiles = scale, tile_bytes, _tier(tier)
        # A gradient that nobody asked for arrives as None: without an entropy bonus its terms are left out.
        ctx.set_materialize_grads(False)
        n, has_reference = hidden.shape[0], reference_hidden is not None
        local_targets = targets - first
        total = empty_sums(num_sums(has_reference), n, hidden.device)
        rows_step, columns_step = _tile_shape(ctx)
        x_tile, y_tile, scratch = _new_tiles(ctx, 3, hidden.device)
        for rows in _slices(n, rows_step if ctx.columns else 0):
            parts = []
            for columns in _slices(ctx.columns, columns_step):
                x = _logits(x_tile, hidden[rows], weight[columns], scale)
                y = None
                if has_reference:
                    y = _logits(y_tile, reference_hidden[rows], reference_weight[columns], scale)
                parts.append(total.new_empty(total.shape[0], x.shape[0]))
                ctx.tiles.tile_sums(x, y, local_targets[rows] - columns.start, parts[-1], _like(x, scratch), alpha)
            total[:, rows] = merge(torch.stack(parts), alpha)
        lse, *values = finish(_merge_over_ranks(total, group, alpha), alpha)
        # The weight as it is, not a saved copy of its handle: Megatron's attributes hang on it.
        ctx.weight = weight
        ctx.save_for_backward(hidden, local_targets, lse, values[1])
        ctx.mark_non_differentiable(*(tensor for tensor in values[2:] if tensor is not None))
        return tuple(values)

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, *_):
        hidden, targets, lse, entropy = ctx.saved_tensors
        weight, scale = ctx.weight, ctx.scale
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Sums over tokens: float32 whatever the weight's dtype, rounded once.
        fused = needs_weight and _accumulates_in_place(weight)
        grad_weight = None
        if needs_weight:
            grad_weight = weight.main_grad if fused else torch.zeros_like(weight, dtype=torch.float32)
        # x is scaled after the product: its gradient is, too.
        grad_logprobs = torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs * scale
        grad_entropy = None if grad_entropy is None else grad_entropy * scale
        # On CPU the products are in float32 anyway.
        dtype = hidden.dtype if hidden.is_cuda else torch.float32
        rows_step, columns_step = _tile_shape(ctx)
        tile, scratch = _new_tiles(ctx, 2, hidden.device)
        for rows in _slices(len(hidden), rows_step if ctx.columns else 0):
            sum_hidden = grad_hidden
            if needs_hidden:
                in_float32 = hidden.dtype == torch.float32
                sum_hidden = grad_hidden[rows] if in_float32 else torch.zeros_like(hidden[rows], dtype=torch.float32)
            vectors = (
                lse[rows],
                entropy[rows],
                grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
            )
            for columns in _slices(ctx.columns, columns_step):
                x = _logits(tile, hidden[rows], weight[columns], scale)
                grad = ctx.tiles.tile_gradient(x, targets[rows] - columns.start, *vectors, dtype, _like(x, scratch))
                if needs_hidden:
                    _add_product(sum_hidden, grad, weight[columns])
                if needs_weight:
                    _add_product(grad_weight[columns], grad.t(), hidden[rows])
            if needs_hidden and sum_hidden.dtype != grad_hidden.dtype:
                grad_hidden[rows] = sum_hidden
        if fused:
            weight.grad_added_to_main_grad = True
            grad_weight = _placeholder(weight)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if needs_weight else None,
            *(None,) * 9,
        )


def _tier(name: str):
    if name == "chunked":
        return chunked
    # Triton is not everywhere, and takes long to import.
    from megatron_dgpo.statistics import fused

    return fused


def _first_row(weight: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """Vocabulary row of this rank's first."""
    return 0 if group is None else dist.get_rank(group) * weight.shape[0]


def _tile_shape(ctx) -> tuple[int, int]:
    columns = max(1, min(ctx.columns, _TILE_COLUMNS, ctx.tile_bytes // 4))
    return max(1, min(TILE_ROWS, ctx.tile_bytes // (4 * columns))), columns


def _new_tiles(ctx, count: int, device: torch.device) -> list[torch.Tensor | None]:
    """The last is scratch, None where the tier needs none."""
    size = torch.Size(_tile_shape(ctx)).numel()
    tiles = [torch.empty(size, device=device) for _ in range(count - 1)]
    return [*tiles, torch.empty(size, device=device) if ctx.tiles.NEEDS_SCRATCH else None]


def _like(x: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of x's shape at the start of `memory`: rows are contiguous, whatever the tile's size."""
    return None if memory is None else memory[: x.numel()].view(x.shape)


def _slices(size: int, step: int) -> Iterator[slice]:
    """Nothing where step is 0."""
    return (slice(start, min(start + step, size)) for start in range(0, size if step else 0, step or 1))


def _logits(tile: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · hidden @ weightᵀ, in `tile`'s memory: [rows, columns] float32, rows contiguous."""
    out = tile[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    return _add_product(out, hidden, weight.t(), alpha=scale, beta=0)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha=1.0, beta=1.0) -> torch.Tensor:
    """total = beta · total + alpha · left @ right in float32, whatever the factors' dtype."""
    if left.dtype == right.dtype == torch.float32:
        return total.addmm_(left, right, alpha=alpha, beta=beta)
    if left.is_cuda:
        return torch.addmm(total, left, right, out_dtype=torch.float32, alpha=alpha, beta=beta, out=total)
    return total.addmm_(left.float(), right.float(), alpha=alpha, beta=beta)


def _merge_over_ranks(total: torch.Tensor, group: dist.ProcessGroup | None, alpha: float | None) -> torch.Tensor:
    """Collectives: one all-gather over group, none in a group of one."""
    world = 1 if group is None else dist.get_world_size(group)
    if world == 1:
        return total
    gathered = total.new_empty(world * total.shape[0], total.shape[1])
    dist.all_gather_into_tensor(gathered, total, group=group)
    return merge(gathered.view(world, *total.shape), alpha)


def _accumulates_in_place(weight: torch.Tensor) -> bool:
    """Whether Megatron's DDP owns the gradient: then it skips what says `grad_added_to_main_grad`."""
    main_grad = getattr(weight, "main_grad", None)
    return hasattr(weight, "grad_added_to_main_grad") and main_grad is not None and main_grad.dtype == torch.float32


def _placeholder(weight: torch.Tensor) -> torch.Tensor:
    """What backward returns for a gradient that is in `main_grad` already, as Megatron's own layers do.

    Its DDP takes a gradient as ready for reduction when one arrives. The values count only where an embedding shares
    the weight and autograd adds its gradient: DDP then asks for zeros.
    """
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)


def _check(name: str, tensor: torch.Tensor | None, unit: str, first: int = 0) -> None:
    if tensor is None:
        return
    bad = (~torch.isfinite(tensor)).any(-1).nonzero()
    if len(bad):
        row = int(bad[0])
        values = tensor[row]
        value = values[~torch.isfinite(values)][0].item()
        raise FloatingPointError(
            f"{name} holds {value} at {unit} {first + row} ({len(bad)} of {len(tensor)} are affected)"
        )
