"""Grouped GEMMs of rows with weights: up, down (and the gradient of x's rows), and the gradient behind down.

Gathered rows come by 16-byte asynchronous copies from anywhere; weights and panels (`Routing.panels`) by TMA boxes,
which may stick out of an expert. Columns beyond it are not stored, or zeros in their place up to the end of a ragged
buffer's row; a reduction beyond it meets rows filled with zeros. Where all widths are multiples of 64 (`EVEN`) no
reduction goes beyond, and there are panels alone. H is a multiple of 64.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_moe.kernels.activation import act_fwd
from triton_moe.kernels.hopper.pipeline import (
    BLOCK_K,
    HALF_M,
    PIECE_N,
    PRODUCER_THREADS,
    advance,
    async_copy,
    copy_box,
    copy_elements,
    copy_rows,
    fence_async_shared,
    first_tile,
    hand_out,
    make_buffers,
    make_ring,
    make_schedule,
    mbarrier,
    multiply,
    next_tile,
    pieces,
    store_box,
    store_own_rows,
    store_rows,
    take_number,
    tma,
    wide_layout,
    within,
)


@gluon.jit
def row_stride(width, EVEN: gl.constexpr):
    """Elements of an expert's row in a part of a ragged buffer: `layout.row_stride`."""
    return width if EVEN else gl.cdiv(width, 8) * 8


@gluon.jit
def num_steps_of(width, EVEN: gl.constexpr):
    """Stages of a reduction over an expert's width."""
    return width // BLOCK_K if EVEN else gl.cdiv(width, BLOCK_K)


@gluon.jit
def place_of(part, col, count, pitch, PARTS: gl.constexpr, EVEN: gl.constexpr):
    """Where a column `col` of a part begins in the block of an expert of `count` rows, and elements from row to row;
    the same, one further, for those that follow in its panel."""
    whole, panel, inside = pitch // PIECE_N, col // PIECE_N, col % PIECE_N
    step = count.to(gl.int64) * PIECE_N  # from panel to panel
    if EVEN:
        return (part * whole + panel) * step + inside, PIECE_N
    else:
        rest = pitch % PIECE_N
        of_rest = PARTS * whole * step + part * count.to(gl.int64) * rest
        start = gl.where(panel < whole, (part * whole + panel) * step, of_rest)
        return start + inside, gl.where(panel < whole, PIECE_N, rest)


