"""Grouped GEMMs of the backward pass: `dh`, whose product never leaves the registers, and `dw`, ragged in its
reduction. See `triton_moe.kernels.grouped_gemm_bwd` for the formulas."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_moe.kernels.activation import act_bwd, act_fwd
from triton_moe.kernels.hopper.grouped_gemm import locate, make_weights_ring, num_ragged_tiles, produce, ragged_rows
from triton_moe.kernels.hopper.pipeline import (
    BLOCK_K,
    HALF_M,
    PIECE_N,
    PRODUCER_THREADS,
    advance,
    async_copy,
    copy_elements,
    copy_rows,
    fence_async_shared,
    first_tile,
    halves,
    make_buffers,
    make_ring,
    make_schedule,
    mbarrier,
    multiply,
    next_tile,
    pieces,
    store_box,
    store_rows,
    tma,
    wide_layout,
)

DH_PIECE_N = gl.constexpr(32)
"""Columns that a consumer of dh finishes at a time: with more, its registers would not suffice."""


@gluon.jit
def finish_dh(
    operands,
    HALF: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, B_BY_K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    (ring, schedule, buffers, pre, topk_weights, dpre, act_weighted, dweights_partial, tables, row_to_slot,
     ragged_offsets, num_partials, H) = operands  # fmt: skip
    gate_in = buffers.index(4 * HALF)
    up_in = buffers.index(4 * HALF + 1)
    first_out = buffers.index(4 * HALF + 2)
    second_out = buffers.index(4 * HALF + 3)
    PARTS: gl.constexpr = 2 if GATED else 1
    stage = 0
    phase = 0
    turn = 0
    tile = first_tile(schedule)
    while tile >= 0:
        expert, width, _, first_row, start, num_rows, col = locate(tile, tables, None, BLOCK_M, BLOCK_N)
        first_row += HALF * HALF_M
        start += HALF * HALF_M
        num_rows -= HALF * HALF_M
        stride = PARTS * width
        pre_start = ragged_rows(pre, expert, start, width, ragged_offsets, PARTS) + col
        dpre_start = ragged_rows(dpre, expert, start, width, ragged_offsets, PARTS) + col
        weighted_start = ragged_rows(act_weighted, expert, start, width, ragged_offsets, 1) + col
        num_cols = gl.minimum(width - col, BLOCK_N)
        copy_rows(gate_in, pre_start, stride, num_rows, num_cols)
        if GATED:
            copy_rows(up_in, pre_start + width, stride, num_rows, num_cols)
        async_copy.commit_group()
        acc, stage, phase = multiply(
            ring, stage, phase, H // BLOCK_K, num_rows > 0, HALF, BLOCK_N, STAGES, True, B_BY_K
        )
        t0, t1, t2, t3 = pieces(acc)
        p0, p1 = halves(t0)
        p2, p3 = halves(t1)
        p4, p5 = halves(t2)
        p6, p7 = halves(t3)
        layout: gl.constexpr = p0.type.layout
        rows = gl.arange(0, HALF_M, layout=gl.SliceLayout(1, layout))
        exists = rows < num_rows
        slots = gl.load(row_to_slot + first_row + rows, mask=exists, other=0)
        weight = gl.load(topk_weights + slots, mask=exists, other=0).to(gl.float32)[:, None]
        dweights = gl.zeros((HALF_M,), gl.float32, gl.SliceLayout(1, layout))
        # A loop whose pieces move up by one: unrolled, the code would not fit into the instruction cache.
        for at in range(0, num_cols, DH_PIECE_N):
            async_copy.wait_group(0)
            gate = gate_in.load(layout).to(gl.float32)
            act = act_fwd(gate, ACTIVATION, True)
            slope = act_bwd(gate, ACTIVATION, True)
            up = up_in.load(layout).to(gl.float32) if GATED else 1.0
            after = pre_start + at + DH_PIECE_N
            cols_after = num_cols - at - DH_PIECE_N
            copy_rows(gate_in, after, stride, num_rows, cols_after)
            if GATED:
                copy_rows(up_in, after + width, stride, num_rows, cols_after)
            async_copy.commit_group()
            product = act * up
            dweights += gl.sum(p0 * product, axis=1)
            store_rows(first_out, product * weight, weighted_start + at, width, num_rows, DH_PIECE_N)
            dproduct = p0 * weight
            if GATED:
                store_rows(second_out, dproduct * act, dpre_start + width + at, stride, num_rows, DH_PIECE_N)
            dgate = dproduct * up * slope
            store_rows(first_out, dgate, dpre_start + at, stride, num_rows, DH_PIECE_N)
            p0, p1, p2, p3, p4, p5, p6 = p1, p2, p3, p4, p5, p6, p7
        async_copy.wait_group(0)
        # Loaded again: kept, they would cost registers.
        slots = gl.load(row_to_slot + first_row + rows, mask=exists, other=0)
        partials = dweights_partial + slots.to(gl.int64) * num_partials + col // BLOCK_N
        gl.store(partials, dweights, mask=exists)
        tile = next_tile(schedule, turn)
        turn += 1


@gluon.jit
def grouped_gemm_dh_hopper_kernel(
    dout, w2, pre, topk_weights, dpre, act_weighted, dweights_partial, widths, offsets, row_offsets, numbers, tiles,
    row_to_slot, ragged_offsets, H, stride_dt, num_partials,
    TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, B_BY_K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    ring = make_weights_ring(dout.dtype.element_ty, B_BY_K, BLOCK_M, BLOCK_N, STAGES)
    buffers = make_buffers(dout.dtype.element_ty, 8, DH_PIECE_N)
    schedule = make_schedule(numbers + 3, num_ragged_tiles(numbers, BLOCK_N))
    tables = (widths, offsets, row_offsets, tiles)
    consumer = (
        ring, schedule, buffers, pre, topk_weights, dpre, act_weighted, dweights_partial, tables, row_to_slot,
        ragged_offsets, num_partials, H,
    )  # fmt: skip
    producer = (ring, schedule, dout, w2, w2, tables, row_to_slot, ragged_offsets, None, H, stride_dt)
    gl.warp_specialize(
        [
            (finish_dh, (consumer, 0, ACTIVATION, GATED, B_BY_K, BLOCK_M, BLOCK_N, STAGES)),
            (finish_dh, (consumer, 1, ACTIVATION, GATED, B_BY_K, BLOCK_M, BLOCK_N, STAGES)),
            (produce, (producer, False, 1, TOP_K, B_BY_K, BLOCK_M, BLOCK_N, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def locate_dw(
    tile, tables, num_tiles_h, PARTS: gl.constexpr, RAGGED_M: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """-> a tile's expert, its width, first column in the packed weights, first row, rows, and the tile's place in the
    hidden dimension and in the expert's parts. Along the former there are `num_tiles_h` tiles."""
    widths, offsets, row_offsets, parts = tables
    entry = parts + 2 * (tile // num_tiles_h // (PARTS if RAGGED_M else 1))
    expert = gl.load(entry)
    part = gl.load(entry + 1)
    if RAGGED_M:  # an entry's BLOCK_M columns are as many tiles as there are parts
        inner = (part * PARTS + tile // num_tiles_h % PARTS) * BLOCK_M
        hidden = tile % num_tiles_h * BLOCK_N
    else:
        inner = part * BLOCK_N
        hidden = tile % num_tiles_h * BLOCK_M
    width = gl.multiple_of(gl.load(widths + expert), 64)
    first_row = gl.load(row_offsets + expert)
    num_rows = gl.load(row_offsets + expert + 1) - first_row
    return expert, width, gl.load(offsets + expert), first_row, num_rows, hidden, inner


@gluon.jit
def slots_of(row_to_slot, first_row, rows, start, num_rows):
    """Slots of an expert's rows from `start`; anything past the last."""
    return gl.load(row_to_slot + first_row + start + rows, mask=start + rows < num_rows, other=0)


@gluon.jit
def produce_dw(
    operands,
    PARTS: gl.constexpr, RAGGED_M: gl.constexpr, TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ring, x, d, tables, row_to_slot, ragged_offsets, num_tiles, num_tiles_h, H, stride_xt = operands
    a_tiles, b_tiles, ready, empty = ring
    X_COLUMNS: gl.constexpr = BLOCK_N if RAGGED_M else BLOCK_M
    D_COLUMNS: gl.constexpr = BLOCK_M if RAGGED_M else BLOCK_N
    x_layout: gl.constexpr = wide_layout(X_COLUMNS)
    d_layout: gl.constexpr = wide_layout(D_COLUMNS)
    x_rows = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, x_layout))
    x_cols = gl.arange(0, X_COLUMNS, layout=gl.SliceLayout(0, x_layout))
    d_rows = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, d_layout))
    d_cols = gl.arange(0, D_COLUMNS, layout=gl.SliceLayout(0, d_layout))
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, width, _, first_row, num_rows, hidden, inner = locate_dw(
            tile, tables, num_tiles_h, PARTS, RAGGED_M, BLOCK_M, BLOCK_N
        )
        x_inside = (x_cols // 8 < (H - hidden) // 8)[None, :]
        d_inside = (d_cols // 8 < (PARTS * width - inner) // 8)[None, :]
        d_start = d + PARTS * gl.load(ragged_offsets + expert) + inner
        # Asked for two steps ahead and before the wait for a stage: the producer must not wait for these as well.
        slots = slots_of(row_to_slot, first_row, x_rows, 0, num_rows)
        following = slots_of(row_to_slot, first_row, x_rows, BLOCK_K, num_rows)
        for step in range(gl.cdiv(num_rows, BLOCK_K)):
            after = slots_of(row_to_slot, first_row, x_rows, (step + 2) * BLOCK_K, num_rows)
            rows_left = num_rows - step * BLOCK_K
            x_ptrs = x + hidden + ((slots // TOP_K).to(gl.int64) * stride_xt)[:, None] + x_cols[None, :]
            x_ptrs = gl.max_contiguous(gl.multiple_of(x_ptrs, [1, 16]), [1, 8])  # in bytes, in elements
            d_ptrs = d_start + (d_rows * (PARTS * width))[:, None] + d_cols[None, :]
            d_ptrs = gl.max_contiguous(gl.multiple_of(d_ptrs, [1, 16]), [1, 8])
            x_mask = (x_rows < rows_left)[:, None] & x_inside
            d_mask = (d_rows < rows_left)[:, None] & d_inside
            mbarrier.wait(empty.index(stage), phase)
            if RAGGED_M:
                copy_elements(a_tiles.index(stage), d_ptrs, d_mask)
                copy_elements(b_tiles.index(stage), x_ptrs, x_mask)
            else:
                copy_elements(a_tiles.index(stage), x_ptrs, x_mask)
                copy_elements(b_tiles.index(stage), d_ptrs, d_mask)
            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
            d_start += BLOCK_K * PARTS * width.to(gl.int64)
            slots = following
            following = after
            stage, phase = advance(stage, phase, STAGES)
    async_copy.wait_group(0)


@gluon.jit
def finish_dw(
    operands,
    HALF: gl.constexpr, PARTS: gl.constexpr, RAGGED_M: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ring, buffers, dw, dw_up, tables, num_tiles, num_tiles_h, H = operands
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, width, offset, _, num_rows, hidden, inner = locate_dw(
            tile, tables, num_tiles_h, PARTS, RAGGED_M, BLOCK_M, BLOCK_N
        )
        if RAGGED_M:
            inner += HALF * HALF_M
            inside = inner < PARTS * width
        else:
            hidden += HALF * HALF_M
            inside = hidden < H
        acc, stage, phase = multiply(
            ring, stage, phase, gl.cdiv(num_rows, BLOCK_K), inside, HALF, BLOCK_N, STAGES, False, False
        )
        tiles = pieces(acc)
        for p in gl.static_range(BLOCK_N // PIECE_N):
            if inside & (inner < PARTS * width):
                buffer = buffers.index(2 * HALF + p % 2)
                tma.store_wait(pendings=1 if p > 0 else 0)  # the tile before may have stored an odd number of pieces
                buffer.store(tiles[p].to(buffer.dtype))
                fence_async_shared()
                if inner < width:
                    store_piece(dw, buffer, hidden, offset + inner, RAGGED_M)
                else:
                    store_piece(dw_up, buffer, hidden, offset + inner - width, RAGGED_M)
            if RAGGED_M:
                hidden += PIECE_N
            else:
                inner += PIECE_N
    tma.store_wait(pendings=0)


@gluon.jit
def store_piece(dw, buffer, hidden, column, RAGGED_M: gl.constexpr):
    """Start storing a piece of a weight gradient, as it lies in memory; what sticks out of H is left out."""
    if RAGGED_M:
        store_box(dw, [column, hidden], buffer)
    else:
        store_box(dw, [hidden, column], buffer)


@gluon.jit
def grouped_gemm_dw_hopper_kernel(
    x, d, dw, dw_up, widths, offsets, row_offsets, tiles, row_to_slot, ragged_offsets, H, stride_xt,
    num_tiles, num_tiles_h,
    PARTS: gl.constexpr, RAGGED_M: gl.constexpr, TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    ring = make_ring(x.dtype.element_ty, BLOCK_K, BLOCK_M, BLOCK_K, BLOCK_N, STAGES, PRODUCER_THREADS)
    buffers = make_buffers(x.dtype.element_ty, 4, PIECE_N)
    tables = (widths, offsets, row_offsets, tiles)
    consumer = (ring, buffers, dw, dw_up, tables, num_tiles, num_tiles_h, H)
    producer = (ring, x, d, tables, row_to_slot, ragged_offsets, num_tiles, num_tiles_h, H, stride_xt)
    gl.warp_specialize(
        [
            (finish_dw, (consumer, 0, PARTS, RAGGED_M, BLOCK_M, BLOCK_N, STAGES)),
            (finish_dw, (consumer, 1, PARTS, RAGGED_M, BLOCK_M, BLOCK_N, STAGES)),
            (produce_dw, (producer, PARTS, RAGGED_M, TOP_K, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
