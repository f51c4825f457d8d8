"""Tokens to rows: `x (T, H)` -> `(R, H)` in expert order, each row scaled by its slot's weight if there are weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.kernels.config import on_device_of, rows_contiguous
from triton_moe.layout import Routing


@triton.jit
def gather_fwd_kernel(
    x, weights, row_to_slot, out, H, stride_xt, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.load(row_to_slot + row)
    present = tl.where(slot >= 0, H, 0)
    value = tl.load(x + (slot // K).to(tl.int64) * stride_xt + cols, mask=cols < present, other=0)
    if WEIGHTED:
        value = tl.load(weights + slot, mask=slot >= 0, other=0).to(tl.float32) * value
    tl.store(out + row.to(tl.int64) * H + cols, value.to(out.dtype.element_ty), mask=cols < H)


def hidden_block(hidden_size: int) -> dict[str, int]:
    """Launch keywords of a kernel that walks rows of `hidden_size` elements: 8 a thread, at most 512 a program."""
    block = max(16, min(512, triton.next_power_of_2(hidden_size)))
    return {"BLOCK_H": block, "num_warps": max(1, block // 256)}


def gather_fwd(x: Tensor, weights: Tensor | None, routing: Routing) -> Tensor:
    """`x (T, H)`, weights `(T, K)` or None -> `(R, H)`; zeros past the last row."""
    x, hidden_size = rows_contiguous(x), x.shape[1]
    weights = None if weights is None else weights.contiguous()
    out = torch.empty(routing.num_rows, hidden_size, dtype=x.dtype, device=x.device)
    launch = hidden_block(hidden_size)
    if out.numel():
        with on_device_of(x):
            gather_fwd_kernel[(routing.num_rows, triton.cdiv(hidden_size, launch["BLOCK_H"]))](
                x, weights, routing.row_to_slot, out, hidden_size, x.stride(0),
                K=routing.top_k, WEIGHTED=weights is not None, **launch,
            )  # fmt: skip
    return out
