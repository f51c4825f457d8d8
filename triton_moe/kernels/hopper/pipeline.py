"""What the Hopper GEMMs share: a ring of stages in shared memory, filled by one producer, drained by two consumers.

A program stays on its multiprocessor and takes one tile after the other. It is three warpgroups: the producer copies a
stage's two operand tiles into shared memory; each consumer multiplies its half of the rows, 64 x BLOCK_N, and finishes
them while the other goes on. `ready` and `empty` are a barrier each a stage: its tiles are there; both have read them.

Tiles are handed out in their order, by a counter: the producer finds a tile's place and tells the consumers. Programs
that took every n-th, as `dw`'s do, drifted apart, some multiprocessors being slower, until what they read no longer
fitted into the L2 together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_K = gl.constexpr(64)
"""Reduction of a stage: one 128-byte line of 16-bit elements."""
HALF_M = gl.constexpr(64)
"""Rows of a consumer."""
PIECE_N = gl.constexpr(64)
"""Columns that a consumer finishes at a time: never of two experts, unless past one's width, nor of gate and up. Also
those of a panel (`Routing.panels`), which is then one stage of a reduction over an expert's columns, or a piece."""
PRODUCER_THREADS = gl.constexpr(128)

THREADS_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""An element a thread."""

# triton 3.9 renamed these.
copy_elements = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.constexpr_function
def shared_layout(shape, element):
    return gl.NVMMASharedLayout.get_default_for([int(n) for n in shape], element)


@gluon.constexpr_function
def accumulator_layout(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def wide_layout(columns):
    """16 bytes a thread, 128 bytes a row at a time where there are as many: few rows a thread, and so few pointers."""
    across = min(8, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.constexpr_function
def piece_layout(columns):
    """`wide_layout`; but of the 64 rows of a piece of 32 columns a warp has those that it has in an accumulator, so
    that their numbers are in registers once. With 64 columns this makes `up` slower."""
    if columns != 32:
        return wide_layout(columns)
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, 32])


@gluon.jit
def make_ring(
    element: gl.constexpr, A_SHAPE_0: gl.constexpr, A_SHAPE_1: gl.constexpr, B_SHAPE_0: gl.constexpr,
    B_SHAPE_1: gl.constexpr, STAGES: gl.constexpr, READY_COUNT: gl.constexpr,
):  # fmt: skip
    """-> operand tiles a and b, barriers ready and empty. `READY_COUNT`: arrivals that make a stage ready."""
    a_layout: gl.constexpr = shared_layout([A_SHAPE_0, A_SHAPE_1], element)
    b_layout: gl.constexpr = shared_layout([B_SHAPE_0, B_SHAPE_1], element)
    a = gl.allocate_shared_memory(element, [STAGES, A_SHAPE_0, A_SHAPE_1], a_layout)
    b = gl.allocate_shared_memory(element, [STAGES, B_SHAPE_0, B_SHAPE_1], b_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=READY_COUNT)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    return a, b, ready, empty


@gluon.jit
def make_schedule(counter, num_tiles):
    """-> the counter, the number of tiles, memory for a number taken, two slots for places of tiles on their way from
    the producer to the consumers, and two barriers a slot: told, by the producer; heard, by both consumers."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    taken = gl.allocate_shared_memory(gl.int32, [PRODUCER_THREADS], layout)
    places = gl.allocate_shared_memory(gl.int32, [2, PRODUCER_THREADS], layout)
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=2)
    return counter, num_tiles, taken, places, told, heard


@gluon.jit
def take_number(schedule):
    """The counter's next number, in the first of the producer's threads. So no thread has to tell the others, and this
    one goes on until `tile_of` needs the number."""
    counter, _, _, _, _, _ = schedule
    threads = gl.arange(0, PRODUCER_THREADS, layout=THREADS_LAYOUT)
    one = gl.full((PRODUCER_THREADS,), 1, gl.int32, THREADS_LAYOUT)
    # An address for each thread, though one alone adds: were they the same, the warp would add as one, and wait.
    return gl.atomic_add(counter + threads, one, mask=threads == 0, sem="relaxed")


@gluon.jit
def tile_of(schedule, number):
    """The tile that a number taken stands for: programs begin with the tiles of their own numbers, so it is as many
    further as there are programs, and may be past the last.

    As many numbers are taken as there are tiles, one for each; the last leaves the counter at 0, as it was.
    """
    counter, num_tiles, taken, _, _, _ = schedule
    threads = gl.arange(0, PRODUCER_THREADS, layout=THREADS_LAYOUT)
    gl.store(counter + 0 * threads, 0 * threads, mask=(threads == 0) & (number == num_tiles - 1))
    taken.store(number)
    return gl.num_programs(0) + scalar_at(taken, 0)


@gluon.jit
def scalar_at(memory, index: gl.constexpr):
    """An element of shared memory as a scalar: the largest of one."""
    return gl.max(memory.slice(index, 1).load(THREADS_LAYOUT), 0)


@gluon.jit
def one_each(numbers):
    """Some integers of one type, the first in the first thread, and so on."""
    threads = gl.arange(0, PRODUCER_THREADS, layout=THREADS_LAYOUT)
    spread = numbers[0] + (0 * threads).to(numbers[0].dtype)
    for i in gl.static_range(1, len(numbers)):
        spread = gl.where(threads == i, numbers[i], spread)
    return spread


