"""How far the layer is from the fp64 oracle at full size, beside plain PyTorch in the same dtype.

    python benchmarks/accuracy.py

Every full-size case of `triton_moe.testing` in bf16, fp16 and fp32: the output and each gradient, within the error
budget of the tests or not. Exits with 1 if any is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from results import append, folder, provenance, text

from triton_moe import moe_mlp
from triton_moe.testing import CASES, SEED_CASES, Case, check_against_oracle, make_inputs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(case: Case, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """A row for each tensor, with root mean square errors; one row without errors if the budget is exceeded."""
    shape = {
        "case": case.reason.partition(",")[0],
        "activation": case.activation,
        "T": case.num_tokens,
        "H": case.hidden_size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    try:
        errors = check_against_oracle(moe_mlp, make_inputs(case, dtype, device))
    except AssertionError as fault:
        print(f"{case.reason}, {dtype}: FAIL\n{fault}", flush=True)
        return [{**shape, "tensor": "", "rms_error": None, "plain_rms_error": None, "ratio": None, "result": "fail"}]
    return [
        {
            **shape,
            "tensor": tensor,
            "rms_error": error.err,
            "plain_rms_error": error.plain_err,
            "ratio": error.err / error.plain_err if error.plain_err else None,
            "result": "pass",
        }
        for tensor, error in errors.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Errors against the fp64 oracle; rows go to accuracy.csv.")
    parser.add_argument("--quick", action="store_true", help="two small cases, for the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = folder(args.out, quick=args.quick, device=device) / "accuracy.csv"
    source = provenance(device)
    failed = 0
    for case in CASES[:3:2] if args.quick else SEED_CASES:
        for dtype in DTYPES:
            rows = check(case, dtype, device)
            append(path, [{**row, **source} for row in rows])
            failed += rows[0]["result"] == "fail"
            ratios = ", ".join(f"{row['tensor']} {text(row['ratio'])}" for row in rows)
            print(f"{case.reason}, {rows[0]['dtype']}: {rows[0]['result']}; error / plain error: {ratios}", flush=True)
    print(f"{'FAILED: ' + str(failed) + ' outside' if failed else 'PASSED: all within'} the budget. Rows: {path}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
