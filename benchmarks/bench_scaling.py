"""How cost grows: with tokens from 1 to 262,144, experts from 8 to 512, and widths from 1:1 to 64:1.

    python benchmarks/bench_scaling.py --sweeps T E

Each sweep changes one thing. Tokens and the number of experts: H=1536, SwiGLU, top-8, a quarter of the experts 512
wide, half 256, a quarter 128; so that the number of experts changes no FLOPs. The ratio of widths: H=1536, SwiGLU,
top-2, 8 wide experts and 8 narrow ones, widths in multiples of 64 whose sum stays within 5% of 65 * 64.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from cases import BenchCase, bench_case
from command import Measured, conclude, parser_of, run_of
from measure import Row

SWEEPS = ("T", "E", "ratio")
DEFAULT_CONTESTANTS = ("triton_moe", "grouped_mm")
TOKENS, HIDDEN_SIZE, UNIT, PAIR = 24576, 1536, 64, 65
QUICK_TOKENS, QUICK_HIDDEN_SIZE, QUICK_UNIT = 64, 32, 1


class Point(NamedTuple):
    sweep: str
    value: int
    case: BenchCase


def _mixed(name: str, num_tokens: int, num_experts: int, quick: bool) -> BenchCase:
    hidden_size, unit = (QUICK_HIDDEN_SIZE, 8) if quick else (HIDDEN_SIZE, 128)
    quarter = num_experts // 4
    sizes = [(quarter, 4 * unit), (2 * quarter, 2 * unit), (quarter, unit)]
    return bench_case(name, num_tokens, hidden_size, sizes, 8, "swiglu")


def _pair(name: str, ratio: int, quick: bool) -> BenchCase:
    tokens, hidden_size, unit = (QUICK_TOKENS, QUICK_HIDDEN_SIZE, QUICK_UNIT) if quick else (TOKENS, HIDDEN_SIZE, UNIT)
    narrow = unit * round(PAIR / (ratio + 1))
    return bench_case(name, tokens, hidden_size, [(8, narrow * ratio), (8, narrow)], 2, "swiglu")


def points(sweep: str, quick: bool) -> list[Point]:
    """The cases of a sweep, from the cheapest on."""
    tokens = QUICK_TOKENS if quick else TOKENS
    if sweep == "T":
        values = (1, 8, 64) if quick else tuple(4**n for n in range(10))
        cases = [_mixed(f"T_{value}", value, 8 if quick else 128, quick) for value in values]
    elif sweep == "E":
        values = (8, 16) if quick else tuple(8 * 2**n for n in range(7))
        cases = [_mixed(f"E_{value}", tokens, value, quick) for value in values]
    else:
        values = (1, 64) if quick else tuple(2**n for n in range(7))
        cases = [_pair(f"ratio_{value}", value, quick) for value in values]
    return [Point(sweep, value, case) for value, case in zip(values, cases, strict=True)]


def growth(rows: Sequence[Row]) -> list[str]:
    """A line a contestant and pair of neighbours in a sweep: how many times the step's time, and how many its FLOPs."""
    lines = []
    for contestant, sweep in dict.fromkeys((row["contestant"], row["sweep"]) for row in rows):
        of_sweep = [row for row in rows if (row["contestant"], row["sweep"]) == (contestant, sweep)]
        for before, after in pairwise(of_sweep):
            times, flops = (after[column] / before[column] for column in ("step_ms", "forward_gflop"))
            lines.append(
                f"{contestant}: {sweep} {before['value']} to {after['value']}: a step takes {times:.2f} times as long, "
                f"for {flops:.2f} times the FLOPs"
            )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench_scaling")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    args = parser.parse_args(argv)
    run = run_of("bench_scaling", args, DEFAULT_CONTESTANTS)
    measured: list[Measured] = []
    for sweep in args.sweeps:
        for point in points(sweep, args.quick):
            gflop = point.case.forward_flops() / 1e9
            first: Row = {"sweep": sweep, "value": point.value, "forward_gflop": gflop}
            measured.append(run.time(point.case, ("forward", "step", "memory"), first))
    print("\n".join(growth([row for of_case in measured for row in of_case.rows])))
    shown = ("sweep", "value", "contestant", "forward_ms", "step_ms", "forward_tflops", "step_tflops", "peak_MiB")
    return conclude(run, measured, shown)


if __name__ == "__main__":
    sys.exit(main())