@gluon.jit
def make_table(numbers):
    """Integers of 64 bits in shared memory, for `scalar_at`. What a warpgroup is given instead it holds in registers,
    from its first tile to its last."""
    table = gl.allocate_shared_memory(gl.int64, [PRODUCER_THREADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    table.store(one_each(numbers))
    return table


@gluon.jit
def pointer_at(table, index: gl.constexpr, element: gl.constexpr):
    return scalar_at(table, index).to(gl.pointer_type(element))


@gluon.jit
def tell(schedule, place, turn):
    """Tell the consumers a tile's place, seven numbers. `turn` counts the calls."""
    _, _, _, places, told, heard = schedule
    slot = turn % 2
    numbers = one_each(place)
    mbarrier.wait(heard.index(slot), turn // 2 % 2 ^ 1)
    places.index(slot).store(numbers)
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def hear(schedule, turn):
    """What the producer told in the same turn."""
    _, _, _, places, told, heard = schedule
    slot = turn % 2
    place = places.index(slot)
    mbarrier.wait(told.index(slot), turn // 2 % 2)
    line, width, offset = scalar_at(place, 0), scalar_at(place, 1), scalar_at(place, 2)
    first_row, start, num_rows, col = scalar_at(place, 3), scalar_at(place, 4), scalar_at(place, 5), scalar_at(place, 6)
    mbarrier.arrive(heard.index(slot), count=1)
    return line, width, offset, first_row, start, num_rows, col


@gluon.jit
def make_buffers(element: gl.constexpr, NUMBER: gl.constexpr, COLUMNS: gl.constexpr):
    """Pieces of a consumer's rows, to change layouts in."""
    return gl.allocate_shared_memory(element, [NUMBER, HALF_M, COLUMNS], shared_layout([HALF_M, COLUMNS], element))


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def before(stage, STAGES: gl.constexpr):
    """The stage before. Not a variable kept from the last step: one that starts as another's alias is not carried."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def multiply(
    ring, stage, phase, num_steps, has_rows,
    HALF: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BY_THREADS: gl.constexpr, A_BY_K: gl.constexpr,
    B_BY_K: gl.constexpr,
):  # fmt: skip
    """Sum of `num_steps` stages' products (64, BLOCK_N) in fp32, and the ring's next stage and phase.

    A_BY_K, B_BY_K: the operand's tile is stored with the reduction contiguous. Without rows (`has_rows`) the stages
    are released unread. BY_THREADS: threads copy too, and what they wrote must be seen by tensor cores and TMA.
    """
    a_tiles, b_tiles, ready, empty = ring
    acc = gl.zeros((HALF_M, BLOCK_N), gl.float32, accumulator_layout(BLOCK_N))
    if has_rows:
        for step in range(num_steps):
            mbarrier.wait(ready.index(stage), phase)
            if BY_THREADS:
                fence_async_shared()
            if A_BY_K:
                a = a_tiles.index(stage).slice(HALF * HALF_M, HALF_M, 0)
            else:
                a = a_tiles.index(stage).slice(HALF * HALF_M, HALF_M, 1).permute((1, 0))
            b = b_tiles.index(stage).permute((1, 0)) if B_BY_K else b_tiles.index(stage)
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=step > 0)
            stage, phase = advance(stage, phase, STAGES)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=num_steps > 0)
    else:
        for _ in range(num_steps):
            mbarrier.wait(ready.index(stage), phase)
            if BY_THREADS:
                fence_async_shared()
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def halves(tile):
    """Left and right half of a tile's columns."""
    return tile.reshape((tile.shape[0], 2, tile.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def pieces(tile):
    """A tile of 256 columns as four of 64."""
    left, right = halves(tile)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@gluon.jit
def within(tile, num_cols):
    """A tile with zeros in the columns from `num_cols` on."""
    cols = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, tile.type.layout))
    return gl.where((cols < num_cols)[None, :], tile, 0.0)


@gluon.jit
def row_pointers(start, stride, num_rows, num_cols, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Pointers to a tile of 16-bit elements and which of them are within num_rows and num_cols (a multiple of 8), 16
    bytes a thread. `start` and the rows must be aligned so."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    pointers = start + rows[:, None] * stride + cols[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 8])  # in bytes, in elements
    return pointers, (rows < num_rows)[:, None] & (cols // 8 < num_cols // 8)[None, :]


@gluon.jit
def copy_rows(buffer, start, stride, num_rows, num_cols):
    """Start copying a tile into `buffer`, zeros outside of num_rows and num_cols; see `row_pointers`."""
    layout: gl.constexpr = piece_layout(buffer.shape[1])
    pointers, mask = row_pointers(start, stride, num_rows, num_cols, buffer.shape[0], buffer.shape[1], layout)
    copy_elements(buffer, pointers, mask)


@gluon.jit
def store_rows(buffer, tile, start, stride, num_rows, num_cols):
    """Store the part of a tile, of any layout, within num_rows and num_cols, by way of `buffer`; see `row_pointers`."""
    layout: gl.constexpr = piece_layout(tile.shape[1])
    pointers, mask = row_pointers(start, stride, num_rows, num_cols, tile.shape[0], tile.shape[1], layout)
    buffer.store(tile.to(buffer.dtype))
    gl.store(pointers, buffer.load(layout), mask=mask)
