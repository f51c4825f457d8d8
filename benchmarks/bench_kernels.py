"""Each GEMM by itself, on the portable kernels and on Hopper's: time, TFLOP/s, and what that is of cuBLAS in the run.

    python benchmarks/bench_kernels.py

Rows are routed at random with equal shares; weights lie as `MoEMLP` has them. A kernel that is wrong gets no time: each
must agree with the same product on the portable kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import BenchCase, select
from results import append, folder, provenance, text
from timing import ceilings, wall_times
from torch import Tensor

from triton_moe.activations import is_gated
from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd, grouped_gemm_up_fwd
from triton_moe.kernels.grouped_gemm_bwd import grouped_gemm_dh, grouped_gemm_dw
from triton_moe.kernels.hopper.launch import fits
from triton_moe.kernels.route import route

DEFAULT_CASES = ("128x256_top8", "32x1024_top2", "64exp_uniform_h768", "64exp_variable_h768")
TOLERANCE = 0.02
"""Of the relative difference, in 16 bits, between two ways to the same product."""


@dataclass(frozen=True)
class Kernel:
    """One product. `gemms`: how many of `2 T K H mean width` operations it stands for."""

    call: Callable[[], object]
    result: Callable[[], list[Tensor]]
    """What `call` filled, and it alone."""
    gemms: int


def kernels(case: BenchCase, backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Kernel]:
    """up, down, dh, dw1 (and dw3), dw2, dx: the products of a training step."""
    config, layout, K = case.config, case.config.layout, case.config.num_active_experts
    T, H, S, gated = case.num_tokens, config.hidden_size, layout.total_width, is_gated(config.activation)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x, dout, w1, w2 = normal(T, H), normal(T, H), normal(H, S) / H**0.5, normal(S, H) / 16
    w3 = normal(H, S) / H**0.5 if gated else None
    ids = torch.rand(T, layout.num_experts, generator=generator, device=device).topk(K).indices.int()
    weights = torch.rand(T, K, generator=generator, device=device)
    routing, parts = route(ids, layout, backend), 2 if gated else 1
    rows = int(routing.read_ragged_numel())
    pre, act = normal(parts * rows), normal(rows)
    y, dx_rows = (x.new_zeros(T * K, H) for _ in range(2))
    kept_pre, kept_act, dpre = torch.zeros_like(pre), torch.zeros_like(act), torch.zeros_like(pre)
    dw1, dw2, dw3 = torch.zeros_like(w1), torch.zeros_like(w2), None if w3 is None else torch.zeros_like(w1)
    of_dh: list[Tensor] = []

    def dh() -> None:
        of_dh[:] = grouped_gemm_dh(dout, w2, pre, weights, routing, config.activation, dpre)

    both = [dw1] if dw3 is None else [dw1, dw3]
    up_t = None if w3 is None else w3.t()
    return {
        "up": Kernel(
            lambda: grouped_gemm_up_fwd(x, w1, w3, kept_act, kept_pre, routing, config.activation),
            lambda: [kept_act, kept_pre], parts,
        ),
        "down": Kernel(lambda: grouped_gemm_down_fwd(act, w2, None, y, routing), lambda: [y], 1),
        "dh": Kernel(dh, lambda: [*of_dh, dpre], 1),
        "dw2": Kernel(lambda: grouped_gemm_dw(dout, act, dw2.t(), None, routing), lambda: [dw2], 1),
        "dw1": Kernel(lambda: grouped_gemm_dw(x, pre, dw1, dw3, routing), lambda: both, parts),
        "dx": Kernel(lambda: grouped_gemm_down_fwd(pre, w1.t(), up_t, dx_rows, routing), lambda: [dx_rows], parts),
    }  # fmt: skip


def disagreement(actual: Kernel, expected: Kernel) -> float:
    """Largest relative difference of what the two fill."""
    actual.call()
    expected.call()
    pairs = zip(actual.result(), expected.result(), strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9)).item() for a, b in pairs)


def measure(case: BenchCase, dtype: torch.dtype, device: torch.device, quick: bool) -> list[dict]:
    backends = ["triton"]
    if fits(case.config.layout, case.config.hidden_size, dtype, device):
        backends.append("hopper")
    of_backend = {backend: kernels(case, backend, dtype, device) for backend in backends}
    effort = {"repeats": 3, "loop_seconds": 0.005} if quick else {}
    flops = case.forward_flops() / (3 if is_gated(case.config.activation) else 2)
    rows = []
    for name, portable in of_backend["triton"].items():
        calls = {"triton": portable.call}
        for backend in backends[1:]:
            off = disagreement(of_backend[backend][name], portable)
            if off < TOLERANCE:
                calls[backend] = of_backend[backend][name].call
            else:
                print(f"{case.name} {name}: no time for {backend}, which is off by {off:.3g}", flush=True)
        for backend, time in wall_times(calls, device, **effort).items():
            rows.append(
                {
                    "case": case.name, "kernel": name, "backend": backend,
                    "dtype": str(dtype).removeprefix("torch."), "ms": time.median, "spread_ms": time.spread,
                    "tflops": portable.gemms * flops / time.median / 1e9,
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
        print(" ".join(f"{text(row[column]):<20}" for column in ("case", "kernel", "backend", "ms", "tflops")))
    print(", ".join(f"{name} {text(value)}" for name, value in machine.items()) + f". Rows: {path}")
    return int(len(rows) == 0)


if __name__ == "__main__":
    sys.exit(main())
