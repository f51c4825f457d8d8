"""Counting sort of the slots into stable expert order, and the tile schedule, in two launches.

Every program owns a span of consecutive slots. The first kernel counts each span's experts; the second sums those
counts into the span's first free row of each expert, and numbers the span's slots from there. No atomics, nothing is
read back.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.kernels.config import BLOCK_M, LayoutTables, cdiv, layout_tables
from triton_moe.kernels.launch import Launcher
from triton_moe.kernels.tiles import ROW_ALIGNMENT
from triton_moe.layout import RAGGED_ALIGNMENT, ExpertLayout, Routing, num_row_blocks

_MAX_SPANS = 256
"""Programs that count: the second kernel reads this many counts an expert in each of its programs."""
_TILE = 8192
"""Elements of a (slots, experts) comparison held in registers."""


@triton.jit
def load_ids(topk_ids, slots, end, NUM_EXPERTS: tl.constexpr):
    """Ids as int32, -1 for whatever is no expert (compared before the cast, which could wrap an int64 into range)."""
    ids = tl.load(topk_ids + slots, mask=slots < end, other=-1)
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "span"])
def route_count_kernel(
    topk_ids, span_counts, num_slots, span, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """span_counts[p, e] = how often the p-th span of slots names expert e."""
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    end = tl.minimum((program + 1) * span, num_slots)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(program * span, end, SLOTS):
        ids = load_ids(topk_ids, first + tl.arange(0, SLOTS), end, NUM_EXPERTS)
        counts += tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(span_counts + program * EXPERTS + experts, counts)


@triton.jit
def fill(pointers, first, end, value, BLOCK: tl.constexpr):
    """pointers[first : end] = value, shared among the programs."""
    for start in range(first + tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(pointers + place, tl.full([BLOCK], value, tl.int32), mask=place < end)


@triton.jit
def schedule(
    rows, experts, width_rank, row_blocks, num_row_blocks, expert_order,
    NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row blocks, widest experts first, and experts by row count: each program writes those of its experts."""
    real = experts < NUM_EXPERTS
    rank = tl.load(width_rank + experts, mask=real, other=NUM_EXPERTS)
    blocks = tl.cdiv(rows, BLOCK_M)
    for expert in range(tl.program_id(0), NUM_EXPERTS, tl.num_programs(0)):
        own_rows = tl.sum(tl.where(experts == expert, rows, 0))
        larger = (rows > own_rows) | ((rows == own_rows) & (experts < expert))
        tl.store(expert_order + tl.sum((larger & real).to(tl.int32)), expert)
        own_rank = tl.load(width_rank + expert)
        first_block = tl.sum(tl.where(rank < own_rank, blocks, 0))
        own_blocks = tl.cdiv(own_rows, BLOCK_M)
        for start in range(0, own_blocks, BLOCK):
            block = start + tl.arange(0, BLOCK)
            entry = row_blocks + 2 * (first_block + block)
            tl.store(entry, tl.full([BLOCK], 0, tl.int32) + expert, mask=block < own_blocks)
            tl.store(entry + 1, block, mask=block < own_blocks)
    fill(row_blocks, 2 * tl.sum(blocks), 2 * num_row_blocks, -1, BLOCK)


