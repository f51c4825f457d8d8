"""Rows to tokens: `out[t] = sum_k weights[t, k] * y[slot_to_row[t, k]]`. One program a token, fp32 sums, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.kernels.config import rows_contiguous
from triton_moe.kernels.gather import launcher_over_hidden
from triton_moe.layout import Routing


@triton.jit
def scatter_fwd_kernel(
    y, weights, slot_to_row, out, H, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(slot_to_row + token * TOP_K + k)
        present = tl.where(row >= 0, H, 0)
        value = tl.load(y + row.to(tl.int64) * H + cols, mask=cols < present, other=0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP_K + k, mask=row >= 0, other=0).to(tl.float32)
        total += value
    tl.store(out + token * H + cols, total.to(out.dtype.element_ty), mask=cols < H)


@triton.jit
def scatter_bwd_weights_kernel(
    dout, y, slot_to_row, dweights, H, stride_dt, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    """dweights[t, k] = <dout[t], y[slot_to_row[t, k]]>, 0 where the slot has no row."""
    slot = tl.program_id(0)
    row = tl.load(slot_to_row + slot)
    present = tl.where(row >= 0, H, 0)
    total = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, H, BLOCK_H):
        cols = first + tl.arange(0, BLOCK_H)
        mask = cols < present
        d = tl.load(dout + (slot // TOP_K).to(tl.int64) * stride_dt + cols, mask=mask, other=0).to(tl.float32)
        total += d * tl.load(y + row.to(tl.int64) * H + cols, mask=mask, other=0).to(tl.float32)
    tl.store(dweights + slot, tl.sum(total).to(dweights.dtype.element_ty))


def scatter_fwd(y: Tensor, weights: Tensor | None, routing: Routing) -> Tensor:
    """`y (R, H)`, weights `(T, K)` or None for a plain sum -> `(T, H)`. Rows that no slot owns are never read."""
    y, hidden_size, weighted = y.contiguous(), y.shape[1], weights is not None
    out = torch.empty(routing.num_tokens, hidden_size, dtype=y.dtype, device=y.device)
    launch, programs = launcher_over_hidden(scatter_fwd_kernel, hidden_size, TOP_K=routing.top_k, WEIGHTED=weighted)
    weights = None if weights is None else weights.contiguous()
    launch((routing.num_tokens, programs), y, weights, routing.slot_to_row, out, hidden_size)
    return out


def scatter_bwd_weights(dout: Tensor, y: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """`dout (T, H)`, `y (R, H)` -> gradient of the weights, `(T, K)` of `dtype`."""
    dout, y, hidden_size = rows_contiguous(dout), y.contiguous(), y.shape[1]
    dweights = torch.empty(routing.topk_ids.shape, dtype=dtype, device=y.device)
    launch, _ = launcher_over_hidden(scatter_bwd_weights_kernel, hidden_size, TOP_K=routing.top_k)
    launch((routing.num_rows,), dout, y, routing.slot_to_row, dweights, hidden_size, dout.stride(0))
    return dweights
