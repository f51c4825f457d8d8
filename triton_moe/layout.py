"""Where everything is: experts in the packed weights, routed rows in expert order, activations in the ragged buffer.

Letters: `T` tokens, `H` hidden size, `E` experts, `K` experts per token, `R = T*K` slots, `I_e` width of expert e,
`S = sum(I_e)`, `n_e` rows routed to expert e. A *slot* is one (token, k) pair, numbered `t*K + k`; a *row* is a slot's
place once the slots are sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor, sym_min

RAGGED_ALIGNMENT = 64
"""Elements to which the start of each expert's block in a ragged buffer is rounded up."""
PANEL_WIDTH = 64
"""Columns of a panel (`Routing.panels`): 128 bytes in 16 bits, a line of shared memory."""
ROW_ALIGNMENT = 8
"""Elements to which a row of a ragged buffer is rounded up: 16 bytes in 16 bits, the widest load of a thread."""


def _as_int(value: object, argument: str) -> int:
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{argument}: expected an integer, got {value!r}") from None


@dataclass(frozen=True)
class ExpertLayout:
    """The static, host-side half: how wide each expert is and where its columns stand in the packed weights.

    Expert e owns columns `offsets[e] : offsets[e] + widths[e]` of w1 and w3 `(H, S)` and the same rows of w2 `(S, H)`.
    Widths need not be multiples of anything; an expert of width 0 is a null expert: it can be chosen, and does nothing.

    >>> layout = ExpertLayout.from_sizes([(2, 512), (1, 100), (1, 0)])
    >>> layout.widths, layout.offsets, layout.total_width
    ((512, 512, 100, 0), (0, 512, 1024, 1124), 1124)
    >>> layout.width_classes
    {512: (0, 1), 100: (2,), 0: (3,)}
    """

    widths: tuple[int, ...]
    offsets: tuple[int, ...] = field(init=False, compare=False)
    total_width: int = field(init=False, compare=False)
    max_width: int = field(init=False, compare=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.widths, (str, bytes)) or not isinstance(self.widths, Iterable):
            raise ValueError(f"widths: expected a sequence of integers, got {self.widths!r}")
        widths = tuple(_as_int(width, f"widths[{e}]") for e, width in enumerate(self.widths))
        if not widths:
            raise ValueError("widths: expected at least one expert, got none")
        for e, width in enumerate(widths):
            if width < 0:
                raise ValueError(f"widths[{e}]: expected 0 or more, got {width}")
        if not any(widths):
            raise ValueError(f"widths: expected at least one expert wider than 0, got {len(widths)} of width 0")
        *offsets, total = accumulate(widths, initial=0)
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "offsets", tuple(offsets))
        object.__setattr__(self, "total_width", total)
        object.__setattr__(self, "max_width", max(widths))
        object.__setattr__(self, "_hash", hash(widths))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def from_widths(cls, widths: Iterable[int]) -> ExpertLayout:
        """One width per expert. Raises ValueError if there is none, one is negative, or all are 0."""
        return cls(widths)  # type: ignore[arg-type]

    @classmethod
    def from_sizes(cls, expert_sizes: Iterable[Sequence[int]]) -> ExpertLayout:
        """`[(count, width), ...]`, experts in that order. Raises ValueError on a negative number or no expert."""
        if isinstance(expert_sizes, (str, bytes)) or not isinstance(expert_sizes, Iterable):
            raise ValueError(f"expert_sizes: expected a sequence of (count, width) pairs, got {expert_sizes!r}")
        widths: list[int] = []
        for i, pair in enumerate(expert_sizes):
            try:
                count, width = pair
            except (TypeError, ValueError):
                raise ValueError(f"expert_sizes[{i}]: expected a (count, width) pair, got {pair!r}") from None
            count = _as_int(count, f"expert_sizes[{i}] count")
            width = _as_int(width, f"expert_sizes[{i}] width")
            if count < 0 or width < 0:
                raise ValueError(f"expert_sizes[{i}]: expected count and width of 0 or more, got {(count, width)}")
            widths += [width] * count
        if not widths:
            raise ValueError("expert_sizes: expected at least one expert, got none")
        if not any(widths):
            raise ValueError(f"expert_sizes: expected an expert wider than 0, got {len(widths)} of width 0")
        return cls(tuple(widths))

    @property
    def num_experts(self) -> int:
        return len(self.widths)

    @property
    def width_classes(self) -> dict[int, tuple[int, ...]]:
        """Width -> the experts that have it, in order of first appearance."""
        classes: dict[int, tuple[int, ...]] = {}
        for e, width in enumerate(self.widths):
            classes[width] = (*classes.get(width, ()), e)
        return classes

    @property
    def num_rivals(self) -> list[int]:
        """For each expert, how many have its width, itself included; 0 if it alone has it, but 1 if that is so of all.

        >>> ExpertLayout.from_widths([8, 8, 5]).num_rivals, ExpertLayout.from_widths([8, 5]).num_rivals
        ([2, 2, 0], [1, 1])
        """
        classes = self.width_classes
        lonely = 0 if any(len(experts) > 1 for experts in classes.values()) else 1
        return [len(classes[width]) if len(classes[width]) > 1 else lonely for width in self.widths]

    def num_column_blocks(self, columns: int) -> int:
        """How many blocks of so many columns the experts have, the last of each cut off where the expert ends."""
        return sum(-(-width // columns) for width in self.widths)

    def columns(self, expert: int) -> slice:
        """The expert's columns in w1 and w3, its rows in w2."""
        return slice(self.offsets[expert], self.offsets[expert] + self.widths[expert])

    def split(self, packed: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Each expert's matrix as a view of packed weights (or their gradient): w1 and w3 along dim 1, w2 along dim 0.

        For optimizers that work on matrices, as Muon does: on the packed weights it would mix the experts. Raises
        ValueError if the dimension is not S long, or is sharded (as FSDP does dim 0), for the parts would be copies.
        """
        if not isinstance(packed, Tensor):
            raise ValueError(f"packed: expected a tensor, got {packed!r}")
        if not -packed.dim() <= dim < packed.dim() or packed.shape[dim] != self.total_width:
            raise ValueError(f"packed: expected {self.total_width} along dim {dim}, got shape {tuple(packed.shape)}")
        placements = getattr(packed, "placements", ())
        if any(placement.is_shard(dim % packed.dim()) for placement in placements):
            raise ValueError(f"packed: expected a tensor that is whole along dim {dim}, got {placements}")
        return packed.split(self.widths, dim)


class TileLists(NamedTuple):
    """Tiles of ragged matrices, for kernels whose programs walk a list: none is outside of an expert.

    With n = ceil(I_e / columns) blocks of columns, an expert has n tiles for each of its row blocks in a ragged buffer,
    where (e, i) is the tile of row block i // n and columns i % n, and n tiles for each block of rows of its weights.
    """

    numbers: Tensor
    """(4) entries of `row_blocks` that exist, of `ragged[128]`, of `ragged[256]`; how many tiles a running
    kernel has handed out, 0 between kernels: so one at a time can run on a routing."""
    ragged: dict[int, Tensor]
    """Columns of a block -> (expert, i), widest experts first."""
    weights: dict[int, Tensor]
    """Columns of a block -> (expert, i) for each of its blocks, experts with most rows first."""


@dataclass(frozen=True)
class Routing:
    """The device-side half: which slot went where. All tensors are int32 unless said, and none is read by the host.

    Two tokens with K = 2 and three experts of widths 3, 2 and 0 (a null expert); id 3 = E drops its slot:

        topk_ids      [[1, 0],      slots 0 and 1
                       [2, 1]]      slots 2 and 3
        counts          [1, 2, 1]        how often each expert was chosen, null experts too
        row_offsets     [0, 1, 3, 3]     expert e owns rows row_offsets[e] : row_offsets[e+1]; a null expert owns none
        row_to_slot     [1, 0, 3, -1]    stable by expert; -1 past the last row
        slot_to_row     [[1, 0], [-1, 2]]    its inverse; -1 where the slot has no row
        ragged_offsets  [0, 64, 128, 128]    start of expert e's block, rounded up to 64 elements

    In a *ragged buffer* of `parts` values per activation (2 for the gate and up halves of a gated pre-activation)
    expert e's block is a `(n_e, parts, row_stride(I_e))` matrix that starts at element `parts * ragged_offsets[e]`.
    What a row holds past `I_e`, and what lies between the blocks, is unspecified.

    With `panels` the block's columns, those of all parts, come in groups of 64 instead, rows within a group one after
    the other: `row_stride(I_e) // 64` groups of each part, then what is left of each, as narrow as it is. So whatever
    their widths, all experts' groups together are one matrix of 64 columns.

    The kernels' tile schedule, made with the rest (empty when the routing was made without kernels):

        row_blocks      (B, 2)  (expert, i) for rows i*block_m ... of that expert, widest experts first, then (-1, -1)
        expert_order    (E)     experts by row count, largest first
        tiles                   see `TileLists`
    """

    layout: ExpertLayout
    topk_ids: Tensor
    """(T, K), as given."""
    counts: Tensor
    """(E)"""
    row_offsets: Tensor
    """(E + 1)"""
    ragged_offsets: Tensor
    """(E + 1) int64"""
    row_to_slot: Tensor
    """(R)"""
    slot_to_row: Tensor
    """(T, K)"""
    row_blocks: Tensor
    """(B, 2)"""
    expert_order: Tensor
    """(E)"""
    block_m: int
    """Rows of a row block; 0 without a tile schedule."""
    panels: bool = False
    """Whether ragged buffers are made of panels, as the Hopper kernels, and no others, have them."""
    tiles: TileLists | None = None
    """None without a tile schedule."""
    packed: Tensor | None = None
    """The one tensor that all but `topk_ids` are views of; None without a tile schedule."""

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_rows(self) -> int:
        """R, the host's bound on the number of rows."""
        return self.topk_ids.numel()

    @property
    def num_row_blocks(self) -> int:
        """B, the host's bound on the number of row blocks."""
        return num_row_blocks(self.num_rows, self.layout, self.block_m)

    def ragged_numel(self, parts: int = 1) -> int:
        """Elements of a ragged buffer, from what the host knows: `R * max width` and the rounding of each start."""
        return parts * ragged_numel(self.num_rows, self.layout)

    def read_ragged_numel(self) -> int:
        """Elements that a ragged buffer needs for this very routing, some if there are no rows too. Reads one number
        back from the device."""
        return max(RAGGED_ALIGNMENT, int(self.ragged_offsets[self.layout.num_experts]))

    def ragged_block(self, buffer: Tensor, expert: int, part: int = 0, parts: int = 1) -> Tensor:
        """Expert's `(n_e, I_e)` view of one part of a ragged buffer, a copy if it is of panels. Reads two numbers back
        from the device."""
        first, last = self.row_offsets[expert : expert + 2].tolist()
        start = parts * int(self.ragged_offsets[expert])
        rows, width = last - first, self.layout.widths[expert]
        stride = row_stride(width)
        if self.panels:
            whole, rest = divmod(stride, PANEL_WIDTH)
            sizes = parts * whole * rows * PANEL_WIDTH, parts * rows * rest
            panels, rests = buffer[start : start + sum(sizes)].split(sizes)
            panels = panels.view(parts, whole, rows, PANEL_WIDTH)[part].transpose(0, 1)
            columns = panels.reshape(rows, whole * PANEL_WIDTH), rests.view(parts, rows, rest)[part]
            return torch.cat(columns, 1)[:, :width]
        return buffer[start : start + rows * parts * stride].view(rows, parts, stride)[:, part, :width]


def num_row_blocks(num_rows: int, layout: ExpertLayout, block_m: int) -> int:
    """The most row blocks of `block_m` rows that so many rows, of any experts, can need. num_rows may be symbolic."""
    least = min if isinstance(num_rows, int) else sym_min
    return num_rows // block_m + least(num_rows, layout.num_experts)  # type: ignore[return-value]


def ragged_numel(num_rows: int, layout: ExpertLayout) -> int:
    """Elements that a ragged buffer of so many rows, of any experts, can need. num_rows may be symbolic."""
    return num_rows * row_stride(layout.max_width) + RAGGED_ALIGNMENT * layout.num_experts


def row_stride(width: int) -> int:
    """Elements from one row to the next of a part of a ragged buffer, for an expert of that width."""
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT
