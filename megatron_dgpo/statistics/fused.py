"""The Triton tier: each tile of logits is read once. Same functions as in `chunked`.

The products stay with cuBLAS, which no Triton product reaches on Hopper; what is fused is all that follows them. One
program holds a whole row of a tile in registers, so no online maximum is needed. A tile of 64 MB is larger than any L2
cache: the kernels read it from memory, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NEEDS_SCRATCH = False


@triton.jit
def _sums(
    x_ptr,
    y_ptr,
    target_ptr,
    out_ptr,
    n,
    columns,
    stride,
    out_stride,
    alpha,
    HAS_REFERENCE: tl.constexpr,
    KL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    in_rows = rows < n
    inside = in_rows[:, None] & (column < columns)
    place = rows[:, None].to(tl.int64) * stride + column
    target = tl.load(target_ptr + rows, mask=in_rows, other=-1)
    hit = column == target[:, None]
    held = (target >= 0) & (target < columns)

    x = tl.load(x_ptr + place, mask=inside, other=float("-inf"))
    max_x = tl.where(in_rows, tl.max(x, 1), 0.0)
    x = x - max_x[:, None]
    exp_x = tl.exp(x)
    out = out_ptr + rows
    tl.store(out, max_x, mask=in_rows)
    tl.store(out + out_stride, tl.where(held, tl.sum(tl.where(hit, x, 0.0), 1), float("-inf")), mask=in_rows)
    tl.store(out + 2 * out_stride, tl.sum(exp_x, 1), mask=in_rows)
    tl.store(out + 3 * out_stride, tl.sum(tl.where(inside, exp_x * x, 0.0), 1), mask=in_rows)
    if HAS_REFERENCE:
        y = tl.load(y_ptr + place, mask=inside, other=float("-inf"))
        max_y = tl.where(in_rows, tl.max(y, 1), 0.0)
        y = y - max_y[:, None]
        tl.store(out + 4 * out_stride, max_y, mask=in_rows)
        tl.store(out + 5 * out_stride, tl.where(held, tl.sum(tl.where(hit, y, 0.0), 1), float("-inf")), mask=in_rows)
        tl.store(out + 6 * out_stride, tl.sum(tl.exp(y), 1), mask=in_rows)
        mixed = tl.where(inside, exp_x * y, 0.0) if KL else tl.exp(alpha * x + (1 - alpha) * y)
        tl.store(out + 7 * out_stride, tl.sum(mixed, 1), mask=in_rows)


@triton.jit
def _gradient(
    x_ptr,
    out_ptr,
    target_ptr,
    lse_ptr,
    entropy_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    n,
    columns,
    stride,
    HAS_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    in_rows = rows < n
    inside = in_rows[:, None] & (column < columns)
    place = rows[:, None].to(tl.int64) * stride + column
    target = tl.load(target_ptr + rows, mask=in_rows, other=-1)
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=0.0)
    grad_logprobs = tl.load(grad_logprobs_ptr + rows, mask=in_rows, other=0.0)[:, None]
    log_pi = tl.load(x_ptr + place, mask=inside, other=0.0) - lse[:, None]
    factor = grad_logprobs
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + rows, mask=in_rows, other=0.0)[:, None]
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=in_rows, other=0.0)[:, None]
        factor += grad_entropy * (log_pi + entropy)
    grad = tl.where(column == target[:, None], grad_logprobs, 0.0) - tl.exp(log_pi) * factor
    tl.store(out_ptr + rows[:, None].to(tl.int64) * columns + column, grad.to(out_ptr.dtype.element_ty), mask=inside)


def _blocks(x: torch.Tensor) -> dict[str, int]:
    """One row a program; the interpreter, which runs programs one after another, does better with many."""
    return {"ROWS": 1 if x.is_cuda else 256, "COLUMNS": triton.next_power_of_2(x.shape[1]), "num_warps": 8}


def tile_sums(
    x: torch.Tensor,
    y: torch.Tensor | None,
    target: torch.Tensor,
    out: torch.Tensor,
    _scratch: None,
    alpha: float | None,
) -> None:
    """As `chunked.tile_sums`; x and y are left as they are."""
    blocks = _blocks(x)
    grid = (triton.cdiv(x.shape[0], blocks["ROWS"]),)
    other = x if y is None else y
    sizes = *x.shape, x.stride(0), out.stride(0)
    flags = {"HAS_REFERENCE": y is not None, "KL": alpha is None}
    _sums[grid](x, other, target, out, *sizes, 0.5 if alpha is None else alpha, **flags, **blocks)


def tile_gradient(
    x: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    dtype: torch.dtype,
    _scratch: None,
) -> torch.Tensor:
    """As `chunked.tile_gradient`; x is left as it is."""
    blocks = _blocks(x)
    grid = (triton.cdiv(x.shape[0], blocks["ROWS"]),)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    has_entropy = grad_entropy is not None
    vectors = (lse, entropy, grad_logprobs, grad_entropy if has_entropy else grad_logprobs)
    _gradient[grid](x, out, target, *vectors, *x.shape, x.stride(0), HAS_ENTROPY=has_entropy, **blocks)
    return out
