"""Grouped GEMMs of the backward pass that are not a forward GEMM with other operands.

`dh`: one product of the output gradient with w2^T gives, while the tile is in registers, the gradient of the
pre-activation, the weighted activation that dw2 needs, and the gradient of the routing weights, because
`<dO, A w2> = <dO w2^T, A>`. `dw`: weight gradients, a product of two row-major operands that is ragged in its
reduction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.activations import GATE_ACTIVATION, is_gated
from triton_moe.kernels.activation import act_fwd, load_pre, store_dpre
from triton_moe.kernels.bias import bias_dweights, row_block_place, sum_of_rows
from triton_moe.kernels.config import (
    BLOCK_M,
    LayoutTables,
    cdiv,
    divides_widths,
    input_precision,
    layout_tables,
    narrowed,
    rows_contiguous,
    tile_config,
)
from triton_moe.kernels.hopper import launch as hopper
from triton_moe.kernels.launch import Launcher
from triton_moe.kernels.tiles import (
    accumulate,
    accumulator,
    block_rows,
    expert_columns,
    piece_of,
    ragged_start,
    tile_dot,
)
from triton_moe.kernels.tuning import cached_launcher
from triton_moe.layout import RAGGED_ALIGNMENT, ExpertLayout, Routing


@triton.jit
def grouped_gemm_dh_kernel(
    dout, w2, pre, topk_weights, dpre, act_weighted, dweights_partial, dbias_partial, H, stride_dt, stride_ws,
    stride_wh, widths, offsets, row_to_slot, row_offsets, ragged_offsets, row_blocks, num_tiles_n, max_width,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr, ALIGNMENT: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The epilogue takes a tile's columns in PIECES, to spare registers."""
    PARTS: tl.constexpr = 2 if GATED else 1
    entry = row_blocks + 2 * (tl.program_id(0) // num_tiles_n)
    tile_n = tl.program_id(0) % num_tiles_n
    expert = tl.load(entry)
    if expert < 0:
        return
    width, pitch, offset = expert_columns(expert, widths, offsets, WIDTH_ALIGN)
    if tile_n * BLOCK_N >= width:
        return
    first_row, start, local, exists = block_rows(expert, tl.load(entry + 1), row_offsets, BLOCK_M)
    slots = tl.load(row_to_slot + first_row + local)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < width
    w_cols = w2 + (offset + cols) * stride_ws
    dact = accumulator(BLOCK_M, BLOCK_N, INPUT_PRECISION)
    dact, _ = tile_dot(
        dact, dact, dout + (slots // TOP_K).to(tl.int64) * stride_dt, w_cols, w_cols, col_mask, H, H, stride_wh,
        False, BLOCK_K, EVEN_K, EVEN_N, INPUT_PRECISION,
    )  # fmt: skip

    dact = dact.to(tl.float32)
    weight = tl.load(topk_weights + slots).to(tl.float32)[:, None]
    pre_start = ragged_start(pre, expert, start, pitch, ragged_offsets, PARTS, ALIGNMENT)
    dpre_start = ragged_start(dpre, expert, start, pitch, ragged_offsets, PARTS, ALIGNMENT)
    weighted_start = ragged_start(act_weighted, expert, start, pitch, ragged_offsets, 1, ALIGNMENT)
    dweight = tl.zeros([BLOCK_M], tl.float32)
    for piece in tl.static_range(PIECES):
        cols = tile_n * BLOCK_N + piece * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
        mask = exists[:, None] & (cols < pitch)[None, :]
        inner = local[:, None] * (PARTS * pitch) + cols[None, :]
        gate, up = load_pre(pre_start + inner, pitch, mask, GATED)
        act, dpiece = act_fwd(gate, ACTIVATION), piece_of(dact, piece, PIECES)
        dweight += tl.sum(dpiece * act * up, 1)
        weighted_ptrs = weighted_start + local[:, None] * pitch + cols[None, :]
        tl.store(weighted_ptrs, (weight * act * up).to(act_weighted.dtype.element_ty), mask=mask)
        dpre_ptrs = dpre_start + inner
        dgate, dup = store_dpre(dpre_ptrs, pitch, mask, gate, up, act, weight * dpiece, ACTIVATION, GATED)
        if dbias_partial is not None:
            place = row_block_place(expert, row_offsets, BLOCK_M) + tl.load(entry + 1)
            sums = dbias_partial + place * (PARTS * max_width) + cols
            tl.store(sums, sum_of_rows(dgate, exists, sums), mask=cols < width)
            if GATED:
                tl.store(sums + max_width, sum_of_rows(dup, exists, sums), mask=cols < width)
    slots = tl.load(row_to_slot + first_row + local)  # once more, for they would not stay in registers
    tl.store(dweights_partial + slots.to(tl.int64) * num_tiles_n + tile_n, dweight, mask=exists)


@triton.jit(do_not_specialize=["num_slots"])
def sum_partials_kernel(
    dweights_partial, of_bias, topk_ids, slot_to_row, widths, dweights, num_slots, num_tiles_n,
    BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """dweights[slot] = sum of its partial sums, one a tile of its expert's width, and what is `of_bias`, if that is not
    None; 0 where the slot has no row."""
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    owned = slots < num_slots
    owned = owned & (tl.load(slot_to_row + slots, mask=owned, other=-1) >= 0)
    width = tl.load(widths + tl.load(topk_ids + slots, mask=owned, other=0), mask=owned, other=0)
    total = tl.zeros([SLOTS], tl.float32)
    for tile_n in range(0, num_tiles_n):
        partials = dweights_partial + slots.to(tl.int64) * num_tiles_n + tile_n
        total += tl.load(partials, mask=tile_n * BLOCK_N < width, other=0)
    if of_bias is not None:
        total += tl.load(of_bias + slots, mask=owned, other=0)
    tl.store(dweights + slots, total.to(dweights.dtype.element_ty), mask=slots < num_slots)


@triton.jit
def rows_at(row_to_slot, first, place, count, GATHER: tl.constexpr, TOP_K: tl.constexpr):
    """Rows of x of an expert whose rows begin at `first`, at these places among them.

    Called an iteration ahead: if the pipeline loaded the indices too, what they point to would get half of its stages.
    """
    if GATHER:
        return tl.load(row_to_slot + first + place, mask=place < count, other=0) // TOP_K
    else:
        return first + place


@triton.jit
def grouped_gemm_dw_kernel(
    x, d, dw_first, dw_second, H, stride_xt, stride_wh, stride_ws,
    widths, offsets, row_to_slot, row_offsets, ragged_offsets, expert_order, num_tiles_m, num_tiles_n,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr, WANTED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, WIDTH_ALIGN: tl.constexpr, ALIGNMENT: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw_e[h, i] = sum over the expert's rows of x[row, h] * d[row, i]; an expert without rows gets zeros.

    x is dense, `(T, H)` gathered or `(R, H)`; d is ragged, of PARTS, and of WANTED of these, from FIRST on, there are
    gradients: one or two.
    """
    tile_n = tl.program_id(0) % num_tiles_n
    part = FIRST + tl.program_id(0) // num_tiles_n % WANTED
    tile_m = tl.program_id(0) // (num_tiles_n * WANTED) % num_tiles_m
    expert = tl.load(expert_order + tl.program_id(0) // (num_tiles_n * WANTED * num_tiles_m))
    width, pitch, offset = expert_columns(expert, widths, offsets, WIDTH_ALIGN)
    if tile_n * BLOCK_N >= width:
        return
    first = tl.load(row_offsets + expert)
    count = tl.load(row_offsets + expert + 1) - first
    hidden = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden_mask = hidden < H
    col_mask = cols < width
    d_cols = ragged_start(d, expert, 0, pitch, ragged_offsets, PARTS, ALIGNMENT) + part * pitch + cols
    acc = accumulator(BLOCK_M, BLOCK_N, INPUT_PRECISION)
    lost = tl.zeros_like(acc)
    place = tl.arange(0, BLOCK_K)
    rows = rows_at(row_to_slot, first, place, count, GATHER, TOP_K)
    for _ in range(0, count, BLOCK_K):
        exists = place < count
        x_mask = exists[:, None] if EVEN_M else exists[:, None] & hidden_mask[None, :]
        d_mask = exists[:, None] if EVEN_N else exists[:, None] & (cols < pitch)[None, :]
        x_tile = tl.load(x + rows.to(tl.int64)[:, None] * stride_xt + hidden[None, :], mask=x_mask, other=0)
        d_tile = tl.load(d_cols[None, :] + place.to(tl.int64)[:, None] * (PARTS * pitch), mask=d_mask, other=0)
        acc, lost = accumulate(acc, lost, tl.trans(x_tile), d_tile, INPUT_PRECISION)
        place += BLOCK_K
        rows = rows_at(row_to_slot, first, place, count, GATHER, TOP_K)
    offsets_w = hidden.to(tl.int64)[:, None] * stride_wh + ((offset + cols) * stride_ws)[None, :]
    mask = hidden_mask[:, None] & col_mask[None, :]
    if part == FIRST:
        tl.store(dw_first + offsets_w, acc.to(dw_first.dtype.element_ty), mask=mask)
    else:
        tl.store(dw_second + offsets_w, acc.to(dw_second.dtype.element_ty), mask=mask)


_SLOTS = 128
"""Slots a program of `sum_partials_kernel` sums for."""


_EPILOGUE_N = 64
"""Columns up to which dh holds a tile's pre-activation and gradient at once; wider tiles go in pieces of so many."""


_UNPIPELINED_N, _UNPIPELINED_WARPS = 128, 8
"""At most, where H is no multiple of 16: Triton loads single numbers then, into registers, of which more warps have
fewer."""


@cached_launcher
def _dh_launcher(
    layout: ExpertLayout, hidden_size: int, dtype: torch.dtype, device: torch.device, gated: bool, **options: Any
) -> tuple[Launcher, LayoutTables, int]:
    """-> launcher, the layout's tables, columns of a tile."""
    config = narrowed(tile_config("dh_gated" if gated else "dh", dtype, device), *layout.widths)
    if hidden_size % 16 and config.num_warps > _UNPIPELINED_WARPS:
        config = config._replace(BLOCK_N=min(config.BLOCK_N, _UNPIPELINED_N), num_warps=_UNPIPELINED_WARPS)
    tables = layout_tables(layout, device)
    launch = Launcher(
        grouped_gemm_dh_kernel, **options, GATED=gated, WIDTH_ALIGN=tables.width_align, ALIGNMENT=RAGGED_ALIGNMENT,
        EVEN_K=hidden_size % config.BLOCK_K == 0, EVEN_N=divides_widths(config.BLOCK_N, layout), BLOCK_M=BLOCK_M,
        PIECES=cdiv(config.BLOCK_N, _EPILOGUE_N), **config._asdict(),
    )  # fmt: skip
    return launch, tables, config.BLOCK_N


@functools.cache
def _sum_launcher(block_n: int) -> Launcher:
    return Launcher(sum_partials_kernel, BLOCK_N=block_n, SLOTS=_SLOTS)


def grouped_gemm_dh(
    dout: Tensor, w2: Tensor, pre: Tensor, topk_weights: Tensor, routing: Routing, activation: str, dpre: Tensor,
    b2: Tensor | None = None, dbias_partial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dout (T, H)`, `w2 (S, H)`, pre-activation (ragged), `topk_weights (T, K)` -> three gradients.

    That of the pre-activation goes to `dpre` (ragged, as `pre`, which it may be). Returns the weighted activation
    (ragged, one part) and the gradient of the routing weights `(T, K)` in their dtype, to which `b2 (E, H)` adds. Fills
    `dbias_partial` (`bias.up_bias_partials`).
    """
    dout, hidden_size, num_slots = rows_contiguous(dout), dout.shape[1], routing.num_rows
    topk_weights = topk_weights.contiguous()
    if routing.panels:
        assert b2 is dbias_partial is None
        launch, tables, block_n = None, layout_tables(routing.layout, pre.device), hopper.BLOCK_N
    else:
        launch, tables, block_n = _dh_launcher(
            routing.layout, hidden_size, pre.dtype, pre.device, is_gated(activation), TOP_K=routing.top_k,
            ACTIVATION=GATE_ACTIVATION.get(activation, activation),
            INPUT_PRECISION=input_precision(pre.dtype, pre.device),
        )  # fmt: skip
    num_tiles_n = cdiv(routing.layout.max_width, block_n)
    act_weighted = pre.new_empty(pre.numel() // 2 if is_gated(activation) else pre.numel())
    partial = torch.empty(num_slots * num_tiles_n, dtype=torch.float32, device=pre.device)
    dweights = torch.empty(topk_weights.shape, dtype=topk_weights.dtype, device=pre.device)
    if launch is None:
        hopper.dh(dout, w2, pre, topk_weights, routing, activation, dpre, act_weighted, partial)
    else:
        launch(
            (routing.num_row_blocks * num_tiles_n,), dout, w2, pre, topk_weights, dpre, act_weighted,
            partial, dbias_partial, hidden_size, dout.stride(0), *w2.stride(), tables.widths, tables.offsets,
            routing.row_to_slot, routing.row_offsets, routing.ragged_offsets, routing.row_blocks, num_tiles_n,
            routing.layout.max_width,
        )  # fmt: skip
    of_bias = None if b2 is None else bias_dweights(dout, b2, routing)
    _sum_launcher(block_n)(
        (cdiv(num_slots, _SLOTS),), partial, of_bias, routing.topk_ids.contiguous(), routing.slot_to_row, tables.widths,
        dweights, num_slots, num_tiles_n,
    )  # fmt: skip
    return act_weighted, dweights


@cached_launcher
def _dw_launcher(
    layout: ExpertLayout, hidden_size: int, dtype: torch.dtype, device: torch.device, wanted: int, **options: Any
) -> tuple[Launcher, LayoutTables, int, int]:
    """-> launcher, the layout's tables, row tiles and column tiles of the widest expert's gradient."""
    config = narrowed(tile_config("dw_pair" if wanted == 2 else "dw", dtype, device), *layout.widths)
    tables = layout_tables(layout, device)
    launch = Launcher(
        grouped_gemm_dw_kernel, WANTED=wanted, **options, WIDTH_ALIGN=tables.width_align, ALIGNMENT=RAGGED_ALIGNMENT,
        EVEN_M=hidden_size % BLOCK_M == 0, EVEN_N=divides_widths(config.BLOCK_N, layout), BLOCK_M=BLOCK_M,
        **config._asdict(),
    )  # fmt: skip
    return launch, tables, cdiv(hidden_size, BLOCK_M), cdiv(layout.max_width, config.BLOCK_N)


def grouped_gemm_dw(
    x: Tensor, d: Tensor, grads: Sequence[Tensor | None], routing: Routing, gathered: bool = True
) -> None:
    """Fill the gradients `x_e^T d_e (H, S)`, one for each part of the ragged `d`, but those that are None.

    x is `(T, H)`, or `(R, H)` in expert order if not `gathered`. The gradients have any strides (w2's is given
    transposed), two have the same.
    """
    x, hidden_size = rows_contiguous(x), x.shape[1]
    wanted = [grad for grad in grads if grad is not None]
    num_parts, first_part = len(grads), int(grads[0] is None)
    if routing.panels:
        assert gathered
        hopper.dw(x, d, wanted, routing, num_parts, first_part)
        return
    launch, tables, num_tiles_m, num_tiles_n = _dw_launcher(
        routing.layout, hidden_size, x.dtype, x.device, len(wanted), TOP_K=routing.top_k, GATHER=gathered,
        PARTS=num_parts, FIRST=first_part, INPUT_PRECISION=input_precision(x.dtype, x.device),
    )  # fmt: skip
    launch(
        (routing.layout.num_experts * num_tiles_m * len(wanted) * num_tiles_n,), x, d, wanted[0], wanted[-1],
        hidden_size, x.stride(0), *wanted[0].stride(), tables.widths, tables.offsets, routing.row_to_slot,
        routing.row_offsets, routing.ragged_offsets, routing.expert_order, num_tiles_m, num_tiles_n,
    )  # fmt: skip
