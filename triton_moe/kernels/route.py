"""Counting sort of the slots into stable expert order, and the tile schedule, in three launches.

A span is SLOTS consecutive slots. The first kernel counts each span's experts, the second sums these counts over the
spans before, and the third numbers the span's slots from there. No atomics on memory, nothing is read back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.kernels.config import BLOCK_M, FEW_ROWS_BLOCK_M, LayoutTables, cdiv, layout_tables
from triton_moe.kernels.launch import Launcher, Piece
from triton_moe.kernels.tiles import ROW_ALIGNMENT
from triton_moe.layout import RAGGED_ALIGNMENT, ExpertLayout, Routing, TileLists, num_row_blocks

_COLUMNS = 128, 256
"""Columns of the blocks that `TileLists` knows."""
_SLOTS = 128
"""Slots of a span: each is compared with all others."""
_RAGGED_OFFSETS = 3
"""Place among the pieces of a packed routing of the one that is int64."""
_SPANS = 1024
"""Spans that a program of the second kernel sums at once."""


@triton.jit
def load_ids(topk_ids, slots, end, NUM_EXPERTS: tl.constexpr):
    """Ids as int32, -1 for whatever is no expert (compared before the cast, which could wrap an int64 into range)."""
    ids = tl.load(topk_ids + slots, mask=slots < end, other=-1)
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots"])
def route_count_kernel(
    topk_ids, span_counts, num_slots, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """span_counts[p, e] = how often the p-th span of slots names expert e."""
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    ids = load_ids(topk_ids, slots, num_slots, NUM_EXPERTS)
    counts = tl.histogram(tl.maximum(ids, 0), EXPERTS, mask=ids >= 0)
    tl.store(span_counts + tl.program_id(0).to(tl.int64) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit(do_not_specialize=["num_spans"])
def route_sum_kernel(span_counts, counts, num_spans, EXPERTS: tl.constexpr, SPANS: tl.constexpr):
    """span_counts[p, e] becomes the sum over all spans before p, counts[e] that over all."""
    expert = tl.program_id(0)
    total = 0
    for first in range(0, num_spans, SPANS):
        spans = first + tl.arange(0, SPANS)
        of_span = span_counts + spans.to(tl.int64) * EXPERTS + expert
        counted = tl.load(of_span, mask=spans < num_spans, other=0)
        tl.store(of_span, total + tl.cumsum(counted, 0) - counted, mask=spans < num_spans)
        total += tl.sum(counted)
    tl.store(counts + expert, total)


@triton.jit
def fill(pointers, first, end, value, program, programs, BLOCK: tl.constexpr):
    """pointers[first : end] = value, shared among `programs`, of which this is the `program`-th."""
    for start in range(first + program * BLOCK, end, programs * BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(pointers + place, tl.full([BLOCK], value, tl.int32), mask=place < end)


@triton.jit
def list_parts(entries, first, expert, number, BLOCK: tl.constexpr):
    """entries[first + i] = (expert, i) for every i < number."""
    for start in range(0, number, BLOCK):
        part = start + tl.arange(0, BLOCK)
        entry = entries + 2 * (first + part)
        tl.store(entry, tl.full([BLOCK], 0, tl.int32) + expert, mask=part < number)
        tl.store(entry + 1, part, mask=part < number)


@triton.jit
def schedule(
    rows, experts, width, width_rank, row_blocks, num_row_blocks, expert_order, tiles,
    NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row blocks, widest experts first, experts by row count, and the lists of tiles unless these are None: a program
    writes those of one expert."""
    real = experts < NUM_EXPERTS
    rank = tl.load(width_rank + experts, mask=real, other=NUM_EXPERTS)
    blocks = tl.cdiv(rows, BLOCK_M)
    expert = tl.program_id(0)
    own = experts == expert
    own_rows = tl.sum(tl.where(own, rows, 0))
    own_blocks = tl.cdiv(own_rows, BLOCK_M)
    larger = ((rows > own_rows) | ((rows == own_rows) & (experts < expert))) & real
    wider = rank < tl.load(width_rank + expert)
    tl.store(expert_order + tl.sum(larger.to(tl.int32)), expert)
    list_parts(row_blocks, tl.sum(tl.where(wider, blocks, 0)), expert, own_blocks, BLOCK)
    total_blocks = tl.sum(blocks)
    fill(row_blocks, 2 * total_blocks, 2 * num_row_blocks, -1, expert, NUM_EXPERTS, BLOCK)
    if tiles is not None:
        numbers, ragged_128, ragged_256, weights_128, weights_256 = tiles
        narrow, wide = tl.cdiv(width, 128), tl.cdiv(width, 256)
        own_narrow, own_wide = tl.sum(tl.where(own, narrow, 0)), tl.sum(tl.where(own, wide, 0))
        list_parts(ragged_128, tl.sum(tl.where(wider, blocks * narrow, 0)), expert, own_blocks * own_narrow, BLOCK)
        list_parts(ragged_256, tl.sum(tl.where(wider, blocks * wide, 0)), expert, own_blocks * own_wide, BLOCK)
        list_parts(weights_128, tl.sum(tl.where(larger, narrow, 0)), expert, own_narrow, BLOCK)
        list_parts(weights_256, tl.sum(tl.where(larger, wide, 0)), expert, own_wide, BLOCK)
        if expert == 0:
            tl.store(numbers, total_blocks)
            tl.store(numbers + 1, tl.sum(blocks * narrow))
            tl.store(numbers + 2, tl.sum(blocks * wide))
            tl.store(numbers + 3, 0)


