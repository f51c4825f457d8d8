"""Routing of few slots, as in decoding, in one launch: the GEMMs then run in row blocks of 16.

An expert has a row or two, and a layer is as fast as its weights are read. Tiles of 16 rows leave the multiprocessors'
memory to weights on their way, and every tile of columns of every chosen expert is a program of its own.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.kernels.config import FEW_ROWS_BLOCK_M, LayoutTables, layout_tables
from triton_moe.kernels.launch import Launcher
from triton_moe.kernels.route import empty_packed, fill, load_ids, schedule, store_offsets, unpack
from triton_moe.layout import RAGGED_ALIGNMENT, ExpertLayout, Routing

MAX_SLOTS = 512
"""That a program reads at once."""


def is_few(num_slots: int, layout: ExpertLayout) -> bool:
    """Whether a forward pass over so many slots is bound by reading weights: at most 512, and one row block of 16 an
    expert on average, which is 64 tokens of any layer whose K is at most 8 and a quarter of E."""
    return 0 < num_slots <= min(MAX_SLOTS, FEW_ROWS_BLOCK_M * layout.num_experts)


@triton.jit(do_not_specialize=["num_slots", "num_row_blocks"])
def route_few_kernel(
    topk_ids, widths, width_rank, counts, row_offsets, expert_order, ragged_offsets, row_blocks, row_to_slot,
    slot_to_row, num_slots, num_row_blocks,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Every program reads all slots, and places those of its expert; the first also writes what is of all."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    real = experts < NUM_EXPERTS
    width = tl.load(widths + experts, mask=real, other=0)
    slots = tl.arange(0, SLOTS)
    ids = load_ids(topk_ids, slots, num_slots, NUM_EXPERTS)
    placed = (ids >= 0) & (tl.load(widths + ids, mask=ids >= 0, other=0) > 0)
    chosen = tl.histogram(tl.maximum(ids, 0), EXPERTS, mask=ids >= 0)
    rows = tl.where(width > 0, chosen, 0)
    if expert == 0:
        tl.store(counts + experts, chosen, mask=real)
        store_offsets(rows, width, row_offsets, ragged_offsets, NUM_EXPERTS, EXPERTS, ALIGNMENT)
        tl.store(slot_to_row + slots, tl.full([SLOTS], -1, tl.int32), mask=(slots < num_slots) & ~placed)
    own = placed & (ids == expert)
    row = tl.sum(tl.where(experts < expert, rows, 0)) + tl.cumsum(own.to(tl.int32), 0) - 1
    tl.store(slot_to_row + slots, row, mask=own)
    tl.store(row_to_slot + row, slots, mask=own)
    fill(row_to_slot, tl.sum(rows), num_slots, -1, expert, NUM_EXPERTS, SLOTS)
    schedule(
        rows, experts, width, width_rank, row_blocks, num_row_blocks, expert_order, None, NUM_EXPERTS, BLOCK_M, SLOTS
    )


@functools.lru_cache(maxsize=256)
def _launcher(layout: ExpertLayout, device: torch.device) -> tuple[Launcher, LayoutTables]:
    launch = Launcher(
        route_few_kernel, NUM_EXPERTS=layout.num_experts, EXPERTS=triton.next_power_of_2(layout.num_experts),
        SLOTS=MAX_SLOTS, BLOCK_M=FEW_ROWS_BLOCK_M, ALIGNMENT=RAGGED_ALIGNMENT, num_warps=4,
    )  # fmt: skip
    return launch, layout_tables(layout, device)


def route_few(topk_ids: Tensor, layout: ExpertLayout) -> Routing:
    """`topk_ids (T, K)` int32 or int64, of which there are few (`is_few`) -> a `Routing` in row blocks of 16.

    Its tensors are as `unpack` gives them. It has no lists of tiles: it is for the forward GEMMs alone.
    """
    ids = topk_ids.contiguous()
    launch, tables = _launcher(layout, ids.device)
    routing = unpack(empty_packed(ids, layout, few=True), topk_ids, layout, few=True)
    launch(
        (layout.num_experts,), ids, tables.widths, tables.width_rank, routing.counts, routing.row_offsets,
        routing.expert_order, routing.ragged_offsets, routing.row_blocks, routing.row_to_slot, routing.slot_to_row,
        routing.num_rows, routing.num_row_blocks,
    )  # fmt: skip
    return routing
