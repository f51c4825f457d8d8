"""Grouped GEMMs of the backward pass: `dh`, whose product never leaves the registers, and `dw`, ragged in its
reduction. See `triton_moe.kernels.grouped_gemm_bwd` for the formulas."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_moe.kernels.activation import act_bwd, act_fwd
from triton_moe.kernels.hopper.grouped_gemm import (
    locate,
    make_weights_ring,
    num_ragged_tiles,
    produce,
    ragged_rows,
    row_stride,
)
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
    within,
)

DH_PIECE_N = gl.constexpr(32)
"""Columns that a consumer of dh finishes at a time: with more, its registers would not suffice."""


@gluon.jit
def finish_dh(
    operands,
    HALF: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr,
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
        expert, width, _, first_row, start, num_rows, col = locate(tile, tables, None, BLOCK_M, BLOCK_N, EVEN)
        pitch = row_stride(width, EVEN)
        first_row += HALF * HALF_M
        start += HALF * HALF_M
        num_rows -= HALF * HALF_M
        stride = PARTS * pitch
        pre_start = ragged_rows(pre, expert, start, pitch, ragged_offsets, PARTS) + col
        dpre_start = ragged_rows(dpre, expert, start, pitch, ragged_offsets, PARTS) + col
        weighted_start = ragged_rows(act_weighted, expert, start, pitch, ragged_offsets, 1) + col
        num_cols = gl.minimum(pitch - col, BLOCK_N)
        copy_rows(gate_in, pre_start, stride, num_rows, num_cols)
        if GATED:
            copy_rows(up_in, pre_start + pitch, stride, num_rows, num_cols)
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
                copy_rows(up_in, after + pitch, stride, num_rows, cols_after)
            async_copy.commit_group()
            if not EVEN and not GATED:  # past the width a gated gradient is 0, as pre-activation and activation are
                p0 = within(p0, width - col - at)
            cols = DH_PIECE_N if EVEN else num_cols - at
            product = act * up
            dweights += gl.sum(p0 * product, axis=1)
            store_rows(first_out, product * weight, weighted_start + at, pitch, num_rows, cols)
            dproduct = p0 * weight
            if GATED:
                store_rows(second_out, dproduct * act, dpre_start + pitch + at, stride, num_rows, cols)
            dgate = dproduct * up * slope
            store_rows(first_out, dgate, dpre_start + at, stride, num_rows, cols)
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
    TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr,
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
            (finish_dh, (consumer, 0, ACTIVATION, GATED, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (finish_dh, (consumer, 1, ACTIVATION, GATED, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (produce, (producer, False, 1, TOP_K, B_BY_K, EVEN, BLOCK_M, BLOCK_N, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def part_span(width, EVEN: gl.constexpr):
    """Columns that a part has among an expert's tiles: a piece is never of two parts."""
    return width if EVEN else gl.cdiv(width, PIECE_N) * PIECE_N


