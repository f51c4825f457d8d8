"""The tables of IMPLEMENTATION_GUIDE.md, from the same rows as the README's."""

from __future__ import annotations

from pathlib import Path

from cases import CASES, BenchCase
from tables import LIBRARIES, NAMES, OURS, Rows, Table, machines, newest, rows_of, shape

OPERANDS_FLOPS_A_BYTE = 128 * 256 / (128 + 256)
"""Of a Hopper tile of 128 x 256: so many operations for each byte of its operands, in 16 bits."""


def epilogue_bytes(case: BenchCase) -> dict[str, int]:
    """What the kernels' epilogues read and write, of a gated layer in 16 bits, all experts equally wide."""
    H, layout, rows = case.config.hidden_size, case.config.layout, case.num_tokens * case.config.num_active_experts
    inner, weights = rows * layout.max_width, H * layout.total_width
    elements = {"up": 3 * inner, "down": rows * H, "dh": 5 * inner, "dw1": 2 * weights, "dw2": weights, "dx": rows * H}
    return {kernel: 2 * number for kernel, number in elements.items()}


def kernels(rows: Rows) -> Table:
    """A line a kernel of one case."""
    case = CASES["128x256_top8"]
    used = newest([row for row in rows if row["case"] == case.name])
    moved, cells = epilogue_bytes(case), {}
    for row in used:
        operands = float(row["tflops"] or 0) / OPERANDS_FLOPS_A_BYTE
        all_of_it = operands + moved.get(row["kernel"], 0) / float(row["ms"]) / 1e9
        rates = (f"{float(row['tflops']):.0f}", f"{operands:.1f}", f"{all_of_it:.1f}") if row["tflops"] else ("",) * 3
        cells[row["kernel"], row["backend"]] = row["ms"], *rates
    caption = (
        f"Each kernel by itself, {case.name}, SwiGLU, bf16, and the TB/s that a Hopper kernel's rate asks of L2, for "
        f"operand tiles, and with what its epilogue reads and writes ({machines(used)}; cuBLAS 8192^3 ran at "
        f"{used[-1]['cublas_8192_tflops']} TFLOP/s, a copy on the device at {used[-1]['copy_TBps']} TB/s; "
        f"`benchmarks/results/bench_kernels.csv`)."
    )
    body = [
        [kernel, *cells.get((kernel, "triton"), [""] * 4)[:2], *cells.get((kernel, "hopper"), [""] * 4)]
        for kernel in dict.fromkeys(row["kernel"] for row in used)
    ]
    header = ("kernel", "portable, ms", "TFLOP/s", "Hopper, ms", "TFLOP/s", "operands, TB/s", "all, TB/s")
    return Table(caption, header, body)


def orders(rows: Rows) -> Table:
    """A line a kernel whose tiles ran in two orders."""
    used = newest(rows)
    spans = {(row["backend"], row["kernel"], row["order"]): row["span_us"] for row in used}
    caption = (
        f"The kernels of {used[0]['case']}, widths shuffled, from the first program's start to the last one's end, in "
        f"us ({machines(used)}; `benchmarks/results/busy_time.csv`)."
    )
    places = dict.fromkeys((row["backend"], row["kernel"]) for row in used)
    body = [[*place, *(spans[(*place, order)] for order in ("by expert", "heaviest first"))] for place in places]
    return Table(caption, ("backend", "kernel", "experts in their order", "heaviest first"), body)


def memory(rows: Rows) -> Table:
    """A line a contestant of one case: the newest row of each, as memory does not depend on what runs beside."""
    of_case = [row for row in rows if row["case"] == "128x256_top8" and row["saved_MiB"]]
    newest_of = {row["contestant"]: row for row in of_case}
    used = [newest_of[name] for name in (OURS, "grouped_mm", *LIBRARIES) if name in newest_of]
    caption = (
        f"What is kept for backward and the peak of a step, in MiB, for T, H, sizes, K, activation {shape(used[0])} "
        f"({machines(used)}; `benchmarks/results/bench_moe.csv`)."
    )
    body = [[NAMES[row["contestant"]], row["saved_MiB"], row["peak_MiB"]] for row in used]
    return Table(caption, ("", "kept", "peak"), body)


def guide_of(folder: Path) -> list[Table]:
    """What IMPLEMENTATION_GUIDE.md refers to."""
    sections = (("bench_kernels.csv", kernels), ("busy_time.csv", orders), ("bench_moe.csv", memory))
    return [section(rows_of(folder / name)) for name, section in sections]
