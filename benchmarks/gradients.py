"""How far each layer's output and gradients are from the fp64 oracle: direction and size of the error.

    python benchmarks/gradients.py

Cosine similarity to the oracle's tensor, and the norm of the difference over the norm of the truth: of this project,
the block-sparse baseline, and that baseline with its historical error. On a CPU this project is `torch_loop`, its plain
PyTorch; on a GPU it is the kernels, and the baseline also runs on stk. docs/gradients.md shows the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import BenchCase, select
from command import DTYPES
from contestants import CONTESTANTS
from gate import initial_state, oracle, outcome, tokens
from layers import CannotRun
from measure import described
from results import append, folder, provenance, text
from torch import Tensor

ON_CPU = ("torch_loop", "block_sparse", "block_sparse_historical")
ON_GPU = ("triton_moe", *ON_CPU[1:], "stk", "stk_historical")


def cosine(actual: Tensor, truth: Tensor) -> float:
    """1 if both point the same way, 0 if they are orthogonal; NaN if one is zero."""
    actual, truth = actual.double().flatten(), truth.double().flatten()
    return float(actual @ truth / (actual.norm() * truth.norm()))


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """`|actual - truth| / |truth|`"""
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


def measure(case: BenchCase, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> list[dict]:
    """A row for each contestant and tensor; who cannot run the case is named."""
    config, state = case.config, initial_state(case, dtype, device)
    x, dout = tokens(case, dtype, device)
    truth = oracle(case, state, x, dout, torch.float64)
    rows = []
    for name in names:
        try:
            found = outcome(CONTESTANTS[name](config, state), x, dout)
        except CannotRun as reason:
            print(f"{case.name}: nothing of {name}. {reason}", flush=True)
            continue
        for tensor, expected in truth.items():
            error = {
                "cosine": cosine(found[tensor], expected),
                "relative_error": relative_error(found[tensor], expected),
            }
            rows.append({**described(case, name, dtype), "tensor": tensor, **error})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Gradients against the fp64 oracle; rows go to gradients.csv.")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases or groups of cases.py (seed)")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS))
    parser.add_argument("--dtype", choices=list(DTYPES), help="bf16, and fp32 on the CPU")
    parser.add_argument("--quick", action="store_true", help="two tiny cases, for the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    path = folder(args.out, quick=args.quick, device=device) / "gradients.csv"
    try:
        cases = select(args.cases or ["quick" if args.quick else "seed"])
    except ValueError as error:
        parser.error(str(error))
    source = provenance(device)
    for case in cases:
        rows = measure(case, args.contestants or (ON_GPU if device.type == "cuda" else ON_CPU), dtype, device)
        append(path, [{**row, **source} for row in rows])
        for row in rows:
            print(" ".join(f"{text(row[key]):<24}" for key in ("case", "contestant", "tensor", "cosine")), end="")
            print(text(row["relative_error"]), flush=True)
    print(f"Rows went to {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
