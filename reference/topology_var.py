"""Which blocks of a block-sparse intermediate matrix exist when experts differ in width.

The intermediate matrix has a row for each padded routed row and a column for each of the S columns of w1. Rows of
expert e meet the columns of expert e alone, so that its nonzero part is a staircase of dense rectangles, cut here into
square blocks of `b = block_size`. Letters as in `triton_moe.layout`; `P` padded rows, `N` blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_moe.layout import ExpertLayout


@dataclass(frozen=True)
class Topology:
    """The blocks in block compressed sparse row order, and the way through them by column. All tensors are int32.

    Two experts of 2 and 1 blocks' width that own 1 and 2 block rows:

        blocks, numbered     0 1 .     row_indices     [0, 0, 1, 2]
                             . . 2     column_indices  [0, 1, 2, 2]
                             . . 3     offsets         [0, 2, 3, 4]

    `block_offsets_t` lists the blocks column by column, `column_indices_t` the block row of each, and `offsets_t` where
    each column starts in both: here [0, 1, 2, 3], [0, 0, 1, 2] and [0, 1, 2, 4].
    """

    shape: tuple[int, int]
    """(P, S)"""
    block_size: int
    row_indices: Tensor
    """(N)"""
    column_indices: Tensor
    """(N)"""
    offsets: Tensor
    """(P / b + 1)"""
    column_indices_t: Tensor
    """(N)"""
    offsets_t: Tensor
    """(S / b + 1)"""
    block_offsets_t: Tensor
    """(N)"""


def enough_bits(num_block_columns: int) -> int:
    """Bits that tell so many block columns apart."""
    return max(1, (num_block_columns - 1).bit_length())


def historical_bits(num_experts: int) -> int:
    """`ceil(log2(E))`: enough only while every expert is one block wide."""
    return max(1, (num_experts - 1).bit_length())


def check_blocks(layout: ExpertLayout, block_size: int) -> None:
    """Raise ValueError unless every width is a multiple of the block size."""
    for e, width in enumerate(layout.widths):
        if width % block_size:
            raise ValueError(f"widths[{e}]: expected a multiple of block_size = {block_size}, got {width}")


@functools.lru_cache(maxsize=256)
def _block_columns(layout: ExpertLayout, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many block columns each expert has, and its first one: `(E)` int64 each, copied to the device once."""
    across, first = (
        torch.tensor([columns // block_size for columns in each], device=device)
        for each in (layout.widths, layout.offsets)
    )
    return across, first


def _offsets(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).int()


def variable_topology(
    block_rows: Tensor, layout: ExpertLayout, block_size: int, sort_bits: int | None = None
) -> Topology:
    """The topology of experts that own so many block rows each, in expert order.

    Args:
        block_rows: `(E)` integers, of a null expert too.
        layout: the experts' widths, multiples of block_size.
        block_size: b.
        sort_bits: the lowest bits of a block's column by which the transposed order is sorted, as a radix sort given
            `end_bit` does; default, `enough_bits`. With fewer, columns that agree in them are left mixed, and whatever
            walks the columns (the gradients of w1 and w2) takes blocks of the wrong experts.

    The number of blocks depends on the routing, so it is read back to the host. What depends on the layout alone is
    copied to the device at the first call for it.
    """
    check_blocks(layout, block_size)
    device, num_columns = block_rows.device, layout.total_width // block_size
    experts = torch.arange(layout.num_experts, device=device).repeat_interleave(block_rows)
    blocks_across, first_column = (each[experts] for each in _block_columns(layout, block_size, device))

    offsets = _offsets(blocks_across)
    rows = torch.arange(experts.numel(), device=device).repeat_interleave(blocks_across)
    columns = torch.arange(rows.numel(), device=device) - offsets[rows] + first_column[rows]

    bits = enough_bits(num_columns) if sort_bits is None else sort_bits
    by_column = (columns & (2**bits - 1)).argsort(stable=True)
    return Topology(
        shape=(experts.numel() * block_size, layout.total_width),
        block_size=block_size,
        row_indices=rows.int(),
        column_indices=columns.int(),
        offsets=offsets,
        column_indices_t=rows[by_column].int(),
        offsets_t=_offsets(torch.bincount(columns, minlength=num_columns)),
        block_offsets_t=by_column.int(),
    )
