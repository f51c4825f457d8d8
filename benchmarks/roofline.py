"""Draw the kernels of one case on the machine's roofline, from the newest rows of bench_kernels.csv.

    python benchmarks/roofline.py --case 128x256_top8

Across: operations for each byte that a kernel must at least move. Up: TFLOP/s, under that run's ceilings, cuBLAS on
8192^3 and a copy on the device. The sums over a token's rows have hardly any operations: they are in the title, as a
fraction of the copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from results import ROOT
from tables import RESULTS, Rows, newest, rows_of

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

plt.rcParams["svg.hashsalt"] = "triton-moe"  # the same file from the same rows


def roofline(rows: Rows) -> Figure:
    """Raises ValueError without a row that has both rates."""
    placed = [row for row in rows if row["tflops"] and row["TBps"]]
    if not placed:
        raise ValueError("rows: expected one with TFLOP/s and TB/s, got none")
    top, copy = float(placed[0]["cublas_8192_tflops"]), float(placed[0]["copy_TBps"])
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    intensity = [10, top / copy, 2000]
    axes.plot(intensity, [min(top, copy * flops) for flops in intensity], color="black", label="cuBLAS 8192^3, copy")
    for backend, marker in (("hopper", "o"), ("triton", "x")):
        of_backend = [row for row in placed if row["backend"] == backend]
        rates = [(float(row["tflops"]) / float(row["TBps"]), float(row["tflops"])) for row in of_backend]
        if rates:
            axes.scatter(*zip(*rates, strict=True), marker=marker, label=backend)
        for row, place in zip(of_backend, rates, strict=True):
            axes.annotate(row["kernel"], place, textcoords="offset points", xytext=(5, 5))
    sums = [f"{row['kernel']} {float(row['TBps']) / copy:.0%}" for row in rows if row["kernel"].startswith("scatter")]
    first = placed[0]
    axes.set_title(
        f"{first['case']}, {first['gpu']}, {first['date']}, {first['commit']}\nof the copy: {', '.join(sums)}"
    )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    axes.legend()
    return figure


def draw(rows: Rows, path: Path) -> None:
    figure = roofline(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the roofline of a case.")
    parser.add_argument("--case", default="128x256_top8")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "roofline.svg")
    args = parser.parse_args(argv)
    rows = newest([row for row in rows_of(RESULTS / "bench_kernels.csv") if row["case"] == args.case])
    draw(rows, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
