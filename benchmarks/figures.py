"""Draw the figures of IMPLEMENTATION_GUIDE.md from two small routings, as the kernels make them.

    python benchmarks/figures.py

The kernels run in Triton's interpreter, on any machine, with row blocks of 16. What a figure draws stands as JSON in
its description.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from results import ROOT

from triton_moe import ExpertLayout, Routing
from triton_moe.functional import route
from triton_moe.layout import RAGGED_ALIGNMENT, row_stride

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

plt.rcParams["svg.hashsalt"] = "triton-moe"  # the same file from the same routing

COLORS = ("#7fb3e6", "#f4b866", "#d0a3dc", "#8fcf97")
"""Of experts 0 to 3."""
NOTHING, PADDING = "#f2f2f2", "#c8c8c8"
COLUMNS = 128
"""Of a tile, in the figure of the schedule."""
MULTIPROCESSORS = 3


def few_rows() -> Routing:
    """Six tokens, K = 2, widths that are multiples of nothing, a null expert (2), an id that drops its slot (4 = E)."""
    ids = [[0, 3], [3, 1], [2, 0], [3, 0], [4, 3], [1, 0]]
    return route(torch.tensor(ids), ExpertLayout((20, 5, 0, 33)), backend="triton")


def several_blocks() -> Routing:
    """More rows than a row block for each expert, of which the widest comes last."""
    ids = [0] * 40 + [1] * 34 + [2] * 6 + [3] * 20
    return route(torch.tensor(ids)[:, None], ExpertLayout((128, 256, 0, 384)), backend="triton")


def facts(routing: Routing) -> dict[str, object]:
    """Everything that a figure is drawn from."""
    assert routing.tiles is not None
    names = ("topk_ids", "counts", "row_offsets", "ragged_offsets", "row_to_slot", "slot_to_row", "row_blocks")
    return {
        "widths": routing.layout.widths,
        "offsets": routing.layout.offsets,
        **{name: getattr(routing, name).tolist() for name in (*names, "expert_order")},
        "block_m": routing.block_m,
        "tiles": listed_tiles(routing),
    }


def listed_tiles(routing: Routing) -> list[list[int]]:
    """(expert, i) of each tile of COLUMNS columns of a ragged buffer, as the Hopper kernels take them."""
    assert routing.tiles is not None
    return routing.tiles.ragged[COLUMNS][: 2 * int(routing.tiles.numbers[1])].view(-1, 2).tolist()


def canvas(x: tuple[float, float], y: tuple[float, float], unit: tuple[float, float]) -> tuple[Figure, Axes]:
    """Axes that fill the figure, y downward. `unit`: points of a unit of x and y; whole ones make a small file."""
    size = (x[1] - x[0]) * unit[0] / 72, (y[1] - y[0]) * unit[1] / 72
    figure = plt.figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=x, ylim=(y[1], y[0]))
    return figure, axes


def box(
    axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "", size: float = 8
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="black", linewidth=0.6, clip_on=False))
    if text:
        write(axes, x + width / 2, y + height / 2, text, "center", size=size)


def write(
    axes: Axes, x: float, y: float, text: str, across: str = "left", down: str = "center", **style: Any
) -> None:  # fmt: skip
    """`across` and `down`: what of the text is at x and at y."""
    axes.text(x, y, text, ha=across, va=down, **{"size": 8, **style})


def packed_weights(routing: Routing) -> Figure:
    """w1 and w2 with each expert's columns and rows, to scale; only H is not."""
    layout, total, tall = routing.layout, routing.layout.total_width, 14
    right = total + 16
    figure, axes = canvas((-4, right + tall + 2), (-10, total + 8), (8, 5))
    for expert, (first, width) in enumerate(zip(layout.offsets, layout.widths, strict=True)):
        name, color, wide = f"expert {expert}", COLORS[expert], width > 10
        if width:
            box(axes, first, 0, width, tall, color, f"{name}\n{width} columns" if wide else "")
            box(axes, right, first, tall, width, color, f"{name}, {width} rows")
        else:
            for line in (([first, first], [0, tall]), ([right, right + tall], [first, first])):
                axes.plot(*line, color="black", linewidth=2, zorder=3)
        if not wide:
            aside = first + (5 if width == 0 else -1)
            axes.plot([first + width / 2, aside], [0, -3], color="black", linewidth=0.6)
            write(axes, aside, -3.5, f"{name}\nwidth {width}", "center", "bottom")
        write(axes, first, tall + 1, str(first), "center", "top")
        write(axes, right - 1, first, str(first), "right", "bottom" if width == 0 else "top")
    write(axes, total, tall + 1, f"S = {total}", "center", "top")
    write(axes, right - 1, total, f"S = {total}", "right", "bottom")
    write(axes, -1, tall / 2, "H", "right", size=10)
    write(axes, right + tall / 2, -1, "H", "center", "bottom", size=10)
    write(axes, total / 2, tall + 8, "w1, and w3 of a gated activation: (H, S)", "center", size=10)
    write(axes, right + tall / 2, total + 4, "w2: (S, H)", "center", size=10)
    columns = zip(range(layout.num_experts), layout.offsets, layout.widths, strict=True)
    table = [f"{a:>8}{b:>8}{c:>8}" for a, b, c in (("expert", "offset", "width"), *columns)]
    write(axes, total / 2, tall + 18, "\n".join(table), "center", "top", family="monospace")
    return figure


