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
    THREADS_LAYOUT,
    advance,
    async_copy,
    copy_box,
    copy_elements,
    copy_rows,
    fence_async_shared,
    hear,
    make_buffers,
    make_ring,
    make_schedule,
    mbarrier,
    multiply,
    pieces,
    store_box,
    store_rows,
    take_number,
    tell,
    tile_of,
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
def tell_place(
    schedule, tile, turn, tables, num_tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, EVEN: gl.constexpr
):  # fmt: skip
    """Find a tile, tell the consumers, and -> its place: line of 64 elements where its expert's block of a ragged
    buffer of one part starts (-1: there is no such tile), the expert's width, first column in the packed weights, first
    row of the tile, that row's place within the expert, rows from there on, first column.

    The tables end with a list: of row blocks, each of which has `num_tiles_n` tiles, or if that is None of the tiles of
    BLOCK_N columns of the expert (`TileLists`).
    """
    widths, offsets, row_offsets, ragged_offsets, parts = tables
    exists = tile < schedule[1]
    entry = parts + 2 * (tile if num_tiles_n is None else tile // num_tiles_n)
    expert = gl.load(entry, mask=exists, other=0)
    part = gl.load(entry + 1, mask=exists, other=0)
    width = gl.load(widths + expert)
    if EVEN:
        width = gl.multiple_of(width, 64)
    if num_tiles_n is None:
        across = gl.maximum(gl.cdiv(width, BLOCK_N), 1)
        start = part // across * BLOCK_M
        col = part % across * BLOCK_N
    else:
        start = part * BLOCK_M
        col = tile % num_tiles_n * BLOCK_N
    first = gl.load(row_offsets + expert)
    num_rows = gl.where(exists, gl.load(row_offsets + expert + 1) - first - start, 0)
    line = gl.where(exists, (gl.load(ragged_offsets + expert) // PIECE_N).to(gl.int32), -1)
    place = (line, width, gl.load(offsets + expert), first + start, start, num_rows, col)
    tell(schedule, place, turn)
    return place


@gluon.jit
def num_ragged_tiles(numbers, BLOCK_N: gl.constexpr):
    return gl.load(numbers + (1 if BLOCK_N == 128 else 2))


@gluon.jit
def block_start(block):
    """Pointer to an expert's block of a ragged buffer: `block` is the buffer, by pointer and in boxes, and the block's
    first line of 64 elements."""
    buffer, line = block
    return buffer[0] + line.to(gl.int64) * PIECE_N


@gluon.jit
def line_of(block, rows, part, col):
    """Line of the first of `rows` in the panel of a part's column `col`."""
    _, line = block
    start, _, count, pitch = rows
    return line + (part * (pitch // PIECE_N) + col // PIECE_N) * count + start


@gluon.jit
def copy_columns(buffer, start, rows, part, col, num_cols, PARTS: gl.constexpr, EVEN: gl.constexpr):
    """Start copying a part's columns from `col` on, of one panel, to `buffer`, zeros for those that are not among the
    `num_cols` that there are: `rows` of the block that begins at the pointer `start`.

    `rows`: the first, how many there are from there on, those of the expert, `row_stride`.
    """
    first, num_rows, count, pitch = rows
    place, stride = place_of(part, col, count, pitch, PARTS, EVEN)
    copy_rows(buffer, start + place + first.to(gl.int64) * stride, stride, num_rows, num_cols)


@gluon.jit
def store_columns(buffer, tile, start, rows, part, col, num_cols, PARTS: gl.constexpr, EVEN: gl.constexpr):
    """Store a tile there, by way of `buffer`."""
    first, num_rows, count, pitch = rows
    place, stride = place_of(part, col, count, pitch, PARTS, EVEN)
    store_rows(buffer, tile, start + place + first.to(gl.int64) * stride, stride, num_rows, num_cols)


@gluon.jit
def store_panel(buffer, tile, block, rows, part, col, PARTS: gl.constexpr, EVEN: gl.constexpr):
    """Start storing a part's 64 columns from `col` on, a multiple of 64, of a consumer's `rows` of an expert's block,
    by way of `buffer`, the one of two that was not used last. 64 rows of a panel go by TMA, other pieces by threads."""
    ragged, _ = block
    _, num_rows, _, pitch = rows
    tma.store_wait(pendings=1)  # in the branch that needs it, this makes the whole kernel 2% slower
    boxed = num_rows >= HALF_M
    if not EVEN:
        boxed = boxed & (col // PIECE_N < pitch // PIECE_N)
    if boxed:
        buffer.store(tile.to(buffer.dtype))
        fence_async_shared()
        store_box(ragged[1], [line_of(block, rows, part, col), 0], buffer)
    else:  # commits nothing, so a later wait for all but the last store would not do
        tma.store_wait(pendings=0)
        store_columns(buffer, tile, block_start(block), rows, part, col, pitch - col, PARTS, EVEN)


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
def tell_gathered(
    schedule, tile, turn, tables, row_to_slot, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, EVEN: gl.constexpr
):  # fmt: skip
    """`tell_place`, and -> line, the tile's first column in the packed weights, slots of its rows as `produce` has
    them."""
    line, _, offset, first_row, _, num_rows, col = tell_place(
        schedule, tile, turn, tables, None, BLOCK_M, BLOCK_N, EVEN
    )
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wide_layout(BLOCK_K)))
    return line, offset + col, gl.load(row_to_slot + first_row + rows, mask=rows < num_rows, other=0)


@gluon.jit
def produce(
    operands,
    TOP_K: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, AHEAD: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring for every tile of this program: rows of H elements gathered by row_to_slot, weights (H, S).

    TILE_N: output columns of a tile; half of BLOCK_N where w and w_up are multiplied side by side. AHEAD: the next tile
    is found while stages of this one are still to be filled, which takes registers.
    """
    ring, schedule, a, w, w_up, tables, row_to_slot, H, stride_at = operands
    a_tiles, b_tiles, ready, empty = ring
    layout: gl.constexpr = wide_layout(BLOCK_K)
    inner = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    num_steps = H // BLOCK_K
    number = gl.zeros((PRODUCER_THREADS,), gl.int32, THREADS_LAYOUT)
    stage = 0
    phase = 1
    turn = 0
    line, n, slots = tell_gathered(schedule, gl.program_id(0), turn, tables, row_to_slot, BLOCK_M, TILE_N, EVEN)
    while line >= 0:
        turn += 1
        first_col = n
        a_ptrs = (a + (slots // TOP_K).to(gl.int64) * stride_at)[:, None] + inner[None, :]
        a_ptrs = gl.max_contiguous(gl.multiple_of(a_ptrs, [1, 16]), [1, 8])  # in bytes, in elements
        for step in range(num_steps):
            # Late, so that nobody gets a tile that another has time for, but not so late that it must be waited for.
            if step == gl.maximum(num_steps - 4, 0):
                number = take_number(schedule)
            if AHEAD:  # noqa: SIM102 (one is known at compile time)
                if step == gl.maximum(num_steps - 2, 0):
                    # From here on these are the next tile's; a_ptrs and first_col are this one's.
                    tile = tile_of(schedule, number)
                    line, n, slots = tell_gathered(schedule, tile, turn, tables, row_to_slot, BLOCK_M, TILE_N, EVEN)
            bar = ready.index(stage)
            b_tile = b_tiles.index(stage)
            k = step * BLOCK_K
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, b_tiles.dtype.primitive_bitwidth // 8 * BLOCK_K * BLOCK_N)
            if TILE_N < BLOCK_N:
                copy_weights(w, k, first_col, bar, b_tile.slice(0, TILE_N, 0 if B_BY_K else 1), B_BY_K)
                copy_weights(w_up, k, first_col, bar, b_tile.slice(TILE_N, TILE_N, 0 if B_BY_K else 1), B_BY_K)
            else:
                copy_weights(w, k, first_col, bar, b_tile, B_BY_K)
            copy_elements(a_tiles.index(stage), a_ptrs)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            a_ptrs += BLOCK_K
            stage, phase = advance(stage, phase, STAGES)
        if not AHEAD:
            tile = tile_of(schedule, number)
            line, n, slots = tell_gathered(schedule, tile, turn, tables, row_to_slot, BLOCK_M, TILE_N, EVEN)
    async_copy.wait_group(0)


@gluon.jit
def produce_down(
    operands,
    PARTS: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring for every tile of this program: panels of a ragged buffer, one part after the other, weights
    (S, H). What an expert has left after its last panel is copied by threads."""
    ring, schedule, a, panels, w, w_up, tables, num_tiles_n = operands
    a_tiles, b_tiles, ready, empty = ring
    ELEMENT_BYTES: gl.constexpr = b_tiles.dtype.primitive_bitwidth // 8
    stage = 0
    phase = 1
    turn = 0
    line, width, offset, _, start, num_rows, col = tell_place(
        schedule, gl.program_id(0), turn, tables, num_tiles_n, BLOCK_M, BLOCK_N, EVEN
    )
    while line >= 0:
        turn += 1
        number = take_number(schedule)  # a short reduction: it must be on its way
        count = start + num_rows
        pitch = row_stride(width, EVEN)
        rows = (start, num_rows, count, pitch)
        num_steps = num_steps_of(width, EVEN)
        block = ((a, panels), PARTS * line)
        for step in range(PARTS * num_steps):
            part = gl.where(step < num_steps, 0, 1)
            panel = step - part * num_steps
            panel_line = line_of(block, rows, part, panel * BLOCK_K)
            k = offset + panel * BLOCK_K
            bar = ready.index(stage)
            a_tile = a_tiles.index(stage)
            b_tile = b_tiles.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            if EVEN:
                mbarrier.expect(bar, ELEMENT_BYTES * BLOCK_K * (BLOCK_M + BLOCK_N))
                copy_box(panels, [panel_line, 0], bar, a_tile)
            else:
                if panel < pitch // PIECE_N:
                    mbarrier.expect(bar, ELEMENT_BYTES * BLOCK_K * (BLOCK_M + BLOCK_N))
                    copy_box(panels, [panel_line, 0], bar, a_tile)
                else:
                    mbarrier.expect(bar, ELEMENT_BYTES * BLOCK_K * BLOCK_N)
                    col_in = panel * BLOCK_K
                    copy_columns(a_tile, block_start(block), rows, part, col_in, pitch - col_in, PARTS, EVEN)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            if PARTS == 2:
                if part == 0:
                    copy_weights(w, k, col, bar, b_tile, B_BY_K)
                else:
                    copy_weights(w_up, k, col, bar, b_tile, B_BY_K)
            else:
                copy_weights(w, k, col, bar, b_tile, B_BY_K)
            stage, phase = advance(stage, phase, STAGES)
        line, width, offset, _, start, num_rows, col = tell_place(
            schedule, tile_of(schedule, number), turn, tables, num_tiles_n, BLOCK_M, BLOCK_N, EVEN
        )
    if not EVEN:
        async_copy.wait_group(0)


@gluon.jit
def finish_up(
    operands,
    HALF: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, KEEP_PRE: gl.constexpr,
    KEEP_ACT: gl.constexpr, B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ring, schedule, buffers, pre, out, H = operands
    PARTS: gl.constexpr = 2 if GATED else 1
    TILE_N: gl.constexpr = BLOCK_N // PARTS
    STORES: gl.constexpr = (PARTS if KEEP_PRE else 0) + (1 if KEEP_ACT else 0)
    stage = 0
    phase = 0
    turn = 0
    line, width, _, _, start, num_rows, col = hear(schedule, turn)
    while line >= 0:
        turn += 1
        pitch = row_stride(width, EVEN)
        rows = (start + HALF * HALF_M, num_rows - HALF * HALF_M, start + num_rows, pitch)
        acc, stage, phase = multiply(
            ring, stage, phase, H // BLOCK_K, num_rows > HALF * HALF_M, HALF, BLOCK_N, STAGES, True, True, B_BY_K
        )
        tiles = pieces(acc)
        pre_block = (pre, PARTS * line)
        out_block = (out, line)
        tma.store_wait(pendings=0)  # the tile before may have stored an odd number of pieces
        for p in gl.static_range(TILE_N // PIECE_N):
            at = col + p * PIECE_N
            if at < pitch:
                gate = tiles[p] if EVEN else within(tiles[p], width - at)
                if GATED:
                    up = tiles[p + 2] if EVEN else within(tiles[p + 2], width - at)
                if KEEP_PRE:
                    store_panel(buffers.index(2 * HALF + p * STORES % 2), gate, pre_block, rows, 0, at, PARTS, EVEN)
                if KEEP_PRE and GATED:
                    buffer = buffers.index(2 * HALF + (p * STORES + 1) % 2)
                    store_panel(buffer, up, pre_block, rows, 1, at, PARTS, EVEN)
                if KEEP_ACT:
                    act = act_fwd(gate, ACTIVATION, True)
                    if GATED:
                        act *= up
                    buffer = buffers.index(2 * HALF + (p * STORES + STORES - 1) % 2)
                    store_panel(buffer, act, out_block, rows, 0, at, 1, EVEN)
        line, width, _, _, start, num_rows, col = hear(schedule, turn)
    tma.store_wait(pendings=0)


@gluon.jit
def grouped_gemm_up_hopper_kernel(
    x, w1, w3, pre, pre_boxes, out, out_boxes, widths, offsets, row_offsets, numbers, tiles, row_to_slot,
    ragged_offsets, H, stride_xt,
    TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, KEEP_PRE: gl.constexpr, KEEP_ACT: gl.constexpr,
    B_BY_K: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    TILE_N: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    ring = make_weights_ring(x.dtype.element_ty, True, B_BY_K, BLOCK_M, BLOCK_N, STAGES)
    buffers = make_buffers(x.dtype.element_ty, 4, PIECE_N)
    tables = (widths, offsets, row_offsets, ragged_offsets, tiles)
    schedule = make_schedule(numbers + 3, num_ragged_tiles(numbers, TILE_N))
    consumer = (ring, schedule, buffers, (pre, pre_boxes), (out, out_boxes), H)
    producer = (ring, schedule, x, w1, w3, tables, row_to_slot, H, stride_xt)
    gl.warp_specialize(
        [
            (finish_up, (consumer, 0, ACTIVATION, GATED, KEEP_PRE, KEEP_ACT, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (finish_up, (consumer, 1, ACTIVATION, GATED, KEEP_PRE, KEEP_ACT, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (produce, (producer, TOP_K, B_BY_K, EVEN, True, BLOCK_M, BLOCK_N, TILE_N, STAGES)),
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
    ring, schedule, buffers, y, y_boxes, H = operands
    stage = 0
    phase = 0
    turn = 0
    line, width, _, first_row, _, num_rows, col = hear(schedule, turn)
    while line >= 0:
        turn += 1
        num_rows -= HALF * HALF_M
        acc, stage, phase = multiply(
            ring, stage, phase, PARTS * num_steps_of(width, EVEN), num_rows > 0, HALF, BLOCK_N, STAGES, not EVEN,
            True, B_BY_K,
        )  # fmt: skip
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
        line, width, _, first_row, _, num_rows, col = hear(schedule, turn)
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
    tables = (widths, offsets, row_offsets, ragged_offsets, row_blocks)
    consumer = (ring, schedule, buffers, y, y_boxes, H)
    producer = (ring, schedule, a, panels, w, w_up, tables, num_tiles_n)
    gl.warp_specialize(
        [
            (finish_down, (consumer, 0, PARTS, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (finish_down, (consumer, 1, PARTS, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
            (produce_down, (producer, PARTS, B_BY_K, EVEN, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