@triton.jit
def store_offsets(
    rows, width, row_offsets, ragged_offsets, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, ALIGNMENT: tl.constexpr
):  # fmt: skip
    """Where each expert's rows and its block of a ragged buffer start, from its number of rows and its width."""
    experts = tl.arange(0, EXPERTS)
    real = experts < NUM_EXPERTS
    tl.store(row_offsets, 0)
    tl.store(row_offsets + 1 + experts, tl.cumsum(rows, 0), mask=real)
    numel = rows.to(tl.int64) * (tl.cdiv(width, ROW_ALIGNMENT) * ROW_ALIGNMENT)
    tl.store(ragged_offsets, 0)
    tl.store(ragged_offsets + 1 + experts, tl.cumsum(tl.cdiv(numel, ALIGNMENT) * ALIGNMENT, 0), mask=real)


@triton.jit(do_not_specialize=["num_slots", "num_row_blocks"])
def route_place_kernel(
    topk_ids, span_counts, counts, widths, width_rank,
    row_offsets, ragged_offsets, row_to_slot, slot_to_row, row_blocks, expert_order,
    numbers, ragged_128, ragged_256, weights_128, weights_256, num_slots, num_row_blocks,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The first E programs write an expert's share of the schedule each, the others a span's places."""
    experts = tl.arange(0, EXPERTS)
    real = experts < NUM_EXPERTS
    width = tl.load(widths + experts, mask=real, other=0)
    rows = tl.where(width > 0, tl.load(counts + experts, mask=real, other=0), 0)
    span = tl.program_id(0) - NUM_EXPERTS
    if span < 0:
        tiles = (numbers, ragged_128, ragged_256, weights_128, weights_256)
        schedule(
            rows, experts, width, width_rank, row_blocks, num_row_blocks, expert_order, tiles, NUM_EXPERTS, BLOCK_M,
            SLOTS,
        )  # fmt: skip
    else:
        if span == 0:
            store_offsets(rows, width, row_offsets, ragged_offsets, NUM_EXPERTS, EXPERTS, ALIGNMENT)
        places = tl.arange(0, SLOTS)
        slots = span * SLOTS + places
        ids = load_ids(topk_ids, slots, num_slots, NUM_EXPERTS)
        known = ids >= 0
        placed = known & (tl.load(widths + ids, mask=known, other=0) > 0)
        earlier_spans = tl.load(span_counts + span.to(tl.int64) * EXPERTS + ids, mask=placed, other=0)
        earlier = tl.zeros([SLOTS], tl.int32)
        for start in tl.static_range(0, SLOTS, 32):  # a few at a time, to spare registers
            others = start + tl.arange(0, 32)
            other_ids = load_ids(topk_ids, span * SLOTS + others, num_slots, NUM_EXPERTS)
            same = (other_ids[None, :] == ids[:, None]) & (others[None, :] < places[:, None])
            earlier += tl.sum(same.to(tl.int32), 1)
        first_row = tl.cumsum(rows, 0) - rows
        row = tl.gather(first_row, tl.maximum(ids, 0), 0) + earlier_spans + earlier
        tl.store(slot_to_row + slots, tl.where(placed, row, -1), mask=slots < num_slots)
        tl.store(row_to_slot + row, slots, mask=placed)
        fill(row_to_slot, tl.sum(rows), num_slots, -1, span, tl.num_programs(0) - NUM_EXPERTS, SLOTS)


class _Launchers(NamedTuple):
    count: Launcher
    sum: Launcher
    place: Launcher
    tables: LayoutTables
    experts: int
    """E, padded to a power of 2."""


@functools.lru_cache(maxsize=256)
def _launchers(layout: ExpertLayout, device: torch.device) -> _Launchers:
    experts = triton.next_power_of_2(layout.num_experts)
    of_span = {"NUM_EXPERTS": layout.num_experts, "EXPERTS": experts, "SLOTS": _SLOTS}
    return _Launchers(
        Launcher(route_count_kernel, **of_span),
        Launcher(route_sum_kernel, EXPERTS=experts, SPANS=_SPANS),
        Launcher(route_place_kernel, **of_span, BLOCK_M=BLOCK_M, ALIGNMENT=RAGGED_ALIGNMENT),
        layout_tables(layout, device),
        experts,
    )


def _block_m(few: bool) -> int:
    return FEW_ROWS_BLOCK_M if few else BLOCK_M


def _sizes(num_slots: int, layout: ExpertLayout, few: bool = False) -> list[int]:
    """Elements of the pieces of a packed routing, each a multiple of 16 bytes, in the order of `_routing`.

    One of `few` slots (`kernels/decode.py`) has no lists of tiles. num_slots may be symbolic: then so are the sizes.
    """
    num_experts, num_blocks = layout.num_experts, num_row_blocks(num_slots, layout, _block_m(few))
    of_experts = (num_experts, num_experts + 1, num_experts, 2 * (num_experts + 1))
    of_slots = (2 * num_blocks, num_slots, num_slots)
    ragged = (2 * num_blocks * cdiv(layout.max_width, columns) for columns in _COLUMNS)
    weights = (2 * layout.num_column_blocks(columns) for columns in _COLUMNS)
    of_tiles = () if few else (4, *ragged, *weights)
    return [(size + 3) // 4 * 4 for size in (*of_experts, *of_slots, *of_tiles)]


_known_sizes = functools.lru_cache(maxsize=1024)(_sizes)
"""For eager calls: torch.compile looks through no cache."""


def packed_numel(num_slots: int, layout: ExpertLayout) -> int:
    """int32 elements of a packed routing."""
    return sum(_sizes(num_slots, layout))


def empty_packed(ids: Tensor, layout: ExpertLayout, few: bool = False) -> Tensor:
    """Memory for a packed routing of ids, in eager calls."""
    return torch.empty(sum(_known_sizes(ids.numel(), layout, few)), dtype=torch.int32, device=ids.device)


def _routing(
    pieces: Sequence, packed: Tensor, topk_ids: Tensor, layout: ExpertLayout, panels: bool, few: bool
) -> Routing:
    counts, row_offsets, expert_order, ragged_offsets, row_blocks, row_to_slot, slot_to_row, *of_tiles = pieces
    tiles = None
    if not few:
        numbers, ragged_128, ragged_256, weights_128, weights_256 = of_tiles
        tiles = TileLists(numbers, {128: ragged_128, 256: ragged_256}, {128: weights_128, 256: weights_256})
    return Routing(
        layout, topk_ids, counts, row_offsets, ragged_offsets, row_to_slot, slot_to_row, row_blocks, expert_order,
        _block_m(few), panels, tiles, packed,
    )  # fmt: skip


_DTYPES = tuple(torch.int64 if place == _RAGGED_OFFSETS else torch.int32 for place in range(12))


def unpack(
    packed: Tensor, topk_ids: Tensor, layout: ExpertLayout, *, panels: bool = False, few: bool = False
) -> Routing:
    """The routing of `topk_ids`, for kernels: its tensors are `Piece`s of `packed`, a few elements too long."""
    address, first, pieces = packed.data_ptr(), 0, []
    for size, dtype in zip(_known_sizes(topk_ids.numel(), layout, few), _DTYPES, strict=False):
        pieces.append(Piece(packed, first, size, dtype, address + 4 * first))
        first += size
    return _routing(pieces, packed, topk_ids, layout, panels, few)


def trimmed(packed: Tensor, topk_ids: Tensor, layout: ExpertLayout, *, few: bool = False) -> Routing:
    """The routing of `topk_ids` with views of `packed` in the shapes that `Routing` promises."""
    pieces = list(packed.split(_sizes(topk_ids.numel(), layout, few)))
    pieces[_RAGGED_OFFSETS] = pieces[_RAGGED_OFFSETS].view(torch.int64)
    routing = _routing(pieces, packed, topk_ids, layout, False, few)
    num_experts, num_slots, num_blocks = layout.num_experts, routing.num_rows, routing.num_row_blocks
    return dataclasses.replace(
        routing,
        counts=routing.counts[:num_experts],
        row_offsets=routing.row_offsets[: num_experts + 1],
        ragged_offsets=routing.ragged_offsets[: num_experts + 1],
        row_to_slot=routing.row_to_slot[:num_slots],
        slot_to_row=routing.slot_to_row[:num_slots].view(topk_ids.shape),
        row_blocks=routing.row_blocks[: 2 * num_blocks].view(num_blocks, 2),
        expert_order=routing.expert_order[:num_experts],
    )


def route(topk_ids: Tensor, layout: ExpertLayout, panels: bool = False) -> Routing:
    """`topk_ids (T, K)` int32 or int64 -> `Routing` with the tile schedule, as `unpack` gives it.

    Ids outside [0, E) drop their slots.
    """
    ids, num_experts, num_slots = topk_ids.contiguous(), layout.num_experts, topk_ids.numel()
    count, sum_spans, place, tables, experts = _launchers(layout, ids.device)
    num_spans = cdiv(num_slots, _SLOTS)
    packed = empty_packed(ids, layout)
    span_counts = packed.new_empty(num_spans * experts)
    routing = unpack(packed, topk_ids, layout, panels=panels)
    assert routing.tiles is not None
    numbers, ragged, weights = routing.tiles
    count((num_spans,), ids, span_counts, num_slots)
    sum_spans((num_experts,), span_counts, routing.counts, num_spans)
    place(
        (num_experts + max(num_spans, 1),), ids, span_counts, routing.counts, tables.widths, tables.width_rank,
        routing.row_offsets, routing.ragged_offsets, routing.row_to_slot, routing.slot_to_row, routing.row_blocks,
        routing.expert_order, numbers, *ragged.values(), *weights.values(), num_slots, routing.num_row_blocks,
    )  # fmt: skip
    return routing
