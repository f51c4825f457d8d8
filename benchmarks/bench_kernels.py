"""Each kernel by itself: time, TFLOP/s, and TB/s of what it must at least move, beside cuBLAS and a copy in that run.

    python benchmarks/bench_kernels.py

A kernel that is wrong gets no time: each must agree with the same product on the portable kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
from cases import BenchCase, select
from results import append, folder, provenance, text
from timing import QUICK, ceilings, wall_times

from triton_moe.activations import is_gated
from triton_moe.kernels.hopper.launch import fits
from triton_moe.products import TOLERANCE, Shape, disagreement, products

DEFAULT_CASES = ("128x256_top8", "32x1024_top2", "64exp_uniform_h768", "64exp_variable_h768")


def measure(case: BenchCase, dtype: torch.dtype, device: torch.device, quick: bool) -> list[dict]:
    config, backends = case.config, ["triton"]
    shape = Shape(case.num_tokens, config.hidden_size, config.layout, config.num_active_experts, config.activation)
    if fits(case.config.hidden_size, dtype, device):
        backends.append("hopper")
    of_backend = {backend: products(shape, backend, dtype, device) for backend in backends}
    flops = case.forward_flops() / (3 if is_gated(case.config.activation) else 2)
    rows = []
    for name, portable in of_backend["triton"].items():
        calls = {"triton": portable.call}
        for backend in backends[1:] if portable.gemms else ():
            off = disagreement(of_backend[backend][name], portable)
            if off < TOLERANCE:
                calls[backend] = of_backend[backend][name].call
            else:
                print(f"{case.name} {name}: no time for {backend}, which is off by {off:.3g}", flush=True)
        for backend, time in wall_times(calls, device, QUICK if quick else None).items():
            rows.append(
                {
                    "case": case.name, "kernel": name, "backend": backend,
                    "dtype": str(dtype).removeprefix("torch."), "ms": time.median, "spread_ms": time.spread,
                    "tflops": portable.gemms * flops / time.median / 1e9 if portable.gemms else None,
                    "TBps": portable.bytes / time.median / 1e9,
                }
            )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time each GEMM; rows go to bench_kernels.csv.")
    parser.add_argument("--cases", nargs="+", help="names of cases or groups, see cases.py")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; without a GPU in Triton's interpreter")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = folder(args.out, quick=args.quick, device=device) / "bench_kernels.csv"
    try:
        cases = select(args.cases or (["quick"] if args.quick else DEFAULT_CASES))
    except ValueError as error:
        parser.error(str(error))
    machine = {**ceilings(device), **provenance(device)}
    rows = [row for case in cases for row in measure(case, dtype, device, args.quick)]
    append(path, [{**row, **machine} for row in rows])
    for row in rows:
        print(" ".join(f"{text(row[column]):<20}" for column in ("case", "kernel", "backend", "ms", "tflops", "TBps")))
    print(", ".join(f"{name} {text(value)}" for name, value in machine.items()) + f". Rows: {path}")
    return int(len(rows) == 0)


if __name__ == "__main__":
    sys.exit(main())
