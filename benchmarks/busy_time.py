"""How long each multiprocessor works on a grouped GEMM: heaviest tiles first, as routed, and experts in their order.

    python benchmarks/busy_time.py

Of the portable kernels and, where they run, the Hopper kernels. The order is data, so both are the same kernel:
`row_blocks`, `expert_order` and `tiles` as the routing lists them, or sorted by expert. A kernel runs inside of another
that reads the clock and the multiprocessor's number before and after it. Widths are shuffled, since a layout of
descending widths is its own heaviest order. The clock ticks about once a microsecond.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from cases import CASES
from results import ROOT, append, folder, provenance
from tables import newest, rows_of
from torch import Tensor

from triton_moe import ExpertLayout, Routing
from triton_moe.layout import TileLists

matplotlib.use("svg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "triton-moe"  # the same file from the same rows

BACKENDS = {"triton": "portable", "hopper": "Hopper"}
KERNELS = ("up", "down", "dw1")
ORDERS = ("by expert", "heaviest first")
Program = tuple[int, int, int]
"""Multiprocessor, start and end in ns."""


def _first_by_expert(tiles: Tensor, number: int) -> Tensor:
    """A list of (expert, i), the first so many of them sorted by expert."""
    pairs = tiles.clone().view(-1, 2)
    pairs[:number] = pairs[pairs[:number, 0].argsort(stable=True)]
    return pairs.view_as(tiles)


def by_expert(routing: Routing) -> Routing:
    """The same tiles, experts in their own order; entries that stand for no tile stay last."""
    assert routing.tiles is not None
    layout, (numbers, ragged, weights) = routing.layout, routing.tiles
    blocks, *of_ragged, _ = numbers[:4].tolist()
    sorted_ragged = {
        columns: _first_by_expert(tiles, number)
        for (columns, tiles), number in zip(ragged.items(), of_ragged, strict=True)
    }
    sorted_weights = {
        columns: _first_by_expert(tiles, layout.num_column_blocks(columns)) for columns, tiles in weights.items()
    }
    return dataclasses.replace(
        routing,
        row_blocks=_first_by_expert(routing.row_blocks, blocks),
        expert_order=torch.arange(layout.num_experts, dtype=torch.int32, device=numbers.device),
        tiles=TileLists(numbers, sorted_ragged, sorted_weights),
    )


def busy_us(programs: Sequence[Program]) -> dict[int, float]:
    """Multiprocessor -> time in which at least one program ran there."""
    busy: dict[int, float] = {}
    until: dict[int, int] = {}
    for sm, start, end in sorted(programs, key=lambda program: program[1]):
        start = max(start, until.get(sm, start))
        busy[sm] = busy.get(sm, 0.0) + max(end - start, 0) / 1e3
        until[sm] = max(until.get(sm, end), end)
    return busy


@contextlib.contextmanager
def recorded(programs: list[Program]) -> Iterator[None]:
    """Every launch of ours runs inside of the timing kernel; its programs replace what the list held."""
    import triton.language as tl
    from timed_kernel import SINGLE, timed_gluon_kernel, timed_kernel

    from triton_moe.kernels.launch import Launcher

    launch = Launcher.__call__

    def timed(self: Launcher, grid: tuple[int, ...], *args: Any) -> None:
        names = self.kernel.arg_names[len(args) :]
        all_args = (*args, *(tl.constexpr(self.options[name]) for name in names))
        options = {name: value for name, value in self.options.items() if name not in names}
        times = torch.zeros(grid[0], 3, dtype=torch.int64, device=args[0].device)
        around = timed_gluon_kernel if self.kernel.is_gluon() else timed_kernel
        around[grid](times, self.kernel, *all_args[:SINGLE], all_args[SINGLE:], **options)  # type: ignore[call-arg]
        programs[:] = [(sm, start, end) for sm, start, end in times.tolist()]

    Launcher.__call__ = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launcher.__call__ = launch  # type: ignore[method-assign]


def shuffled(layout: ExpertLayout) -> ExpertLayout:
    return ExpertLayout(tuple(random.Random(0).sample(layout.widths, layout.num_experts)))


def measure(name: str, device: torch.device) -> list[dict[str, object]]:
    from triton_moe import products
    from triton_moe.kernels.hopper.launch import fits
    from triton_moe.kernels.route import route, trimmed

    case, config = CASES[name], CASES[name].config
    layout = shuffled(config.layout)
    shape = products.Shape(
        case.num_tokens, config.hidden_size, layout, config.num_active_experts, config.activation
    )  # fmt: skip

    def routed(ids: Tensor, layout: ExpertLayout, panels: bool) -> Routing:
        packed = route(ids, layout, panels).packed
        assert packed is not None
        return dataclasses.replace(trimmed(packed, ids, layout), panels=panels)

    backends = ("triton", "hopper") if fits(config.hidden_size, torch.bfloat16, device) else ("triton",)
    rows = []
    for backend, order in itertools.product(backends, ORDERS):
        ordered = routed if order == ORDERS[1] else lambda *args: by_expert(routed(*args))
        of_order = products.products(shape, backend, torch.bfloat16, device, ordered)
        for kernel in KERNELS:
            programs: list[Program] = []
            with recorded(programs):
                for _ in range(3):  # the last one counts: it is compiled, and the caches are warm
                    of_order[kernel].call()
            busy = busy_us(programs)
            span = (max(end for *_, end in programs) - min(start for _, start, _ in programs)) / 1e3
            rows.append({
                "case": name, "backend": backend, "kernel": kernel, "order": order, "span_us": span,
                "busy_mean_us": sum(busy.values()) / len(busy),
                "busy_us": " ".join(f"{time:.0f}" for time in sorted(busy.values(), reverse=True)),
            })  # fmt: skip
    return rows


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A row of panels for each backend. Raises ValueError unless it has a row of each kernel in each order."""
    found = {(row["backend"], row["kernel"], row["order"]): row for row in rows}
    backends = [backend for backend in BACKENDS if any(row["backend"] == backend for row in rows)]
    missing = [place for place in itertools.product(backends, KERNELS, ORDERS) if place not in found]
    if missing:
        raise ValueError(f"rows: expected each kernel in each order, got none of {missing}")
    figure, plots = plt.subplots(
        len(backends), len(KERNELS), figsize=(12, 4 * len(backends)), layout="constrained", squeeze=False
    )
    for (backend, kernel), axes in zip(itertools.product(backends, KERNELS), plots.flat, strict=True):
        for order in ORDERS:
            row = found[backend, kernel, order]
            axes.plot([float(time) for time in row["busy_us"].split()], label=f"{order}: {row['span_us']} us in all")
        axes.set(title=f"{kernel}, {BACKENDS[backend]}", xlabel="multiprocessors, busiest first", ylim=(0, None))
        axes.legend(loc="lower left")
    for axes in plots[:, 0]:
        axes.set_ylabel("busy, us")
    first = rows[0]
    figure.suptitle(f"{first['case']}, widths shuffled, {first['gpu']}, {first['date']}, {first['commit']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Busy time of multiprocessors; rows go to busy_time.csv.")
    parser.add_argument("--case", default="220_random", choices=list(CASES))
    parser.add_argument("--draw", action="store_true", help="draw the newest rows, measure nothing")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "busy_time.svg")
    args = parser.parse_args(argv)
    if not args.draw and not torch.cuda.is_available():
        parser.error("only a CUDA device has multiprocessors: expected one, or --draw")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = ROOT / "benchmarks" / "results" if args.draw and args.out is None else None
    path = (path or folder(args.out, quick=False, device=device)) / "busy_time.csv"
    if not args.draw:
        append(path, [{**row, **provenance(device)} for row in measure(args.case, device)])
    draw(newest([row for row in rows_of(path) if row["case"] == args.case]), args.plot)
    print(f"{path}, {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
