"""Grouped GEMMs of the backward pass: `dh`, whose product never leaves the registers, and `dw`, ragged in its
reduction. See `triton_moe.kernels.grouped_gemm_bwd` for the formulas."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_moe.kernels.activation import act_bwd, act_fwd
from triton_moe.kernels.hopper.grouped_gemm import (
    copy_columns,
    make_weights_ring,
    num_ragged_tiles,
    place_of,
    produce,
    row_stride,
    store_columns,
)
from triton_moe.kernels.hopper.pipeline import (
    BLOCK_K,
    HALF_M,
    PIECE_N,
    PRODUCER_THREADS,
    advance,
    async_copy,
    copy_box,
    copy_elements,
    fence_async_shared,
    halves,
    hear,
    make_buffers,
    make_ring,
    make_schedule,
    make_table,
    mbarrier,
    multiply,
    pieces,
    pointer_at,
    scalar_at,
    store_box,
    tma,
    wide_layout,
    within,
)

DH_PIECE_N = gl.constexpr(32)
"""Columns that a consumer of dh finishes at a time: with more, its registers would not suffice."""
PRE, DPRE, ACT_WEIGHTED, ROW_TO_SLOT, TOPK_WEIGHTS, DWEIGHTS_PARTIAL, NUM_PARTIALS, NUM_STEPS = map(
    gl.constexpr, range(8)
)
"""Places in the table of dh's consumers."""


