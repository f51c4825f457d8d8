"""Weights for wide loads: packed along S, an expert of odd width leaves its neighbour at an odd address."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.kernels.config import INTERPRETED, cdiv, divides_widths
from triton_moe.kernels.launch import Launcher
from triton_moe.layout import ROW_ALIGNMENT, ExpertLayout, Routing


@triton.jit
def transpose_kernel(w, out, H, S, stride_wh, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr):
    """out[s, h] = w[h, s], both contiguous along their second index."""
    across = tl.cdiv(H, BLOCK_H)
    h = (tl.program_id(0) % across * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    s = (tl.program_id(0) // across * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    mask = (h < H)[:, None] & (s < S)[None, :]
    tile = tl.load(w + h[:, None] * stride_wh + s[None, :], mask=mask, other=0)
    tl.store(out + s[:, None] * H + h[None, :], tl.trans(tile), mask=tl.trans(mask))


_BLOCK_H, _BLOCK_S = (16, 16) if INTERPRETED else (64, 128)
_ROWS_WORTH_A_COPY = 16
"""Rows an expert on average."""


@functools.cache
def _launcher() -> Launcher:
    return Launcher(transpose_kernel, BLOCK_H=_BLOCK_H, BLOCK_S=_BLOCK_S, num_warps=4)


def is_worth_a_copy(num_rows: int, layout: ExpertLayout) -> bool:
    """Whether rows are many enough for faster loads of the weights to make up for a copy of them."""
    return num_rows > _ROWS_WORTH_A_COPY * layout.num_experts


def transposed(w: Tensor) -> Tensor:
    """A copy of `w (H, S)`, whose rows are contiguous, with H contiguous instead."""
    hidden_size, total_width = w.shape
    out = torch.empty(total_width, hidden_size, dtype=w.dtype, device=w.device)
    num_programs = cdiv(hidden_size, _BLOCK_H) * cdiv(total_width, _BLOCK_S)
    _launcher()((num_programs,), w, out, hidden_size, total_width, w.stride(0))
    return out.t()


def loadable(w: Tensor, routing: Routing) -> Tensor:
    """`w (H, S)` itself, or a copy with H contiguous if experts start where no wide load can, and rows are many."""
    aligned = w.stride(1) != 1 or divides_widths(ROW_ALIGNMENT, routing.layout)
    return w if aligned or not is_worth_a_copy(routing.num_rows, routing.layout) else transposed(w)