@triton.jit(do_not_specialize=["num_slots", "span", "num_spans", "num_row_blocks"])
def route_place_kernel(
    topk_ids, span_counts, widths, width_rank,
    counts, row_offsets, ragged_offsets, row_to_slot, slot_to_row, row_blocks, expert_order,
    num_slots, span, num_spans, num_row_blocks,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, ALIGNMENT:
    tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    real = experts < NUM_EXPERTS
    total = tl.zeros([EXPERTS], tl.int32)
    earlier = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_spans, SLOTS):
        spans = first + tl.arange(0, SLOTS)
        of_span = span_counts + spans[:, None] * EXPERTS + experts[None, :]
        counted = tl.load(of_span, mask=(spans < num_spans)[:, None], other=0)
        total += tl.sum(counted, 0)
        earlier += tl.sum(tl.where((spans < program)[:, None], counted, 0), 0)

    width = tl.load(widths + experts, mask=real, other=0)
    rows = tl.where(width > 0, total, 0)
    last_row = tl.cumsum(rows, 0)
    if program == 0:
        tl.store(counts + experts, total, mask=real)
        tl.store(row_offsets, 0)
        tl.store(row_offsets + 1 + experts, last_row, mask=real)
        numel = rows.to(tl.int64) * (tl.cdiv(width, ROW_ALIGNMENT) * ROW_ALIGNMENT)
        tl.store(ragged_offsets, 0)
        tl.store(ragged_offsets + 1 + experts, tl.cumsum(tl.cdiv(numel, ALIGNMENT) * ALIGNMENT, 0), mask=real)

    next_row = last_row - rows + earlier
    end = tl.minimum((program + 1) * span, num_slots)
    for first in range(program * span, end, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        ids = load_ids(topk_ids, slots, end, NUM_EXPERTS)
        owns = ((ids[:, None] == experts[None, :]) & (width > 0)[None, :]).to(tl.int32)
        row = tl.sum(owns * (next_row[None, :] + tl.cumsum(owns, 0) - 1), 1)
        placed = tl.sum(owns, 1) > 0
        tl.store(slot_to_row + slots, tl.where(placed, row, -1), mask=slots < end)
        tl.store(row_to_slot + row, slots, mask=placed)
        next_row += tl.sum(owns, 0)
    fill(row_to_slot, tl.sum(rows), num_slots, -1, SLOTS)
    schedule(rows, experts, width_rank, row_blocks, num_row_blocks, expert_order, NUM_EXPERTS, BLOCK_M, SLOTS)


class _Launchers(NamedTuple):
    count: Launcher
    place: Launcher
    tables: LayoutTables
    experts: int
    """E, padded to a power of 2."""
    slots: int
    """Slots a program compares with all experts at once: a span is a multiple of them."""


@functools.lru_cache(maxsize=256)
def _launchers(layout: ExpertLayout, device: torch.device) -> _Launchers:
    experts = triton.next_power_of_2(layout.num_experts)
    slots = max(1, min(64, _TILE // experts))
    options = {"NUM_EXPERTS": layout.num_experts, "EXPERTS": experts, "SLOTS": slots}
    return _Launchers(
        Launcher(route_count_kernel, **options),
        Launcher(route_place_kernel, **options, BLOCK_M=BLOCK_M, ALIGNMENT=RAGGED_ALIGNMENT),
        layout_tables(layout, device),
        experts,
        slots,
    )


def _sizes(num_slots: int, layout: ExpertLayout) -> list[int]:
    """Elements of the pieces of a packed routing, each a multiple of 16 bytes, in the order of `unpack`.

    num_slots may be symbolic: then so are the sizes.
    """
    num_experts = layout.num_experts
    of_experts = (num_experts, num_experts + 1, num_experts, 2 * (num_experts + 1))
    of_slots = (2 * num_row_blocks(num_slots, layout, BLOCK_M), num_slots, num_slots)
    return [(size + 3) // 4 * 4 for size in (*of_experts, *of_slots)]


def packed_numel(num_slots: int, layout: ExpertLayout) -> int:
    """int32 elements of a packed routing."""
    return sum(_sizes(num_slots, layout))


def unpack(packed: Tensor, topk_ids: Tensor, layout: ExpertLayout, backend: str = "auto") -> Routing:
    """The routing of `topk_ids` as views of `packed`, for kernels: one-dimensional, a few elements too long."""
    pieces = packed.split(_sizes(topk_ids.numel(), layout))
    counts, row_offsets, expert_order, ragged_offsets, row_blocks, row_to_slot, slot_to_row = pieces
    return Routing(
        layout, topk_ids, counts, row_offsets, ragged_offsets.view(torch.int64), row_to_slot, slot_to_row, row_blocks,
        expert_order, BLOCK_M, backend, packed,
    )  # fmt: skip


def trimmed(routing: Routing) -> Routing:
    """An unpacked routing with its tensors in the shapes that `Routing` promises."""
    num_experts, num_slots, num_blocks = routing.layout.num_experts, routing.num_rows, routing.num_row_blocks
    return dataclasses.replace(
        routing,
        counts=routing.counts[:num_experts],
        row_offsets=routing.row_offsets[: num_experts + 1],
        ragged_offsets=routing.ragged_offsets[: num_experts + 1],
        row_to_slot=routing.row_to_slot[:num_slots],
        slot_to_row=routing.slot_to_row[:num_slots].view(routing.topk_ids.shape),
        row_blocks=routing.row_blocks[: 2 * num_blocks].view(num_blocks, 2),
        expert_order=routing.expert_order[:num_experts],
    )


def route(topk_ids: Tensor, layout: ExpertLayout, backend: str = "auto") -> Routing:
    """`topk_ids (T, K)` int32 or int64 -> `Routing` with the tile schedule, as `unpack` gives it.

    Ids outside [0, E) drop their slots.
    """
    ids, num_experts, num_slots = topk_ids.contiguous(), layout.num_experts, topk_ids.numel()
    count, place, tables, experts, slots = _launchers(layout, ids.device)
    span = slots * max(1, cdiv(num_slots, slots * _MAX_SPANS))
    num_spans = cdiv(num_slots, span)
    packed = torch.empty(packed_numel(num_slots, layout), dtype=torch.int32, device=ids.device)
    span_counts = torch.empty(num_spans * experts, dtype=torch.int32, device=ids.device)
    routing = unpack(packed, topk_ids, layout, backend)
    count((num_spans,), ids, span_counts, num_slots, span)
    place(
        (max(num_spans, min(num_experts, _MAX_SPANS)),), ids, span_counts, tables.widths, tables.width_rank,
        routing.counts, routing.row_offsets, routing.ragged_offsets, routing.row_to_slot, routing.slot_to_row,
        routing.row_blocks, routing.expert_order, num_slots, span, num_spans, routing.num_row_blocks,
    )  # fmt: skip
    return routing
