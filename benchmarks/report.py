"""Write the measured part of the README from the rows in `results/`.

    python benchmarks/report.py

Of each benchmark the newest rows count: those of the last date and commit in its file.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from results import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: written by benchmarks/report.py -->", "<!-- end of measured -->"
CONTESTANTS = {
    "triton_moe": "this project",
    "grouped_mm": "torch grouped_mm",
    "grouped_mm_compiled": "the same, compiled",
    "scattermoe": "ScatterMoE",
    "torch_loop": "loop over experts",
}

Rows = list[dict[str, str]]


def newest(path: Path) -> Rows:
    """The rows of the last run in a CSV file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if (row["date"], row["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]


def machine(row: dict[str, str]) -> str:
    return f"{row['gpu']}, torch {row['torch']}, triton {row['triton']}, {row['date']}, commit {row['commit']}"


def speed(rows: Rows) -> list[str]:
    """A line a case, a column a contestant: forward / step in milliseconds."""
    names = [name for name in CONTESTANTS if any(row["contestant"] == name for row in rows)]
    of = {(row["case"], row["contestant"]): f"{row['forward_ms']} / {row['step_ms']}" for row in rows}
    lines = [
        f"Forward / forward and backward in ms, bf16, router included, auxiliary losses off, medians of loops in which "
        f"the contestants take turns ({machine(rows[-1])}; cuBLAS 8192^3 ran at {rows[-1]['cublas_8192_tflops']} "
        f"TFLOP/s, a torch add took {rows[-1]['torch_add_us']} us of host time). grouped_mm takes one width: where "
        f"experts differ it is padded to the widest. Rows: `benchmarks/results/bench_moe.csv`.",
        "",
        "| T, H, sizes, K, activation | " + " | ".join(CONTESTANTS[name] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in {row["case"]: row for row in rows}.values():
        shape = ", ".join(row[column] for column in ("T", "H", "sizes", "K", "activation"))
        lines.append(f"| {shape} | " + " | ".join(of.get((row["case"], name), "-") for name in names) + " |")
    return lines


def accuracy(rows: Rows) -> list[str]:
    ratios = [float(row["ratio"]) for row in rows if row["ratio"]]
    passed = sum(row["result"] == "pass" for row in rows)
    return [
        f"Against the fp64 oracle, output and every gradient of the full-size cases in bf16, fp16 and fp32: {passed} "
        f"of {len(rows)} comparisons within the error budget, the rms error {min(ratios):.2f} to {max(ratios):.2f} "
        f"times that of plain PyTorch in the same dtype ({machine(rows[-1])}; `accuracy.csv`)."
    ]


def stress(rows: Rows) -> list[str]:
    row = rows[-1]
    return [
        f"Random layers and routings, forward and backward, each against the oracle and run twice: {row['draws']} "
        f"draws, {row['mismatches']} outside the error budget, {row['bitwise_differences']} that differed between two "
        f"runs ({machine(row)}; `stress.csv`)."
    ]


SECTIONS = {"bench_moe.csv": speed, "accuracy.csv": accuracy, "stress.csv": stress}


def measured(folder: Path = RESULTS) -> str:
    """What the rows say, as Markdown."""
    parts = [section(newest(folder / name)) for name, section in SECTIONS.items() if (folder / name).exists()]
    return "\n\n".join("\n".join(lines) for lines in parts)


def with_measured(readme: str, folder: Path = RESULTS) -> str:
    """The README's text with its measured part made anew."""
    body = f"{BEGIN}\n{measured(folder)}\n{END}"
    changed, count = re.subn(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: body, readme, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README: expected one part between {BEGIN} and {END}, got {count}")
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    if argv if argv is not None else sys.argv[1:]:
        raise SystemExit("usage: python benchmarks/report.py")
    README.write_text(with_measured(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