@gluon.jit
def finish_dh(
    operands,
    WEIGHT: gl.constexpr, HALF: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, B_BY_K: gl.constexpr,
    EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """WEIGHT: the type of a routing weight."""
    ring, schedule, buffers, table = operands
    gate_in = buffers.index(4 * HALF)
    up_in = buffers.index(4 * HALF + 1)
    dgate_out = buffers.index(4 * HALF + 2)
    dup_out = buffers.index(4 * HALF + 3)
    weighted_out = dgate_out if GATED else dup_out  # not the one used just before
    PARTS: gl.constexpr = 2 if GATED else 1
    stage = 0
    phase = 0
    turn = 0
    line, width, _, first_row, start, num_rows, col = hear(schedule, turn)
    while line >= 0:
        turn += 1
        count = start + num_rows
        pitch = row_stride(width, EVEN)
        first_row += HALF * HALF_M
        start += HALF * HALF_M
        num_rows -= HALF * HALF_M
        first = line.to(gl.int64) * PIECE_N
        pre_block = pointer_at(table, PRE, buffers.dtype) + PARTS * first
        dpre_block = pointer_at(table, DPRE, buffers.dtype) + PARTS * first
        weighted_block = pointer_at(table, ACT_WEIGHTED, buffers.dtype) + first
        num_cols = gl.minimum(pitch - col, BLOCK_N)
        own = (start, num_rows, count, pitch)
        copy_columns(gate_in, pre_block, own, 0, col, num_cols, PARTS, EVEN)
        if GATED:
            copy_columns(up_in, pre_block, own, 1, col, num_cols, PARTS, EVEN)
        async_copy.commit_group()
        num_steps = scalar_at(table, NUM_STEPS).to(gl.int32)
        acc, stage, phase = multiply(
            ring, stage, phase, num_steps, num_rows > 0, HALF, BLOCK_N, STAGES, True, True, B_BY_K
        )
        t0, t1, t2, t3 = pieces(acc)
        p0, p1 = halves(t0)
        p2, p3 = halves(t1)
        p4, p5 = halves(t2)
        p6, p7 = halves(t3)
        layout: gl.constexpr = p0.type.layout
        rows = gl.arange(0, HALF_M, layout=gl.SliceLayout(1, layout))
        exists = rows < num_rows
        slots = gl.load(pointer_at(table, ROW_TO_SLOT, gl.int32) + first_row + rows, mask=exists, other=0)
        weight = gl.load(pointer_at(table, TOPK_WEIGHTS, WEIGHT) + slots, mask=exists, other=0).to(gl.float32)[:, None]
        dweights = gl.zeros((HALF_M,), gl.float32, gl.SliceLayout(1, layout))
        # A loop whose pieces move up by one: unrolled, the code would not fit into the instruction cache.
        for at in range(0, num_cols, DH_PIECE_N):
            async_copy.wait_group(0)
            gate = gate_in.load(layout).to(gl.float32)
            act = act_fwd(gate, ACTIVATION, True)
            up = up_in.load(layout).to(gl.float32) if GATED else 1.0
            after = at + DH_PIECE_N
            copy_columns(gate_in, pre_block, own, 0, col + after, num_cols - after, PARTS, EVEN)
            if GATED:
                copy_columns(up_in, pre_block, own, 1, col + after, num_cols - after, PARTS, EVEN)
            async_copy.commit_group()
            if not EVEN and not GATED:  # past the width a gated gradient is 0, as pre-activation and activation are
                p0 = within(p0, width - col - at)
            cols = DH_PIECE_N if EVEN else num_cols - at
            product = act * up
            dweights += gl.sum(p0 * product, axis=1)
            dproduct = p0 * weight
            # In this order, by which registers come free, nothing spills.
            dgate = dproduct * up * act_bwd(gate, act, ACTIVATION, True)
            store_columns(dgate_out, dgate, dpre_block, own, 0, col + at, cols, PARTS, EVEN)
            if GATED:
                store_columns(dup_out, dproduct * act, dpre_block, own, 1, col + at, cols, PARTS, EVEN)
            store_columns(weighted_out, product * weight, weighted_block, own, 0, col + at, cols, 1, EVEN)
            p0, p1, p2, p3, p4, p5, p6 = p1, p2, p3, p4, p5, p6, p7
        async_copy.wait_group(0)
        # Loaded again: kept, they would cost registers.
        slots = gl.load(pointer_at(table, ROW_TO_SLOT, gl.int32) + first_row + rows, mask=exists, other=0)
        places = slots.to(gl.int64) * scalar_at(table, NUM_PARTIALS) + col // BLOCK_N
        gl.store(pointer_at(table, DWEIGHTS_PARTIAL, gl.float32) + places, dweights, mask=exists)
        line, width, _, first_row, start, num_rows, col = hear(schedule, turn)


@gluon.jit
def grouped_gemm_dh_hopper_kernel(
    dout, w2, pre, topk_weights, dpre, act_weighted, dweights_partial, widths, offsets, row_offsets, numbers, tiles,
    row_to_slot, ragged_offsets, H, stride_dt, num_partials,
    TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    ring = make_weights_ring(dout.dtype.element_ty, True, B_BY_K, BLOCK_M, BLOCK_N, STAGES)
    buffers = make_buffers(dout.dtype.element_ty, 8, DH_PIECE_N)
    schedule = make_schedule(numbers + 3, num_ragged_tiles(numbers, BLOCK_N))
    tables = (widths, offsets, row_offsets, ragged_offsets, tiles)
    table = make_table(
        (
            pre.to(gl.int64), dpre.to(gl.int64), act_weighted.to(gl.int64), row_to_slot.to(gl.int64),
            topk_weights.to(gl.int64), dweights_partial.to(gl.int64), num_partials, H // BLOCK_K,
        )
    )  # fmt: skip
    WEIGHT: gl.constexpr = topk_weights.dtype.element_ty
    consumer = (ring, schedule, buffers, table)
    producer = (ring, schedule, dout, w2, w2, tables, row_to_slot, H, stride_dt)
    gl.warp_specialize(
        [
            (finish_dh, (consumer, WEIGHT, 0, ACTIVATION, GATED, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (finish_dh, (consumer, WEIGHT, 1, ACTIVATION, GATED, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (produce, (producer, TOP_K, B_BY_K, EVEN, False, BLOCK_M, BLOCK_N, BLOCK_N, STAGES)),
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
    tile, tables, num_tiles_h, WANTED: gl.constexpr, RAGGED_M: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """-> a tile's expert, its width, first column in the packed weights, first row, rows, and the tile's place in the
    hidden dimension and in the expert's wanted parts (`part_span`). Along the former there are `num_tiles_h` tiles."""
    widths, offsets, row_offsets, parts = tables
    entry = parts + 2 * (tile // num_tiles_h // (WANTED if RAGGED_M else 1))
    expert = gl.load(entry)
    part = gl.load(entry + 1)
    if RAGGED_M:  # an entry's BLOCK_M columns are as many tiles as parts are wanted
        inner = (part * WANTED + tile // num_tiles_h % WANTED) * BLOCK_M
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
    PARTS: gl.constexpr, FIRST: gl.constexpr, WANTED: gl.constexpr, RAGGED_M: gl.constexpr, TOP_K: gl.constexpr,
    EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ring, x, d, panels, tables, row_to_slot, ragged_offsets, num_tiles, num_tiles_h, H, stride_xt = operands
    a_tiles, b_tiles, ready, empty = ring
    X_COLUMNS: gl.constexpr = BLOCK_N if RAGGED_M else BLOCK_M
    D_COLUMNS: gl.constexpr = BLOCK_M if RAGGED_M else BLOCK_N
    layout: gl.constexpr = wide_layout(X_COLUMNS)
    rows = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, X_COLUMNS, layout=gl.SliceLayout(0, layout))
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, width, _, first_row, num_rows, hidden, inner = locate_dw(
            tile, tables, num_tiles_h, WANTED, RAGGED_M, EVEN, BLOCK_M, BLOCK_N
        )
        offset = PARTS * gl.load(ragged_offsets + expert)
        inner += FIRST * part_span(width, EVEN)
        if EVEN:
            line = (offset // PIECE_N).to(gl.int32) + inner // PIECE_N * num_rows
        else:
            columns = columns_of_parts(d + offset, inner, width, num_rows, D_COLUMNS, PARTS, FIRST + WANTED, EVEN)
        inside = (cols // 8 < (H - hidden) // 8)[None, :]
        # Asked for two steps ahead and before the wait for a stage: the producer must not wait for these as well.
        slots = slots_of(row_to_slot, first_row, rows, 0, num_rows)
        following = slots_of(row_to_slot, first_row, rows, BLOCK_K, num_rows)
        for step in range(gl.cdiv(num_rows, BLOCK_K)):
            after = slots_of(row_to_slot, first_row, rows, (step + 2) * BLOCK_K, num_rows)
            x_ptrs = x + hidden + ((slots // TOP_K).to(gl.int64) * stride_xt)[:, None] + cols[None, :]
            x_ptrs = gl.max_contiguous(gl.multiple_of(x_ptrs, [1, 16]), [1, 8])  # in bytes, in elements
            x_mask = (rows < num_rows - step * BLOCK_K)[:, None] & inside
            x_tile = b_tiles.index(stage) if RAGGED_M else a_tiles.index(stage)
            d_tile = a_tiles.index(stage) if RAGGED_M else b_tiles.index(stage)
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            copy_elements(x_tile, x_ptrs, x_mask)
            if EVEN:
                if (step + 1) * BLOCK_K <= num_rows:
                    mbarrier.expect(bar, d_tile.dtype.primitive_bitwidth // 8 * BLOCK_K * D_COLUMNS)
                    for p in gl.static_range(D_COLUMNS // PIECE_N):
                        piece = d_tile.slice(p * PIECE_N, PIECE_N, 1)
                        copy_box(panels, [line + p * num_rows + step * BLOCK_K, 0], bar, piece)
                else:
                    last = columns_of_parts(d + offset, inner, width, num_rows, D_COLUMNS, PARTS, FIRST + WANTED, EVEN)
                    copy_columns_of_parts(d_tile, last, step * BLOCK_K, num_rows)
                    mbarrier.arrive(bar, count=1)
            else:
                copy_columns_of_parts(d_tile, columns, step * BLOCK_K, num_rows)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            slots = following
            following = after
            stage, phase = advance(stage, phase, STAGES)
    async_copy.wait_group(0)


@gluon.jit
def columns_of_parts(
    block, inner, width, count, COLUMNS: gl.constexpr, PARTS: gl.constexpr, END: gl.constexpr, EVEN: gl.constexpr
):  # fmt: skip
    """-> for each of a tile's columns, from `inner` on (`part_span`): pointer to it in the first row of an expert's
    block, elements from row to row, and whether it exists, in a part before END."""
    cols = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, wide_layout(COLUMNS)))
    pitch, eighths = row_stride(width, EVEN), part_span(width, EVEN) // 8
    # In steps of 8, for the compiler to see what is the same for a thread's 16 bytes.
    eighth = inner // 8 + cols // 8
    part = eighth // eighths
    eighth -= part * eighths
    place, stride = place_of(part, eighth * 8 + cols % 8, count, pitch, PARTS, EVEN)
    return block + place, stride + 0 * cols, (eighth < pitch // 8) & (part < END)


@gluon.jit
def copy_columns_of_parts(tile, columns, row, count):
    """Start copying 64 rows from `row` on of an expert's `count`; zeros for what is missing."""
    starts, strides, exist = columns
    rows = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, wide_layout(tile.shape[1])))
    pointers = (starts + row.to(gl.int64) * strides)[None, :] + rows[:, None] * strides[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 8])  # in bytes, in elements
    copy_elements(tile, pointers, (rows < count - row)[:, None] & exist[None, :])


@gluon.jit
def finish_dw(
    operands,
    HALF: gl.constexpr, WANTED: gl.constexpr, RAGGED_M: gl.constexpr, EVEN: gl.constexpr, BOXED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ring, buffers, first, second, tables, num_tiles, num_tiles_h, H, stride_dh, stride_ds = operands
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, width, offset, _, num_rows, hidden, inner = locate_dw(
            tile, tables, num_tiles_h, WANTED, RAGGED_M, EVEN, BLOCK_M, BLOCK_N
        )
        span = part_span(width, EVEN)
        if RAGGED_M:
            inner += HALF * HALF_M
            inside = inner < WANTED * span
        else:
            hidden += HALF * HALF_M
            inside = hidden < H
        acc, stage, phase = multiply(
            ring, stage, phase, gl.cdiv(num_rows, BLOCK_K), inside, HALF, BLOCK_N, STAGES, True, False, False
        )
        tiles = pieces(acc)
        edges = (offset, width, H, stride_dh, stride_ds)
        for p in gl.static_range(BLOCK_N // PIECE_N):
            if inside & (inner < WANTED * span):
                buffer = buffers.index(2 * HALF + p % 2)
                # The tile before may have stored an odd number of pieces, and one at an edge is none of these.
                tma.store_wait(pendings=1 if EVEN and p > 0 else 0)
                buffer.store(tiles[p].to(buffer.dtype))
                fence_async_shared()
                if inner < span:
                    store_piece(first, buffer, hidden, inner, edges, RAGGED_M, EVEN, BOXED)
                else:
                    store_piece(second, buffer, hidden, inner - span, edges, RAGGED_M, EVEN, BOXED)
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
    x, d, panels, dw_first, dw_second, first_boxes, second_boxes, widths, offsets, row_offsets, tiles, row_to_slot,
    ragged_offsets, H, stride_xt, stride_dh, stride_ds, num_tiles, num_tiles_h,
    PARTS: gl.constexpr, FIRST: gl.constexpr, WANTED: gl.constexpr, RAGGED_M: gl.constexpr, TOP_K: gl.constexpr,
    EVEN: gl.constexpr, BOXED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    READY_COUNT: gl.constexpr = PRODUCER_THREADS + 1 if EVEN else PRODUCER_THREADS
    ring = make_ring(x.dtype.element_ty, BLOCK_K, BLOCK_M, BLOCK_K, BLOCK_N, STAGES, READY_COUNT)
    buffers = make_buffers(x.dtype.element_ty, 4, PIECE_N)
    tables = (widths, offsets, row_offsets, tiles)
    first, second = (dw_first, first_boxes), (dw_second, second_boxes)
    consumer = (ring, buffers, first, second, tables, num_tiles, num_tiles_h, H, stride_dh, stride_ds)
    producer = (ring, x, d, panels, tables, row_to_slot, ragged_offsets, num_tiles, num_tiles_h, H, stride_xt)
    gl.warp_specialize(
        [
            (finish_dw, (consumer, 0, WANTED, RAGGED_M, EVEN, BOXED, BLOCK_M, BLOCK_N, STAGES)),
            (finish_dw, (consumer, 1, WANTED, RAGGED_M, EVEN, BOXED, BLOCK_M, BLOCK_N, STAGES)),
            (produce_dw, (producer, PARTS, FIRST, WANTED, RAGGED_M, TOP_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
