"""Gradients of the experts' biases: sums over the rows of an expert, and the routing weights' share of b2.

b1 and b3 are summed from the gradient of the pre-activation, over each row block where that is computed and not yet
rounded, b2 from the rows of the output gradient. A program sums one tile of columns over all of its expert, in a fixed
order; in fp32, but fp32 itself in fp64: what cancels is one number, and an error of it shows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.kernels.config import BLOCK_M, INTERPRETED, LayoutTables, cdiv, layout_tables, rows_contiguous
from triton_moe.kernels.gather import launcher_over_hidden
from triton_moe.kernels.launch import Launcher
from triton_moe.kernels.tiles import expert_columns
from triton_moe.layout import ExpertLayout, Routing

_ROWS, _COLUMNS = (16, 16) if INTERPRETED else (64, 64)
"""Of the block that a program adds to its sums at once."""
_BLOCKS = 16
"""Row blocks that a program adds to its sums at once."""


@triton.jit
def expert_rows(expert, row_offsets):
    """An expert's first row and their number."""
    first = tl.load(row_offsets + expert)
    return first, tl.load(row_offsets + expert + 1) - first


@triton.jit
def row_block_place(expert, row_offsets, BLOCK_M: tl.constexpr):
    """Place of an expert's first row block among all (int64), of which some stay free: no two experts share one."""
    return (tl.load(row_offsets + expert) // BLOCK_M + expert).to(tl.int64)


@triton.jit
def sum_of_rows(tile, exists, sums):
    """Sum of a tile's rows that exist, in the precision of where it goes."""
    return tl.sum(tl.where(exists[:, None], tile, 0.0).to(sums.dtype.element_ty), 0)


@triton.jit
def up_bias_bwd_kernel(
    partial, db, db_up, widths, offsets, row_offsets, num_tiles_n, max_width,
    PARTS: tl.constexpr, WIDTH_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """db_e[i] = sum over the expert's row blocks of partial[block, 0, i], the second part's in db_up; either is None if
    it is not needed."""
    tile_n = tl.program_id(0) % num_tiles_n
    expert = tl.program_id(0) // num_tiles_n
    width, _, offset = expert_columns(expert, widths, offsets, WIDTH_ALIGN)
    if tile_n * COLUMNS >= width:
        return
    _, count = expert_rows(expert, row_offsets)
    cols = tile_n * COLUMNS + tl.arange(0, COLUMNS)
    col_mask = cols < width
    sums = partial + row_block_place(expert, row_offsets, BLOCK_M) * (PARTS * max_width) + cols
    total = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    total_up = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    num_blocks = tl.cdiv(count, BLOCK_M)
    for first in range(0, num_blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        mask = (block < num_blocks)[:, None] & col_mask[None, :]
        ptrs = sums[None, :] + block.to(tl.int64)[:, None] * (PARTS * max_width)
        if db is not None:
            total += tl.load(ptrs, mask=mask, other=0)
        if db_up is not None:
            total_up += tl.load(ptrs + max_width, mask=mask, other=0)
    if db is not None:
        tl.store(db + offset + cols, tl.sum(total, 0).to(db.dtype.element_ty), mask=col_mask)
    if db_up is not None:
        tl.store(db_up + offset + cols, tl.sum(total_up, 0).to(db_up.dtype.element_ty), mask=col_mask)


@triton.jit
def down_bias_bwd_kernel(
    dout, topk_weights, db, H, stride_dt, row_to_slot, row_offsets, num_tiles_n,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """db[e, h] = sum over the expert's rows of its slot's weight * dout[token, h], of fp32 in fp64."""
    WIDE: tl.constexpr = tl.float64 if dout.dtype.element_ty == tl.float32 else tl.float32
    expert = tl.program_id(0) // num_tiles_n
    cols = tl.program_id(0) % num_tiles_n * COLUMNS + tl.arange(0, COLUMNS)
    first, count = expert_rows(expert, row_offsets)
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    for k in range(0, count, ROWS):
        place = k + tl.arange(0, ROWS)
        exists = place < count
        slots = tl.load(row_to_slot + first + place, mask=exists, other=0)
        weight = tl.load(topk_weights + slots, mask=exists, other=0).to(WIDE)
        d_ptrs = dout + (slots // TOP_K).to(tl.int64)[:, None] * stride_dt + cols[None, :]
        total += weight[:, None] * tl.load(d_ptrs, mask=exists[:, None] & (cols < H)[None, :], other=0).to(WIDE)
    tl.store(db + expert.to(tl.int64) * H + cols, tl.sum(total, 0).to(db.dtype.element_ty), mask=cols < H)


@triton.jit
def bias_dweights_kernel(
    dout, b2, topk_ids, slot_to_row, partial, H, stride_dt, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """partial[slot] = <dout[token], b2[expert]> in fp32; 0 where the slot has no row."""
    slot = tl.program_id(0)
    has_row = tl.load(slot_to_row + slot) >= 0
    expert = tl.load(topk_ids + slot, mask=has_row, other=0).to(tl.int64)
    size = tl.where(has_row, H, 0)
    total = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, size, BLOCK_H):
        cols = first + tl.arange(0, BLOCK_H)
        d = tl.load(dout + (slot // TOP_K).to(tl.int64) * stride_dt + cols, mask=cols < size, other=0).to(tl.float32)
        total += d * tl.load(b2 + expert * H + cols, mask=cols < size, other=0).to(tl.float32)
    tl.store(partial + slot, tl.sum(total))


@functools.lru_cache(maxsize=256)
def _up_launcher(layout: ExpertLayout, device: torch.device, parts: int) -> tuple[Launcher, LayoutTables]:
    tables = layout_tables(layout, device)
    launch = Launcher(
        up_bias_bwd_kernel, PARTS=parts, WIDTH_ALIGN=tables.width_align, BLOCK_M=BLOCK_M, ROWS=_BLOCKS,
        COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return launch, tables


@functools.cache
def _down_launcher(top_k: int) -> Launcher:
    options: dict[str, Any] = {"TOP_K": top_k, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": 4}
    return Launcher(down_bias_bwd_kernel, **options)


def up_bias_partials(routing: Routing, parts: int, dtype: torch.dtype) -> Tensor:
    """Room for what `grouped_gemm_dh` sums of the pre-activation's gradient before it is rounded to `dtype`:
    `(blocks, parts, max width)`, a sum over each row block; fp32, or fp64 for fp32, whose own sums cancel too soon."""
    layout = routing.layout
    blocks = routing.num_rows // BLOCK_M + layout.num_experts
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    return torch.empty(blocks * parts * layout.max_width, dtype=wide, device=routing.topk_ids.device)


def up_bias_bwd(
    partial: Tensor, routing: Routing, parts: int, dtype: torch.dtype, need: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of the pre-activation's gradient (`up_bias_partials`) -> gradients of b1 and b3 `(S)`, as far as they are
    needed, of `dtype`."""
    layout = routing.layout
    db, db_up = (partial.new_empty(layout.total_width, dtype=dtype) if needed else None for needed in (need, need_up))
    launch, tables = _up_launcher(layout, partial.device, parts)
    num_tiles_n = cdiv(layout.max_width, _COLUMNS)
    launch(
        (layout.num_experts * num_tiles_n,), partial, db, db_up, tables.widths, tables.offsets, routing.row_offsets,
        num_tiles_n, layout.max_width,
    )  # fmt: skip
    return db, db_up


def down_bias_bwd(dout: Tensor, topk_weights: Tensor, routing: Routing) -> Tensor:
    """`dout (T, H)`, `topk_weights (T, K)` -> gradient of b2, `(E, H)` in dout's dtype."""
    dout, hidden_size, num_experts = rows_contiguous(dout), dout.shape[1], routing.layout.num_experts
    db = dout.new_empty(num_experts, hidden_size)
    num_tiles_n = cdiv(hidden_size, _COLUMNS)
    _down_launcher(routing.top_k)(
        (num_experts * num_tiles_n,), dout, topk_weights.contiguous(), db, hidden_size, dout.stride(0),
        routing.row_to_slot, routing.row_offsets, num_tiles_n,
    )  # fmt: skip
    return db


def bias_dweights(dout: Tensor, b2: Tensor, routing: Routing) -> Tensor:
    """`dout (T, H)`, `b2 (E, H)` -> what b2 adds to the gradient of the routing weights, `(R)` fp32."""
    dout, hidden_size = rows_contiguous(dout), dout.shape[1]
    partial = torch.empty(routing.num_rows, dtype=torch.float32, device=dout.device)
    launch, _ = launcher_over_hidden(bias_dweights_kernel, hidden_size, TOP_K=routing.top_k)
    launch(
        (routing.num_rows,), dout, b2.contiguous(), routing.topk_ids.contiguous(), routing.slot_to_row, partial,
        hidden_size, dout.stride(0),
    )  # fmt: skip
    return partial
