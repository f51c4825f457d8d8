"""How long each multiprocessor works on a grouped GEMM: heaviest tiles first, as routed, and experts in their order.

    python benchmarks/busy_time.py

The order is data, so both are the same kernel: `row_blocks` and `expert_order` as the routing lists them, or sorted by
expert. A kernel runs inside of another that reads the clock and the multiprocessor's number before and after it. Widths
are shuffled, since a layout of descending widths is its own heaviest order. The clock ticks about once a microsecond.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

matplotlib.use("svg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "triton-moe"  # the same file from the same rows

KERNELS = ("up", "down", "dw1")
ORDERS = ("by expert", "heaviest first")
Program = tuple[int, int, int]
"""Multiprocessor, start and end in ns."""


def by_expert(routing: Routing) -> Routing:
    """The same tiles, experts in their own order; `row_blocks` that do not exist stay last."""
    blocks = routing.row_blocks
    places = torch.where(blocks[:, 0] < 0, routing.layout.num_experts, blocks[:, 0])
    order = torch.arange(routing.layout.num_experts, dtype=torch.int32, device=blocks.device)
    return dataclasses.replace(
        routing, row_blocks=blocks[places.argsort(stable=True)].contiguous(), expert_order=order
    )  # fmt: skip


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
    from timed_kernel import timed_kernel

    from triton_moe.kernels.launch import Launcher

    launch = Launcher.__call__

    def timed(self: Launcher, grid: tuple[int, ...], *args: Any) -> None:
        names = self.kernel.arg_names[len(args) :]
        constants = (tl.constexpr(self.options[name]) for name in names)
        options = {name: value for name, value in self.options.items() if name not in names}
        times = torch.zeros(grid[0], 3, dtype=torch.int64, device=args[0].device)
        timed_kernel[grid](times, (*args, *constants), self.kernel, **options)
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
    from triton_moe.kernels.route import route, trimmed

    case, config = CASES[name], CASES[name].config
    layout = shuffled(config.layout)
    shape = products.Shape(
        case.num_tokens, config.hidden_size, layout, config.num_active_experts, config.activation
    )  # fmt: skip

    def routed(ids: Tensor, layout: ExpertLayout, panels: bool) -> Routing:
        packed = route(ids, layout, panels).packed
        assert packed is not None
        return trimmed(packed, ids, layout)

    rows = []
    for order in ORDERS:
        ordered = routed if order == ORDERS[1] else lambda *args: by_expert(routed(*args))
        of_order = products.products(shape, "triton", torch.bfloat16, device, ordered)
        for kernel in KERNELS:
            programs: list[Program] = []
            with recorded(programs):
                for _ in range(3):  # the last one counts: it is compiled, and the caches are warm
                    of_order[kernel].call()
            busy = busy_us(programs)
            span = (max(end for *_, end in programs) - min(start for _, start, _ in programs)) / 1e3
            rows.append({
                "case": name, "kernel": kernel, "order": order, "span_us": span,
                "busy_mean_us": sum(busy.values()) / len(busy),
                "busy_us": " ".join(f"{time:.0f}" for time in sorted(busy.values(), reverse=True)),
            })  # fmt: skip
    return rows


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Raises ValueError unless each kernel has a row of each order."""
    found = {(row["kernel"], row["order"]): row for row in rows}
    missing = [(kernel, order) for kernel in KERNELS for order in ORDERS if (kernel, order) not in found]
    if missing:
        raise ValueError(f"rows: expected each kernel in each order, got none of {missing}")
    figure, plots = plt.subplots(1, len(KERNELS), figsize=(12, 4), layout="constrained")
    for kernel, axes in zip(KERNELS, plots, strict=True):
        for order in ORDERS:
            row = found[kernel, order]
            axes.plot([float(time) for time in row["busy_us"].split()], label=f"{order}: {row['span_us']} us in all")
        axes.set(title=kernel, xlabel="multiprocessors, busiest first", ylim=(0, None))
        axes.legend(loc="lower left")
    plots[0].set_ylabel("busy, us")
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