@gluon.jit
def locate_dw(
    tile, tables, num_tiles_h, PARTS: gl.constexpr, RAGGED_M: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """-> a tile's expert, its width, first column in the packed weights, first row, rows, and the tile's place in the
    hidden dimension and in the expert's parts (`part_span`). Along the former there are `num_tiles_h` tiles."""
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
    width = gl.load(widths + expert)
    if EVEN:
        width = gl.multiple_of(width, 64)
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
    PARTS: gl.constexpr, RAGGED_M: gl.constexpr, TOP_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
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
            tile, tables, num_tiles_h, PARTS, RAGGED_M, EVEN, BLOCK_M, BLOCK_N
        )
        pitch = row_stride(width, EVEN)
        x_inside = (x_cols // 8 < (H - hidden) // 8)[None, :]
        d_start = d + PARTS * gl.load(ragged_offsets + expert)
        if EVEN:
            d_inside = (d_cols // 8 < (PARTS * width - inner) // 8)[None, :]
            d_start += inner
            d_places = d_cols
        else:
            eighths = part_span(width, EVEN) // 8
            eighth = inner // 8 + d_cols // 8
            part = eighth // eighths
            in_part = eighth - part * eighths
            d_inside = ((in_part < pitch // 8) & (part < PARTS))[None, :]
            d_places = part * pitch + in_part * 8 + d_cols % 8
        # Asked for two steps ahead and before the wait for a stage: the producer must not wait for these as well.
        slots = slots_of(row_to_slot, first_row, x_rows, 0, num_rows)
        following = slots_of(row_to_slot, first_row, x_rows, BLOCK_K, num_rows)
        for step in range(gl.cdiv(num_rows, BLOCK_K)):
            after = slots_of(row_to_slot, first_row, x_rows, (step + 2) * BLOCK_K, num_rows)
            rows_left = num_rows - step * BLOCK_K
            x_ptrs = x + hidden + ((slots // TOP_K).to(gl.int64) * stride_xt)[:, None] + x_cols[None, :]
            x_ptrs = gl.max_contiguous(gl.multiple_of(x_ptrs, [1, 16]), [1, 8])  # in bytes, in elements
            d_ptrs = d_start + (d_rows * (PARTS * pitch))[:, None] + d_places[None, :]
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
            d_start += BLOCK_K * PARTS * pitch.to(gl.int64)
            slots = following
            following = after
            stage, phase = advance(stage, phase, STAGES)
    async_copy.wait_group(0)


@gluon.jit
def finish_dw(
    operands,
    HALF: gl.constexpr, PARTS: gl.constexpr, RAGGED_M: gl.constexpr, EVEN: gl.constexpr, BOXED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ring, buffers, gate, up, tables, num_tiles, num_tiles_h, H, stride_dh, stride_ds = operands
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, width, offset, _, num_rows, hidden, inner = locate_dw(
            tile, tables, num_tiles_h, PARTS, RAGGED_M, EVEN, BLOCK_M, BLOCK_N
        )
        span = part_span(width, EVEN)
        if RAGGED_M:
            inner += HALF * HALF_M
            inside = inner < PARTS * span
        else:
            hidden += HALF * HALF_M
            inside = hidden < H
        acc, stage, phase = multiply(
            ring, stage, phase, gl.cdiv(num_rows, BLOCK_K), inside, HALF, BLOCK_N, STAGES, False, False
        )
        tiles = pieces(acc)
        edges = (offset, width, H, stride_dh, stride_ds)
        for p in gl.static_range(BLOCK_N // PIECE_N):
            if inside & (inner < PARTS * span):
                buffer = buffers.index(2 * HALF + p % 2)
                # The tile before may have stored an odd number of pieces, and one at an edge is none of these.
                tma.store_wait(pendings=1 if EVEN and p > 0 else 0)
                buffer.store(tiles[p].to(buffer.dtype))
                fence_async_shared()
                if inner < span:
                    store_piece(gate, buffer, hidden, inner, edges, RAGGED_M, EVEN, BOXED)
                else:
                    store_piece(up, buffer, hidden, inner - span, edges, RAGGED_M, EVEN, BOXED)
            if RAGGED_M:
                hidden += PIECE_N
            else:
                inner += PIECE_N
    tma.store_wait(pendings=0)


@gluon.jit
def store_piece(
    dw, buffer, hidden, column, edges, RAGGED_M: gl.constexpr, EVEN: gl.constexpr, BOXED: gl.constexpr
):  # fmt: skip
    """Store a piece of a weight gradient from an expert's `column` on; what sticks out of it or of H is left out.

    `dw`: the gradient, and its boxes (`BOXED`: which it can be stored in), as it lies in memory.
    """
    pointer, boxes = dw
    offset, width, _, _, _ = edges
    if BOXED and EVEN:
        store_whole(boxes, buffer, hidden, offset + column, RAGGED_M)
    elif BOXED:
        if column + PIECE_N <= width:
            store_whole(boxes, buffer, hidden, offset + column, RAGGED_M)
        else:
            store_edge(pointer, buffer, hidden, column, edges, RAGGED_M)
    else:
        store_edge(pointer, buffer, hidden, column, edges, RAGGED_M)


@gluon.jit
def store_whole(boxes, buffer, hidden, column, RAGGED_M: gl.constexpr):
    """Start storing a piece that is within the expert."""
    if RAGGED_M:
        store_box(boxes, [column, hidden], buffer)
    else:
        store_box(boxes, [hidden, column], buffer)


@gluon.jit
def store_edge(dw, buffer, hidden, column, edges, RAGGED_M: gl.constexpr):
    """Store what of a piece is within H and the expert's width, wherever in memory that starts."""
    offset, width, H, stride_dh, stride_ds = edges
    # Along H rows start where H allows, elsewhere anywhere: 16 bytes a thread, or neighbours of 2.
    layout: gl.constexpr = wide_layout(PIECE_N) if RAGGED_M else gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    ROWS: gl.constexpr = 16  # at a time, to spare registers
    first = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    second = gl.arange(0, PIECE_N, layout=gl.SliceLayout(0, layout))
    dw += hidden.to(gl.int64) * stride_dh + (offset + column).to(gl.int64) * stride_ds
    first_stride = stride_ds if RAGGED_M else stride_dh
    num_first = width - column if RAGGED_M else H - hidden
    num_second = H - hidden if RAGGED_M else width - column
    for i in gl.static_range(HALF_M // ROWS):
        rows = first + i * ROWS
        pointers = dw + rows.to(gl.int64)[:, None] * first_stride + second[None, :]
        mask = (rows < num_first)[:, None] & (second < num_second)[None, :]
        gl.store(pointers, buffer.slice(i * ROWS, ROWS, 0).load(layout), mask=mask)


@gluon.jit
def grouped_gemm_dw_hopper_kernel(
    x, d, dw, dw_up, boxes, up_boxes, widths, offsets, row_offsets, tiles, row_to_slot, ragged_offsets, H, stride_xt,
    stride_dh, stride_ds, num_tiles, num_tiles_h,
    PARTS: gl.constexpr, RAGGED_M: gl.constexpr, TOP_K: gl.constexpr, EVEN: gl.constexpr, BOXED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    ring = make_ring(x.dtype.element_ty, BLOCK_K, BLOCK_M, BLOCK_K, BLOCK_N, STAGES, PRODUCER_THREADS)
    buffers = make_buffers(x.dtype.element_ty, 4, PIECE_N)
    tables = (widths, offsets, row_offsets, tiles)
    gate, up = (dw, boxes), (dw_up, up_boxes)
    consumer = (ring, buffers, gate, up, tables, num_tiles, num_tiles_h, H, stride_dh, stride_ds)
    producer = (ring, x, d, tables, row_to_slot, ragged_offsets, num_tiles, num_tiles_h, H, stride_xt)
    gl.warp_specialize(
        [
            (finish_dw, (consumer, 0, PARTS, RAGGED_M, EVEN, BOXED, BLOCK_M, BLOCK_N, STAGES)),
            (finish_dw, (consumer, 1, PARTS, RAGGED_M, EVEN, BOXED, BLOCK_M, BLOCK_N, STAGES)),
            (produce_dw, (producer, PARTS, RAGGED_M, TOP_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