def routed_rows(routing: Routing) -> Figure:
    """Slots to the left, as the router names them; rows in expert order to the right."""
    ids, top_k = routing.topk_ids.flatten().tolist(), routing.top_k
    rows, offsets = routing.slot_to_row.flatten().tolist(), routing.row_offsets.tolist()
    figure, axes = canvas((-4, 16), (-1, len(ids) + 0.5), (32, 26))
    for x, head in ((0.6, "slot"), (1.8, "topk_ids"), (6.6, "row"), (8, "row_to_slot"), (9.6, "token")):
        write(axes, x, -0.4, head, "center")
    for slot, (expert, row) in enumerate(zip(ids, rows, strict=True)):
        color = COLORS[expert] if row >= 0 else NOTHING
        box(axes, 0, slot, 1.2, 1, NOTHING, str(slot))
        box(axes, 1.2, slot, 1.2, 1, color, str(expert))
        if slot % top_k == 0:
            write(axes, -0.2, slot + top_k / 2, f"token {slot // top_k}", "right")
        if row >= 0:
            axes.plot([2.4, 6], [slot + 0.5, row + 0.5], color=color)
        else:
            null = expert < routing.layout.num_experts
            write(
                axes, -1.7, slot + 0.5, "null expert:\ncounted, no row" if null else "id E:\ndropped", "right", size=7
            )
    for row, slot in enumerate(routing.row_to_slot.tolist()):
        color = NOTHING if slot < 0 else COLORS[ids[slot]]
        box(axes, 6, row, 1.2, 1, NOTHING, str(row))
        box(axes, 7.2, row, 1.6, 1, color, str(slot))
        box(axes, 8.8, row, 1.6, 1, color, "" if slot < 0 else str(slot // top_k))
    for expert, (first, last) in enumerate(pairwise(offsets)):
        if last > first:
            axes.plot([10.6, 10.8, 10.8, 10.6], [first + 0.1, first + 0.1, last - 0.1, last - 0.1], color="black")
        count = f"rows {first} to {last - 1}" if last > first else "no rows"
        write(axes, 11, (first + last) / 2, f"expert {expert}: {count}")
    write(axes, 10.6, len(ids), f"counts {routing.counts.tolist()}\nrow_offsets {offsets}", down="bottom")
    return figure


def ragged_buffer(routing: Routing) -> Figure:
    """The flat buffer, RAGGED_ALIGNMENT elements a line: so every expert starts a line."""
    starts, row_offsets = routing.ragged_offsets.tolist(), routing.row_offsets.tolist()
    lines = starts[-1] // RAGGED_ALIGNMENT
    figure, axes = canvas((-18, RAGGED_ALIGNMENT + 2), (-1, lines + 2), (8, 28))

    def run(first: int, last: int, color: str, text: str = "") -> None:
        """Elements from first up to last, cut where a line ends."""
        while first < last:
            line, place = divmod(first, RAGGED_ALIGNMENT)
            length = min(last - first, RAGGED_ALIGNMENT - place)
            box(axes, place, line, length, 0.875, color, text if length > 3 else "", 7)
            first += length

    for expert, width in enumerate(routing.layout.widths):
        stride, end = row_stride(width), starts[expert]
        for row in range(row_offsets[expert], row_offsets[expert + 1]):
            run(end, end + width, COLORS[expert], f"row {row}" if width > 8 else str(row))
            run(end + width, end + stride, PADDING)
            end += stride
        run(end, starts[expert + 1], NOTHING)
        if end > starts[expert]:
            rows = row_offsets[expert + 1] - row_offsets[expert]
            label = f"{starts[expert]}: expert {expert}\n{rows} rows of {width}, pitch {stride}"
            write(axes, -1, starts[expert] // RAGGED_ALIGNMENT + 0.45, label, "right")
    for place in range(0, RAGGED_ALIGNMENT + 1, 8):
        write(axes, place, -0.1, str(place), "center", "bottom", size=7)
    past_width, past_rows = (
        "past the width: up to the next multiple of 8",
        "past the last row: of 64, where the next expert starts",
    )
    for x, color, text in ((0, PADDING, past_width), (32, NOTHING, past_rows)):
        box(axes, x, lines + 0.25, 2, 0.5, color)
        write(axes, x + 2.6, lines + 0.5, text)
    said = f"{starts[-1]} elements are used, {routing.ragged_numel()} is what the host allocates without asking"
    write(axes, 0, lines + 1.25, said)
    return figure


def tile_schedule(routing: Routing) -> Figure:
    """Programs of `up`, and the list of tiles."""
    layout, blocks, tiles = routing.layout, routing.row_blocks.tolist(), listed_tiles(routing)
    across, rows = -(-layout.max_width // COLUMNS), routing.row_offsets.diff().tolist()
    figure, axes = canvas((-0.5, 15.5), (-1, len(blocks) + 3), (36, 24))
    for x, head in ((1, "row_blocks"), *((4 + 2 * n, f"column {n * COLUMNS}") for n in range(across))):
        write(axes, x, -0.4, head, "center")
    for entry, (expert, block) in enumerate(blocks):
        box(axes, 0, entry, 2, 1, COLORS[expert] if expert >= 0 else NOTHING, f"{expert}, {block}")
        for n in range(across):
            works = expert >= 0 and n * COLUMNS < layout.widths[expert]
            box(
                axes,
                3 + 2 * n,
                entry,
                2,
                1,
                COLORS[expert] if works else NOTHING,
                str(entry * across + n) if works else "",
            )
    notes = [f"expert {e}: width {w}, {n} rows" for e, (w, n) in enumerate(zip(layout.widths, rows, strict=True))]
    notes += [f"\nrow blocks of {routing.block_m} rows", f"expert_order {routing.expert_order.tolist()}"]
    write(axes, 3.4 + 2 * across, 0, "\n".join(notes), down="top")
    write(axes, 0, len(blocks) + 1, f"tiles.ragged[{COLUMNS}]: the tiles that exist")
    for i, (expert, part) in enumerate(tiles):
        box(axes, i, len(blocks) + 1.5, 1, 1, COLORS[expert], f"{expert}, {part}")
    return figure


def taken(costs: Sequence[int]) -> list[tuple[int, int]]:
    """Tiles of such costs, each taken by the multiprocessor that is free first -> (multiprocessor, start) of each."""
    free = [(0, multiprocessor) for multiprocessor in range(MULTIPROCESSORS)]
    places = []
    for cost in costs:
        start, multiprocessor = heapq.heappop(free)
        places.append((multiprocessor, start))
        heapq.heappush(free, (start + cost, multiprocessor))
    return places


def order_of_tiles(routing: Routing) -> Figure:
    """When `down`'s tiles would run in two orders, if one cost as much as its expert is wide."""
    listed = [(expert, block) for expert, block in routing.row_blocks.tolist() if expert >= 0]
    tall = MULTIPROCESSORS + 2
    figure, axes = canvas((-0.5, 12.5), (0, 2 * tall), (48, 20))
    for panel, (order, name) in enumerate(((sorted(listed), "experts in their order"), (listed, "as row_blocks"))):
        experts = [expert for expert, _ in order for _ in range(2)]
        costs = [routing.layout.widths[expert] // COLUMNS for expert in experts]
        places, top = taken(costs), panel * tall
        for expert, cost, (multiprocessor, start) in zip(experts, costs, places, strict=True):
            box(axes, start, top + 1 + multiprocessor, cost, 0.85, COLORS[expert], str(expert))
        done = max(start + cost for cost, (_, start) in zip(costs, places, strict=True))
        write(axes, 0, top + 0.6, f"{name}: {MULTIPROCESSORS} multiprocessors are done at {done}")
        for time in range(0, done + 1, 2):
            write(axes, time, top + 1.3 + MULTIPROCESSORS, str(time), "center", size=7)
    return figure


FIGURES: dict[str, tuple[Callable[[Routing], Figure], Callable[[], Routing]]] = {
    "packed_weights": (packed_weights, few_rows),
    "routed_rows": (routed_rows, few_rows),
    "ragged_buffer": (ragged_buffer, few_rows),
    "tile_schedule": (tile_schedule, several_blocks),
    "order_of_tiles": (order_of_tiles, several_blocks),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the figures of IMPLEMENTATION_GUIDE.md.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="their folder (docs/figures)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="png is for looking at them (svg)")
    args = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported: by the first routing
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (draw, make) in FIGURES.items():
        routing = make()
        about = {"Date": None, "Description": json.dumps(facts(routing))} if args.format == "svg" else {}
        figure = draw(routing)
        figure.savefig(args.out / f"{name}.{args.format}", metadata=about)
        plt.close(figure)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
