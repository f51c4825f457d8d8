"""Hardware counters of each GEMM kernel, one launch each, by NVIDIA's ncu; rows go to counters.csv.

    python benchmarks/counters.py --cases 128x1024_top8_h4096

ncu runs this file again, which calls each product once to compile it, and once more between start and stop of the
profiler. Clocks and caches are as they come, as in training; a launch follows another product's, with what that left in
L2. Exits with 1 if ncu fails or saw other launches, with 2 without ncu or a GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import CASES, BenchCase, select
from results import append, folder, provenance, text

KERNELS = {"up": "up", "down": "down", "dx": "down", "dh": "dh", "dw2": "dw", "dw1": "dw"}
"""Products in the order of their launches, and which kernel makes each."""
METRICS = {
    "ms": ("gpu__time_duration.sum", "ns"),
    "dram_read_GB": ("dram__bytes_read.sum", "byte"),
    "dram_write_GB": ("dram__bytes_write.sum", "byte"),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct", "%"),
    "sm_cycles_min": ("sm__cycles_active.min", "cycle"),
    "sm_cycles_max": ("sm__cycles_active.max", "cycle"),
    "tensor_percent": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", "%"),
}
"""Column: ncu's metric and its unit."""
FACTORS = {"ns": 1e-6, "byte": 1e-9, "%": 1.0}
"""From ncu's units to the columns'; cycles stay whole numbers."""
OPTIONS = (
    "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off", "-k", "regex:grouped_gemm",
    "--metrics", ",".join(metric for metric, _ in METRICS.values()), "--csv", "--page", "raw",
)  # fmt: skip


def tiles_of(product: str, backend: str) -> str:
    """Who decides which tile a multiprocessor works on next."""
    if backend == "triton":
        return "by the hardware"
    return "every n-th" if KERNELS[product] == "dw" else "by a counter"


def number(cell: str, unit: str) -> float:
    value = float(cell.replace(",", ""))
    return round(value) if unit == "cycle" else value * FACTORS[unit]


def launches(log: str) -> list[tuple[str, dict[str, float]]]:
    """Kernel and columns of each launch in ncu's output. Raises ValueError without one, or on another unit."""
    lines = log.splitlines()
    units, *rows = [*csv.DictReader(line for line in lines if not line.startswith("=="))] or [{}]
    if not rows:
        raise ValueError(f"ncu: expected launches, got none: {' '.join(lines)}")
    for metric, unit in METRICS.values():
        if units.get(metric) != unit:
            raise ValueError(f"ncu: expected {metric} in {unit}, got {units.get(metric)}")
    return [
        (row["Kernel Name"], {column: number(row[metric], unit) for column, (metric, unit) in METRICS.items()})
        for row in rows
    ]


def rows_of(log: str, case: str, backend: str) -> list[dict[str, object]]:
    """A row a product. Raises ValueError unless each was launched once, on that backend's kernels."""
    found, ending = launches(log), "_hopper_kernel" if backend == "hopper" else "(?:_fwd)?_kernel"
    kernels = [re.sub(f"^grouped_gemm_(.*?){ending}$", r"\1", name) for name, _ in found]
    if kernels != list(KERNELS.values()):
        raise ValueError(f"ncu: expected a launch for each of {list(KERNELS)}, got {[name for name, _ in found]}")
    return [
        {"case": case, "kernel": product, "backend": backend, "tiles": tiles_of(product, backend), **columns}
        for product, (_, columns) in zip(KERNELS, found, strict=True)
    ]


def launch_each(case: BenchCase, backend: str, device: torch.device) -> None:
    """What ncu looks at: between start and stop each product's kernel, compiled before."""
    from triton_moe.products import Shape, products

    config = case.config
    shape = Shape(case.num_tokens, config.hidden_size, config.layout, config.num_active_experts, config.activation)
    of_case = products(shape, backend, torch.bfloat16, device)
    for product in KERNELS:
        of_case[product].call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for product in KERNELS:
        of_case[product].call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile(case: BenchCase, backend: str, seconds: float) -> list[dict[str, object]]:
    """The rows of one case and backend. Raises ValueError if ncu ends badly or too late."""
    with tempfile.TemporaryDirectory(prefix="counters-") as temporary:
        log = Path(temporary, "ncu.csv")
        command = ["ncu", *OPTIONS, "--log-file", str(log), sys.executable, __file__, "--launch", case.name, backend]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise ValueError(f"ncu: expected an end within {seconds:g} s, got none") from None
        said = log.read_text() if log.exists() else ""
    if status:
        raise ValueError(f"ncu: expected status 0, got {status}: {' '.join(said.splitlines())}")
    return rows_of(said, case.name, backend)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hardware counters of each GEMM; rows go to counters.csv.")
    parser.add_argument("--cases", nargs="+", default=["128x1024_top8_h4096"], help="names of cases or groups")
    parser.add_argument("--seconds", type=float, default=300, help="ncu is stopped after this time, for each backend")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    parser.add_argument("--launch", nargs=2, metavar=("CASE", "BACKEND"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("counters are those of a GPU: expected a CUDA device, got none")
    device = torch.device("cuda")
    if args.launch:
        launch_each(CASES[args.launch[0]], args.launch[1], device)
        return 0
    if shutil.which("ncu") is None:
        parser.error("counters are read by NVIDIA's ncu, of Nsight Compute: expected it on the PATH, got none")
    try:
        cases = select(args.cases)
    except ValueError as error:
        parser.error(str(error))
    from triton_moe.kernels.hopper.launch import fits

    path, machine, status = folder(args.out, quick=False, device=device) / "counters.csv", provenance(device), 0
    for case in cases:
        fitting = fits(case.config.hidden_size, torch.bfloat16, device)
        for backend in ("hopper", "triton") if fitting else ("triton",):
            try:
                rows = [{**row, **machine} for row in profile(case, backend, args.seconds)]
            except ValueError as error:
                print(f"{case.name}: no rows of {backend}. {error}", flush=True)
                status = 1
                continue
            append(path, rows)
            for row in rows:
                print(", ".join(f"{name} {text(value)}" for name, value in row.items()), flush=True)
    print(f"Rows: {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
