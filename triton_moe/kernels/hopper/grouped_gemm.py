"""Grouped GEMMs of rows with weights: up, down (and the gradient of x's rows), and the gradient behind down.

Rows come by 16-byte asynchronous copies from anywhere, so gathered and ragged ones are alike; weights by TMA boxes,
which may stick out of an expert. Columns beyond it are not stored, or zeros in their place up to the end of a ragged
buffer's row; a reduction beyond it meets rows filled with zeros. Where all widths are multiples of 64 (`EVEN`) no
reduction goes beyond, and a row ends where the expert does. H is a multiple of 64.
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
def num_steps_of(width, PARTS: gl.constexpr, EVEN: gl.constexpr):
    """Stages of a reduction over an expert's width, part after part."""
    return PARTS * width // BLOCK_K if EVEN else PARTS * gl.cdiv(width, BLOCK_K)


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
def ragged_rows(buffer, expert, start, pitch, ragged_offsets, PARTS: gl.constexpr):
    """Pointer to row `start` of the expert's `(n_e, PARTS, pitch)` block of a ragged buffer."""
    return buffer + PARTS * (gl.load(ragged_offsets + expert) + start.to(gl.int64) * pitch)


@gluon.jit
def make_weights_ring(
    element: gl.constexpr, B_BY_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """The ring of `produce`: ready when its rows have arrived, a thread's at a time, and its weights, all at once."""
    B_SHAPE_0: gl.constexpr = BLOCK_N if B_BY_K else BLOCK_K
    B_SHAPE_1: gl.constexpr = BLOCK_K if B_BY_K else BLOCK_N
    return make_ring(element, BLOCK_M, BLOCK_K, B_SHAPE_0, B_SHAPE_1, STAGES, PRODUCER_THREADS + 1)


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
    RAGGED_A: gl.constexpr, PARTS: gl.constexpr, TOP_K: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring for every tile of this program.

    RAGGED_A: a is a ragged buffer of PARTS parts, the widths are the reduction, weights (S, H). Otherwise a has rows of
    H elements, gathered by row_to_slot; weights (H, S). TILE_N: output columns of a tile; half of
    BLOCK_N where w and w_up are multiplied side by side.
    """
    ring, schedule, a, w, w_up, tables, row_to_slot, ragged_offsets, num_tiles_n, H, stride_at = operands
    a_tiles, b_tiles, ready, empty = ring
    layout: gl.constexpr = wide_layout(BLOCK_K)
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    inner = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    stage = 0
    phase = 1
    turn = 0
    tile = first_tile(schedule)
    while tile >= 0:
        if RAGGED_A:  # a short reduction: the number must be on its way
            number = take_number(schedule)
        expert, width, offset, first_row, start, num_rows, col = locate(
            tile, tables, num_tiles_n, BLOCK_M, TILE_N, EVEN
        )
        pitch = row_stride(width, EVEN)
        local = gl.minimum(rows, num_rows - 1)
        if RAGGED_A:
            a_rows = ragged_rows(a, expert, start, pitch, ragged_offsets, PARTS) + local * (PARTS * pitch)
            num_steps = num_steps_of(width, PARTS, EVEN)
            first_k = offset
            n = col
        else:
            source = gl.load(row_to_slot + first_row + local) // TOP_K
            a_rows = a + source.to(gl.int64) * stride_at
            num_steps = H // BLOCK_K
            first_k = 0
            n = offset + col
        a_ptrs = a_rows[:, None] + inner[None, :]
        a_ptrs = gl.max_contiguous(gl.multiple_of(a_ptrs, [1, 16]), [1, 8])  # in bytes, in elements
        for step in range(num_steps):
            bar = ready.index(stage)
            b_tile = b_tiles.index(stage)
            k = first_k + step * BLOCK_K
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, b_tiles.dtype.primitive_bitwidth // 8 * BLOCK_K * BLOCK_N)
            if TILE_N < BLOCK_N:
                copy_weights(w, k, n, bar, b_tile.slice(0, TILE_N, 0 if B_BY_K else 1), B_BY_K)
                copy_weights(w_up, k, n, bar, b_tile.slice(TILE_N, TILE_N, 0 if B_BY_K else 1), B_BY_K)
            elif RAGGED_A and PARTS == 2:
                if step * 2 < num_steps:
                    copy_weights(w, k, n, bar, b_tile, B_BY_K)
                else:
                    copy_weights(w_up, k - num_steps // 2 * BLOCK_K, n, bar, b_tile, B_BY_K)
            else:
                copy_weights(w, k, n, bar, b_tile, B_BY_K)
            if RAGGED_A and not EVEN:
                part = gl.where(step * PARTS < num_steps, 0, 1)
                start_k = (step - part * (num_steps // PARTS)) * BLOCK_K
                inside = (inner // 8 < (pitch - start_k) // 8)[None, :] & (rows >= 0)[:, None]
                copy_elements(a_tiles.index(stage), a_ptrs + (part * pitch + start_k), inside)
            else:
                copy_elements(a_tiles.index(stage), a_ptrs)
                a_ptrs += BLOCK_K
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = advance(stage, phase, STAGES)
        if not RAGGED_A:  # a long one: taken late, nobody gets a tile that another has time for
            number = take_number(schedule)
        tile = hand_out(schedule, number, turn)
        turn += 1
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
        pitch = row_stride(width, EVEN)
        start += HALF * HALF_M
        num_rows -= HALF * HALF_M
        acc, stage, phase = multiply(
            ring, stage, phase, H // BLOCK_K, num_rows > 0, HALF, BLOCK_N, STAGES, True, B_BY_K
        )
        tiles = pieces(acc)
        pre_start = ragged_rows(pre, expert, start, pitch, ragged_offsets, PARTS) + col
        out_start = ragged_rows(out, expert, start, pitch, ragged_offsets, 1) + col
        for p in gl.static_range(TILE_N // PIECE_N):
            at = p * PIECE_N
            num_cols = pitch - col - at
            if num_cols > 0:
                gate = tiles[p] if EVEN else within(tiles[p], width - col - at)
                if GATED:
                    up = tiles[p + 2] if EVEN else within(tiles[p + 2], width - col - at)
                if KEEP_PRE:
                    store_own_rows(gate, pre_start + at, PARTS * pitch, num_rows, num_cols)
                if KEEP_PRE and GATED:
                    store_own_rows(up, pre_start + pitch + at, PARTS * pitch, num_rows, num_cols)
                if KEEP_ACT:
                    act = act_fwd(gate, ACTIVATION, True)
                    if GATED:
                        act *= up
                    store_own_rows(act, out_start + at, pitch, num_rows, num_cols)
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
    ring = make_weights_ring(x.dtype.element_ty, B_BY_K, BLOCK_M, BLOCK_N, STAGES)
    tables = (widths, offsets, row_offsets, tiles)
    schedule = make_schedule(numbers + 3, num_ragged_tiles(numbers, TILE_N))
    consumer = (ring, schedule, pre, out, tables, ragged_offsets, H)
    producer = (ring, schedule, x, w1, w3, tables, row_to_slot, ragged_offsets, None, H, stride_xt)
    gl.warp_specialize(
        [
            (finish_up, (consumer, 0, ACTIVATION, GATED, KEEP_PRE, KEEP_ACT, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (finish_up, (consumer, 1, ACTIVATION, GATED, KEEP_PRE, KEEP_ACT, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (produce, (producer, False, 1, TOP_K, B_BY_K, EVEN, BLOCK_M, BLOCK_N, TILE_N, STAGES)),
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
            ring, stage, phase, num_steps_of(width, PARTS, EVEN), num_rows > 0, HALF, BLOCK_N, STAGES, True, B_BY_K
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
    a, w, w_up, y, y_boxes, widths, offsets, row_offsets, numbers, row_blocks, ragged_offsets, H, num_tiles_n,
    PARTS: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    ring = make_weights_ring(a.dtype.element_ty, B_BY_K, BLOCK_M, BLOCK_N, STAGES)
    buffers = make_buffers(a.dtype.element_ty, 4, PIECE_N)
    schedule = make_schedule(numbers + 3, gl.load(numbers) * num_tiles_n)
    tables = (widths, offsets, row_offsets, row_blocks)
    consumer = (ring, schedule, buffers, y, y_boxes, tables, num_tiles_n, H)
    producer = (ring, schedule, a, w, w_up, tables, row_blocks, ragged_offsets, num_tiles_n, H, H)
    gl.warp_specialize(
        [
            (finish_down, (consumer, 0, PARTS, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (finish_down, (consumer, 1, PARTS, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (produce, (producer, True, PARTS, 1, B_BY_K, EVEN, BLOCK_M, BLOCK_N, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
