"""Tokens to rows: `x (T, H)` -> `(R, H)` in expert order, each row scaled by its slot's weight if there are weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.kernels.config import cdiv, rows_contiguous
from triton_moe.kernels.launch import Launcher
from triton_moe.layout import Routing


@triton.jit
def gather_fwd_kernel(
    x, weights, row_to_slot, out, H, stride_xt, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.load(row_to_slot + row)
    present = tl.where(slot >= 0, H, 0)
    value = tl.load(x + (slot // TOP_K).to(tl.int64) * stride_xt + cols, mask=cols < present, other=0)
    if WEIGHTED:
        value = tl.load(weights + slot, mask=slot >= 0, other=0).to(tl.float32) * value
    tl.store(out + row.to(tl.int64) * H + cols, value.to(out.dtype.element_ty), mask=cols < H)


@functools.lru_cache(maxsize=1024)
def launcher_over_hidden(kernel: Any, hidden_size: int, **options: Any) -> tuple[Launcher, int]:
    """Launcher of a kernel that walks rows of `hidden_size` elements, and the programs a row takes.

    8 elements a thread, at most 512 a program.
    """
    block = max(16, min(512, triton.next_power_of_2(hidden_size)))
    launch = Launcher(kernel, **options, BLOCK_H=block, num_warps=max(1, block // 256))
    return launch, cdiv(hidden_size, block)


def gather_fwd(x: Tensor, weights: Tensor | None, routing: Routing) -> Tensor:
    """`x (T, H)`, weights `(T, K)` or None -> `(R, H)`; zeros past the last row."""
    x, hidden_size, weighted = rows_contiguous(x), x.shape[1], weights is not None
    out = torch.empty(routing.num_rows, hidden_size, dtype=x.dtype, device=x.device)
    launch, programs = launcher_over_hidden(gather_fwd_kernel, hidden_size, TOP_K=routing.top_k, WEIGHTED=weighted)
    weights = None if weights is None else weights.contiguous()
    launch((routing.num_rows, programs), x, weights, routing.row_to_slot, out, hidden_size, x.stride(0))
    return out
