"""Time the layer against others, on the same weights, tokens and router, in one process.

    python benchmarks/bench_moe.py --cases seed training --contestants triton_moe grouped_mm
    python benchmarks/bench_moe.py --batch-sizes 4 8 16
    python benchmarks/bench_moe.py --profile

Before it is timed a contestant must be right (see `gate.py`). Who is wrong, crashes, or cannot run a case gets a
sentence, not a time, and in the first two cases a row in refused.csv; exits with 1 if that is one of ours.

`--profile` times the stages of the block-sparse reference's forward pass and of ours instead, each by itself in a loop,
and the whole forward pass beside them: what share of it a stage takes. The topology's is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from cases import BenchCase
from command import SHOWN, Measured, Run, add_cases, cases_of, conclude, parser_of, run_of
from gate import initial_state, tokens
from measure import MEASURES, Row, admitted, crashed, described
from results import append
from stages import stages_of
from timing import QUICK, Call, CallFailed, Effort, wall_times

PROFILED = ("stk", "triton_moe")
PROFILED_ON_CPU = ("block_sparse", "triton_moe")
PROFILING = Effort(loop_seconds=0.02)
FORWARD = "forward"


def profile(run: Run, case: BenchCase) -> Measured:
    """A row for each contestant and stage, for its forward pass, and for the rest of that, which no stage is.

    A stage is timed in a loop of its own. There the reference's are faster than among others, which adds to its rest;
    ours, each an operator with its own host time where the layer is one, are slower: its rest may be less than nothing.
    """
    x, dout = tokens(case, run.dtype, run.device)
    layers, wholes, refusals = admitted(case, run.contestants, initial_state(case, run.dtype, run.device), x, dout)
    calls: dict[tuple[str, str], Call] = {}
    for name, layer in layers.items():
        if layer.module is None:
            raise ValueError(f"contestants: expected some that can be taken apart, got {name!r}")
        calls[name, FORWARD] = wholes[name]["forward"]
        calls |= {(name, stage): call for stage, call in stages_of(layer.module, x).items()}
    while True:
        try:
            times = wall_times(calls, run.device, QUICK if run.quick else PROFILING)
            break
        except CallFailed as failed:
            crasher, _ = failed.name  # type: ignore[misc]
            refusals.append(crashed(case, crasher, failed.__cause__))
            del layers[crasher]
            calls = {key: call for key, call in calls.items() if key[0] != crasher}
    rows: list[Row] = []
    for name in layers:
        of_layer = {stage: time.median for (owner, stage), time in times.items() if owner == name}
        forward = of_layer.pop(FORWARD)
        of_layer["rest"] = forward - sum(of_layer.values())
        for stage, milliseconds in {**of_layer, FORWARD: forward}.items():
            spread = times[name, stage].spread if (name, stage) in times else None
            shown = {"stage": stage, "ms": milliseconds, "spread_ms": spread, "percent": 100 * milliseconds / forward}
            rows.append({**described(case, name, run.dtype), **shown, **run.machine})
        if "topology" in of_layer:
            share = of_layer["topology"] / forward
            print(f"{case.name}: the topology takes {share:.1%} of the forward pass of {name}", flush=True)
    append(run.path, rows)
    run.keep(refusals)
    return Measured(case, rows, refusals)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench_moe")
    add_cases(parser)
    parser.add_argument("--profile", action="store_true", help="stages of the forward pass; rows to bench_profile.csv")
    args = parser.parse_args(argv)
    cases = cases_of(parser, args)
    if args.profile:
        run = run_of("bench_profile", args, PROFILED if torch.cuda.is_available() else PROFILED_ON_CPU)
        return conclude(run, [profile(run, case) for case in cases], ("case", "contestant", "stage", "ms", "percent"))
    run = run_of("bench_moe", args)
    return conclude(run, run.time_all(cases, MEASURES), SHOWN)


if __name__ == "__main__":
    sys.exit(main())
