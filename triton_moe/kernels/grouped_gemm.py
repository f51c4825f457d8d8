"""Grouped GEMMs over the routed rows, forward: up `(R, H) x (H, I_e)` and down `(R, I_e) x (I_e, H)`.

One program computes one tile: its row block names the expert, and two prefix sums say where that expert's rows and its
block of the ragged buffer are. Programs are numbered with the column fastest, so that those that share rows run
together; a program past its expert's width has nothing to do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.activations import GATE_ACTIVATION
from triton_moe.kernels.activation import act_fwd
from triton_moe.kernels.config import (
    LayoutTables,
    cdiv,
    divides_widths,
    input_precision,
    layout_tables,
    narrowed,
    rows_contiguous,
    tile_config,
    with_strides_of,
)
from triton_moe.kernels.hopper import launch as hopper
from triton_moe.kernels.launch import Launcher
from triton_moe.kernels.tiles import accumulator, block_rows, chained_dot, expert_columns, ragged_start, tile_dot
from triton_moe.kernels.transpose import loadable
from triton_moe.kernels.tuning import cached_launcher
from triton_moe.layout import RAGGED_ALIGNMENT, ExpertLayout, Routing


@triton.jit
def grouped_gemm_up_fwd_kernel(
    x, w1, w3, b1, b3, pre, out, H, stride_xt, stride_wh, stride_ws,
    widths, offsets, row_to_slot, row_offsets, ragged_offsets, row_blocks, num_tiles_n,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, WIDTH_ALIGN: tl.constexpr, ALIGNMENT: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 2 if GATED else 1
    entry = row_blocks + 2 * (tl.program_id(0) // num_tiles_n)
    expert = tl.load(entry)
    first_col = tl.program_id(0) % num_tiles_n * BLOCK_N
    if expert < 0:
        return
    width, pitch, offset = expert_columns(expert, widths, offsets, WIDTH_ALIGN)
    if first_col >= width:
        return
    first_row, start, local, exists = block_rows(expert, tl.load(entry + 1), row_offsets, BLOCK_M)
    rows = first_row + local
    if GATHER:
        rows = tl.load(row_to_slot + rows) // TOP_K
    cols = first_col + tl.arange(0, BLOCK_N)
    col_mask = cols < width
    w_cols = (offset + cols) * stride_ws
    gate = accumulator(BLOCK_M, BLOCK_N, INPUT_PRECISION)
    gate, up = tile_dot(
        gate, gate, x + rows.to(tl.int64) * stride_xt, w1 + w_cols, w3 + w_cols, col_mask, H, H, stride_wh,
        GATED, BLOCK_K, EVEN_K, EVEN_N, INPUT_PRECISION,
    )  # fmt: skip

    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if b1 is not None:
        gate += tl.load(b1 + offset + cols, mask=col_mask, other=0).to(tl.float32)[None, :]
    if b3 is not None:
        up += tl.load(b3 + offset + cols, mask=col_mask, other=0).to(tl.float32)[None, :]
    mask = exists[:, None] & (cols < pitch)[None, :]
    element = x.dtype.element_ty
    if pre is not None:
        pre_ptrs = ragged_start(pre, expert, start, pitch, ragged_offsets, PARTS, ALIGNMENT)
        pre_ptrs += local[:, None] * (PARTS * pitch) + cols[None, :]
        tl.store(pre_ptrs, gate.to(element), mask=mask)
        if GATED:
            tl.store(pre_ptrs + pitch, up.to(element), mask=mask)
    if out is not None:
        act = act_fwd(gate, ACTIVATION)
        if GATED:
            act *= up
        out_ptrs = ragged_start(out, expert, start, pitch, ragged_offsets, 1, ALIGNMENT)
        out_ptrs += local[:, None] * pitch + cols[None, :]
        tl.store(out_ptrs, act.to(element), mask=mask)


@triton.jit
def grouped_gemm_down_fwd_kernel(
    a, w, w_up, b, y, H, stride_ws, stride_wh,
    widths, offsets, row_offsets, ragged_offsets, row_blocks, num_tiles_n,
    PARTS: tl.constexpr, FINITE: tl.constexpr, INPUT_PRECISION: tl.constexpr, WIDTH_ALIGN: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = a w_e, with two parts a_gate w_e + a_up w_up_e, plus b_e if there is a b `(E, H)`. FINITE: so is a past the
    width, and loads may go there."""
    entry = row_blocks + 2 * (tl.program_id(0) // num_tiles_n)
    expert = tl.load(entry)
    if expert < 0:
        return
    width, pitch, offset = expert_columns(expert, widths, offsets, WIDTH_ALIGN)
    first_row, start, local, exists = block_rows(expert, tl.load(entry + 1), row_offsets, BLOCK_M)
    cols = tl.program_id(0) % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < H
    a_rows = ragged_start(a, expert, start, pitch, ragged_offsets, PARTS, ALIGNMENT) + local * (PARTS * pitch)
    w_cols = offset * stride_ws + cols.to(tl.int64) * stride_wh
    a_size = pitch if FINITE else width
    acc = accumulator(BLOCK_M, BLOCK_N, INPUT_PRECISION)
    if PARTS == 2:
        acc = chained_dot(
            acc, a_rows, pitch, w, w_up, w_cols, col_mask, width, a_size, stride_ws,
            BLOCK_K, EVEN_K, EVEN_N, INPUT_PRECISION,
        )  # fmt: skip
    else:
        acc, _ = tile_dot(
            acc, acc, a_rows, w + w_cols, w + w_cols, col_mask, width, a_size, stride_ws,
            False, BLOCK_K, EVEN_K, EVEN_N, INPUT_PRECISION,
        )  # fmt: skip
    acc = acc.to(tl.float32)
    if b is not None:
        acc += tl.load(b + expert.to(tl.int64) * H + cols, mask=col_mask, other=0).to(tl.float32)[None, :]
    y_ptrs = y + first_row.to(tl.int64) * H + local[:, None] * H + cols[None, :]
    tl.store(y_ptrs, acc.to(y.dtype.element_ty), mask=exists[:, None] & col_mask[None, :])


@cached_launcher
def _up_launcher(
    layout: ExpertLayout, hidden_size: int, dtype: torch.dtype, device: torch.device, block_m: int, gated: bool,
    **options: Any,
) -> tuple[Launcher, LayoutTables, int]:  # fmt: skip
    """-> launcher, the layout's tables, column tiles of the widest expert."""
    config, tables = tile_config("up_gated" if gated else "up", dtype, device, block_m), layout_tables(layout, device)
    launch = Launcher(
        grouped_gemm_up_fwd_kernel, **options, GATED=gated, WIDTH_ALIGN=tables.width_align, ALIGNMENT=RAGGED_ALIGNMENT,
        EVEN_K=hidden_size % config.BLOCK_K == 0, EVEN_N=divides_widths(config.BLOCK_N, layout), BLOCK_M=block_m,
        **config._asdict(),
    )  # fmt: skip
    return launch, tables, cdiv(layout.max_width, config.BLOCK_N)


def grouped_gemm_up_fwd(
    x: Tensor, w1: Tensor, w3: Tensor | None, out: Tensor | None, pre: Tensor | None, routing: Routing,
    activation: str, gathered: bool = True, b1: Tensor | None = None, b3: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the ragged buffers `out` (activation) and `pre` (pre-activation) of every routed row, either unless None.

    x is `(T, H)`, or `(R, H)` in expert order if not `gathered`; w1 and w3 `(H, S)` of any strides; b1 and b3 `(S)`.
    """
    if routing.panels:
        assert gathered
        assert b1 is b3 is None
        hopper.up_fwd(x, w1, w3, out, pre, routing, activation)
        return
    x, hidden_size = rows_contiguous(x), x.shape[1]
    w1 = loadable(w1, routing)
    w3 = None if w3 is None else with_strides_of(loadable(w3, routing), w1)
    b1, b3 = (None if b is None else b.contiguous() for b in (b1, b3))
    launch, tables, num_tiles_n = _up_launcher(
        routing.layout, hidden_size, x.dtype, x.device, routing.block_m, w3 is not None, TOP_K=routing.top_k,
        GATHER=gathered, ACTIVATION=GATE_ACTIVATION.get(activation, activation),
        INPUT_PRECISION=input_precision(x.dtype, x.device),
    )  # fmt: skip
    launch(
        (routing.num_row_blocks * num_tiles_n,), x, w1, w1 if w3 is None else w3, b1, b3, pre, out,
        hidden_size, x.stride(0), *w1.stride(), tables.widths, tables.offsets, routing.row_to_slot, routing.row_offsets,
        routing.ragged_offsets, routing.row_blocks, num_tiles_n,
    )  # fmt: skip


@cached_launcher
def _down_launcher(
    layout: ExpertLayout, hidden_size: int, dtype: torch.dtype, device: torch.device, block_m: int, **options: Any
) -> tuple[Launcher, LayoutTables, int]:
    """-> launcher, the layout's tables, column tiles of a row."""
    config = narrowed(tile_config("down", dtype, device, block_m), hidden_size)
    tables = layout_tables(layout, device)
    launch = Launcher(
        grouped_gemm_down_fwd_kernel, **options, WIDTH_ALIGN=tables.width_align, ALIGNMENT=RAGGED_ALIGNMENT,
        EVEN_K=divides_widths(config.BLOCK_K, layout), EVEN_N=hidden_size % config.BLOCK_N == 0, BLOCK_M=block_m,
        **config._asdict(),
    )  # fmt: skip
    return launch, tables, cdiv(hidden_size, config.BLOCK_N)


def grouped_gemm_down_fwd(
    a: Tensor, w: Tensor, w_up: Tensor | None, y: Tensor, routing: Routing, finite: bool = True,
    b: Tensor | None = None,
) -> None:  # fmt: skip
    """`y (R, H)` = a w of every routed row, plus `b (E, H)`; with `w_up` a has two parts, `y = a_gate w + a_up w_up`.

    a is a ragged buffer, w and w_up `(S, H)` of any strides (w1 and w3 transposed give the gradient of x's rows).
    `finite`: what a holds past the widths is what `up` or `dh` left there, zeros; loads are wider then.
    """
    if routing.panels:
        assert finite
        assert b is None
        hopper.down_fwd(a, w, w_up, y, routing)
        return
    hidden_size = w.shape[1]
    w = loadable(w.t(), routing).t()
    w_up = None if w_up is None else with_strides_of(loadable(w_up.t(), routing).t(), w)
    b = None if b is None else b.contiguous()
    launch, tables, num_tiles_n = _down_launcher(
        routing.layout, hidden_size, a.dtype, a.device, routing.block_m, PARTS=1 if w_up is None else 2, FINITE=finite,
        INPUT_PRECISION=input_precision(a.dtype, a.device),
    )  # fmt: skip
    launch(
        (routing.num_row_blocks * num_tiles_n,), a, w, w if w_up is None else w_up, b, y, hidden_size, *w.stride(),
        tables.widths, tables.offsets, routing.row_offsets, routing.ragged_offsets, routing.row_blocks, num_tiles_n,
    )  # fmt: skip