@gluon.jit
def locate(tile, tables, num_tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, EVEN: gl.constexpr):
    """-> a tile's expert, its width, first column in the packed weights, first row of the tile, that row's place within
    the expert, rows from there on, first column.

    The tables end with a list: of row blocks, each of which has `num_tiles_n` tiles, or if that is None of the tiles of
    BLOCK_N columns of the expert (`TileLists`).
    """
    widths, offsets, row_offsets, parts = tables
    entry = parts + 2 * (tile if num_tiles_n is None else tile // num_tiles_n)
    expert = gl.load(entry)
    part = gl.load(entry + 1)
    width = gl.load(widths + expert)
    if EVEN:
        width = gl.multiple_of(width, 64)
    if num_tiles_n is None:
        across = gl.cdiv(width, BLOCK_N)
        start = part // across * BLOCK_M
        col = part % across * BLOCK_N
    else:
        start = part * BLOCK_M
        col = tile % num_tiles_n * BLOCK_N
    first = gl.load(row_offsets + expert)
    count = gl.load(row_offsets + expert + 1) - first
    return expert, width, gl.load(offsets + expert), first + start, start, count - start, col


@gluon.jit
def num_ragged_tiles(numbers, BLOCK_N: gl.constexpr):
    return gl.load(numbers + (1 if BLOCK_N == 128 else 2))


@gluon.jit
def expert_block(buffer, expert, ragged_offsets, PARTS: gl.constexpr):
    """Pointer to the expert's block of a ragged buffer."""
    return buffer + PARTS * gl.load(ragged_offsets + expert)


@gluon.jit
def make_weights_ring(
    element: gl.constexpr, BY_THREADS: gl.constexpr, B_BY_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The ring of a producer: ready when its boxes have arrived, all at once, and, a thread's at a time, what its
    threads copy, if they do."""
    B_SHAPE_0: gl.constexpr = BLOCK_N if B_BY_K else BLOCK_K
    B_SHAPE_1: gl.constexpr = BLOCK_K if B_BY_K else BLOCK_N
    READY_COUNT: gl.constexpr = PRODUCER_THREADS + 1 if BY_THREADS else 1
    return make_ring(element, BLOCK_M, BLOCK_K, B_SHAPE_0, B_SHAPE_1, STAGES, READY_COUNT)


@gluon.jit
def copy_weights(w, k, n, bar, tile, B_BY_K: gl.constexpr):
    """A box of `w` whose reduction starts at k and whose columns start at n."""
    if B_BY_K:
        copy_box(w, [n, k], bar, tile)
    else:
        copy_box(w, [k, n], bar, tile)


@gluon.jit
def produce(
    operands,
    TOP_K: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    TILE_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring for every tile of this program: rows of H elements gathered by row_to_slot, weights (H, S).

    TILE_N: output columns of a tile; half of BLOCK_N where w and w_up are multiplied side by side.
    """
    ring, schedule, a, w, w_up, tables, row_to_slot, H, stride_at = operands
    a_tiles, b_tiles, ready, empty = ring
    layout: gl.constexpr = wide_layout(BLOCK_K)
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    inner = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    stage = 0
    phase = 1
    turn = 0
    tile = first_tile(schedule)
    while tile >= 0:
        _, _, offset, first_row, _, num_rows, col = locate(tile, tables, None, BLOCK_M, TILE_N, EVEN)
        source = gl.load(row_to_slot + first_row + gl.minimum(rows, num_rows - 1)) // TOP_K
        a_ptrs = (a + source.to(gl.int64) * stride_at)[:, None] + inner[None, :]
        a_ptrs = gl.max_contiguous(gl.multiple_of(a_ptrs, [1, 16]), [1, 8])  # in bytes, in elements
        n = offset + col
        for step in range(H // BLOCK_K):
            bar = ready.index(stage)
            b_tile = b_tiles.index(stage)
            k = step * BLOCK_K
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, b_tiles.dtype.primitive_bitwidth // 8 * BLOCK_K * BLOCK_N)
            if TILE_N < BLOCK_N:
                copy_weights(w, k, n, bar, b_tile.slice(0, TILE_N, 0 if B_BY_K else 1), B_BY_K)
                copy_weights(w_up, k, n, bar, b_tile.slice(TILE_N, TILE_N, 0 if B_BY_K else 1), B_BY_K)
            else:
                copy_weights(w, k, n, bar, b_tile, B_BY_K)
            copy_elements(a_tiles.index(stage), a_ptrs)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            a_ptrs += BLOCK_K
            stage, phase = advance(stage, phase, STAGES)
        # A long reduction: taken late, nobody gets a tile that another has time for.
        tile = hand_out(schedule, take_number(schedule), turn)
        turn += 1
    async_copy.wait_group(0)


@gluon.jit
def produce_down(
    operands,
    PARTS: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring for every tile of this program: panels of a ragged buffer, one part after the other, weights
    (S, H). What an expert has left after its last panel is copied by threads."""
    ring, schedule, a, panels, w, w_up, tables, ragged_offsets, num_tiles_n = operands
    a_tiles, b_tiles, ready, empty = ring
    ELEMENT_BYTES: gl.constexpr = b_tiles.dtype.primitive_bitwidth // 8
    stage = 0
    phase = 1
    turn = 0
    tile = first_tile(schedule)
    while tile >= 0:
        number = take_number(schedule)  # a short reduction: it must be on its way
        expert, width, offset, _, start, num_rows, col = locate(tile, tables, num_tiles_n, BLOCK_M, BLOCK_N, EVEN)
        count = start + num_rows
        pitch = row_stride(width, EVEN)
        whole = pitch // PIECE_N
        num_steps = num_steps_of(width, EVEN)
        first_line = (PARTS * gl.load(ragged_offsets + expert) // PIECE_N).to(gl.int32) + start
        for step in range(PARTS * num_steps):
            part = gl.where(step < num_steps, 0, 1)
            panel = step - part * num_steps
            line = first_line + (part * whole + panel) * count
            k = offset + panel * BLOCK_K
            bar = ready.index(stage)
            a_tile = a_tiles.index(stage)
            b_tile = b_tiles.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            if EVEN:
                mbarrier.expect(bar, ELEMENT_BYTES * BLOCK_K * (BLOCK_M + BLOCK_N))
                copy_box(panels, [line, 0], bar, a_tile)
            else:
                if panel < whole:
                    mbarrier.expect(bar, ELEMENT_BYTES * BLOCK_K * (BLOCK_M + BLOCK_N))
                    copy_box(panels, [line, 0], bar, a_tile)
                else:
                    mbarrier.expect(bar, ELEMENT_BYTES * BLOCK_K * BLOCK_N)
                    place, stride = place_of(part, panel * BLOCK_K, count, pitch, PARTS, EVEN)
                    a_start = expert_block(a, expert, ragged_offsets, PARTS) + place + start.to(gl.int64) * stride
                    copy_rows(a_tile, a_start, stride, num_rows, stride)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            if PARTS == 2:
                if part == 0:
                    copy_weights(w, k, col, bar, b_tile, B_BY_K)
                else:
                    copy_weights(w_up, k, col, bar, b_tile, B_BY_K)
            else:
                copy_weights(w, k, col, bar, b_tile, B_BY_K)
            stage, phase = advance(stage, phase, STAGES)
        tile = hand_out(schedule, number, turn)
        turn += 1
    if not EVEN:
        async_copy.wait_group(0)


@gluon.jit
def finish_up(
    operands,
    HALF: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, KEEP_PRE: gl.constexpr,
    KEEP_ACT: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ring, schedule, pre, out, tables, ragged_offsets, H = operands
    PARTS: gl.constexpr = 2 if GATED else 1
    TILE_N: gl.constexpr = BLOCK_N // PARTS
    stage = 0
    phase = 0
    turn = 0
    tile = first_tile(schedule)
    while tile >= 0:
        expert, width, _, _, start, num_rows, col = locate(tile, tables, None, BLOCK_M, TILE_N, EVEN)
        count = start + num_rows
        pitch = row_stride(width, EVEN)
        first = (start + HALF * HALF_M).to(gl.int64)
        num_rows -= HALF * HALF_M
        acc, stage, phase = multiply(
            ring, stage, phase, H // BLOCK_K, num_rows > 0, HALF, BLOCK_N, STAGES, True, B_BY_K
        )
        tiles = pieces(acc)
        pre_block = expert_block(pre, expert, ragged_offsets, PARTS)
        out_block = expert_block(out, expert, ragged_offsets, 1)
        for p in gl.static_range(TILE_N // PIECE_N):
            at = col + p * PIECE_N
            num_cols = pitch - at
            if num_cols > 0:
                gate = tiles[p] if EVEN else within(tiles[p], width - at)
                if GATED:
                    up = tiles[p + 2] if EVEN else within(tiles[p + 2], width - at)
                if KEEP_PRE:
                    place, stride = place_of(0, at, count, pitch, PARTS, EVEN)
                    store_own_rows(gate, pre_block + place + first * stride, stride, num_rows, num_cols)
                if KEEP_PRE and GATED:
                    place, stride = place_of(1, at, count, pitch, PARTS, EVEN)
                    store_own_rows(up, pre_block + place + first * stride, stride, num_rows, num_cols)
                if KEEP_ACT:
                    act = act_fwd(gate, ACTIVATION, True)
                    if GATED:
                        act *= up
                    place, stride = place_of(0, at, count, pitch, 1, EVEN)
                    store_own_rows(act, out_block + place + first * stride, stride, num_rows, num_cols)
        tile = next_tile(schedule, turn)
        turn += 1


@gluon.jit
def grouped_gemm_up_hopper_kernel(
    x, w1, w3, pre, out, widths, offsets, row_offsets, numbers, tiles, row_to_slot, ragged_offsets, H, stride_xt,
    TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, KEEP_PRE: gl.constexpr, KEEP_ACT: gl.constexpr,
    B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    TILE_N: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    ring = make_weights_ring(x.dtype.element_ty, True, B_BY_K, BLOCK_M, BLOCK_N, STAGES)
    tables = (widths, offsets, row_offsets, tiles)
    schedule = make_schedule(numbers + 3, num_ragged_tiles(numbers, TILE_N))
    consumer = (ring, schedule, pre, out, tables, ragged_offsets, H)
    producer = (ring, schedule, x, w1, w3, tables, row_to_slot, H, stride_xt)
    gl.warp_specialize(
        [
            (finish_up, (consumer, 0, ACTIVATION, GATED, KEEP_PRE, KEEP_ACT, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (finish_up, (consumer, 1, ACTIVATION, GATED, KEEP_PRE, KEEP_ACT, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (produce, (producer, TOP_K, B_BY_K, EVEN, BLOCK_M, BLOCK_N, TILE_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def finish_down(
    operands,
    HALF: gl.constexpr, PARTS: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ring, schedule, buffers, y, y_boxes, tables, num_tiles_n, H = operands
    stage = 0
    phase = 0
    turn = 0
    tile = first_tile(schedule)
    while tile >= 0:
        _, width, _, first_row, _, num_rows, col = locate(tile, tables, num_tiles_n, BLOCK_M, BLOCK_N, EVEN)
        num_rows -= HALF * HALF_M
        acc, stage, phase = multiply(
            ring, stage, phase, PARTS * num_steps_of(width, EVEN), num_rows > 0, HALF, BLOCK_N, STAGES, True, B_BY_K
        )
        tiles = pieces(acc)
        first_row += HALF * HALF_M
        for p in gl.static_range(BLOCK_N // PIECE_N):
            buffer = buffers.index(2 * HALF + p % 2)
            at = col + p * PIECE_N
            tma.store_wait(pendings=1)
            if num_rows >= HALF_M:
                buffer.store(tiles[p].to(buffer.dtype))
                fence_async_shared()
                store_box(y_boxes, [first_row, at], buffer)
            else:  # commits nothing, so a wait for all but the last store would not do
                tma.store_wait(pendings=0)
                store_rows(buffer, tiles[p], y + first_row.to(gl.int64) * H + at, H, num_rows, H - at)
        tile = next_tile(schedule, turn)
        turn += 1
    tma.store_wait(pendings=0)


@gluon.jit
def grouped_gemm_down_hopper_kernel(
    a, panels, w, w_up, y, y_boxes, widths, offsets, row_offsets, numbers, row_blocks, ragged_offsets, H, num_tiles_n,
    PARTS: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    ring = make_weights_ring(a.dtype.element_ty, not EVEN, B_BY_K, BLOCK_M, BLOCK_N, STAGES)
    buffers = make_buffers(a.dtype.element_ty, 4, PIECE_N)
    schedule = make_schedule(numbers + 3, gl.load(numbers) * num_tiles_n)
    tables = (widths, offsets, row_offsets, row_blocks)
    consumer = (ring, schedule, buffers, y, y_boxes, tables, num_tiles_n, H)
    producer = (ring, schedule, a, panels, w, w_up, tables, ragged_offsets, num_tiles_n)
    gl.warp_specialize(
        [
            (finish_down, (consumer, 0, PARTS, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (finish_down, (consumer, 1, PARTS, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (produce_down, (producer, PARTS, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
