"""What the timing commands share: their options, the run, and where its rows go."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from cases import BenchCase, select, with_batch_sizes
from contestants import CONTESTANTS
from measure import LAUNCHES, Refusal, Row, exit_code, measure, profiled, table
from results import append, folder, provenance, text
from tables import rows_of
from timing import ceilings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_CONTESTANTS = (
    "triton_moe",
    "triton_moe_graph",
    "torch_loop",
    "grouped_mm",
    "grouped_mm_by_width",
    "transformers_grouped_mm",
    "scattermoe",
    "stk",
    "dense_ceiling",
)
"""Those that are ready within seconds. What compiles or tunes itself for minutes is asked for by name."""
SHOWN = (
    "case",
    "contestant",
    "forward_ms",
    "step_ms",
    "forward_tflops",
    "step_tflops",
    "saved_MiB",
    "peak_MiB",
    "launches_step",
)


@dataclass(frozen=True)
class Run:
    """A command's options, and the machine it runs on."""

    benchmark: str
    contestants: Sequence[str]
    dtype_name: str | None
    quick: bool
    out: Path | None
    options: str
    """All of them, as on the command line, but for `out`."""
    started: float = field(default_factory=time.perf_counter)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name or ("bf16" if self.device.type == "cuda" else "fp32")]

    @cached_property
    def folder(self) -> Path:
        return folder(self.out, quick=self.quick, device=self.device)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.benchmark}.csv"

    @cached_property
    def machine(self) -> dict[str, object]:
        found = {**ceilings(self.device), **provenance(self.device)}
        print(", ".join(f"{name} {text(value)}" for name, value in found.items()), flush=True)
        return found

    @property
    def unfinished(self) -> Path:
        """This process's rows that still want the profiler; it outlives the process only if that was killed."""
        return self.folder / f"{self.benchmark}.{os.getpid()}.unfinished"

    def keep_what_was_killed(self) -> None:
        """Rows of processes that are no more; others may be at work in this folder."""
        for path in sorted(self.folder.glob(f"{self.benchmark}.*.unfinished")):
            if not _is_running(int(path.suffixes[-2][1:])):
                append(self.path, rows_of(path))
                path.unlink()

    def time(self, case: BenchCase, what: Sequence[str], first: Row | None = None) -> Measured:
        """Measure one case; `first` are its rows' first columns. Rows go to the files, those that still want the
        profiler to `unfinished`."""
        machine = self.machine
        rows, refusals = measure(case, self.contestants, self.dtype, self.device, what, quick=self.quick)
        rows = [(first or {}) | row for row in rows]
        if "launches" in what:
            append(self.unfinished, [row | dict.fromkeys(LAUNCHES) | machine for row in rows])
        else:
            rows = [row | machine for row in rows]
            append(self.path, rows)
        self.keep(refusals)
        print(f"{case.name}: {len(rows)} contestants measured", flush=True)
        return Measured(case, rows, refusals)

    def keep(self, refusals: Sequence[Refusal]) -> None:
        """A row for each contestant that crashed or is wrong."""
        failures = [{"benchmark": self.benchmark, **asdict(refusal)} for refusal in refusals if refusal.is_failure]
        append(self.folder / "refused.csv", [row | provenance(self.device) for row in failures])

    def keep_duration(self) -> float:
        """A row of how long the command took since its options were read -> that, in seconds."""
        seconds = time.perf_counter() - self.started
        row = {"benchmark": self.benchmark, "options": self.options, "seconds": seconds, "cores": os.cpu_count()}
        append(self.folder / "durations.csv", [row | provenance(self.device)])
        return seconds

    def time_all(self, cases: Sequence[BenchCase], what: Sequence[str]) -> list[Measured]:
        """Measure cases one after the other. The profiler waits until all is timed; if the command is ended before, by
        a signal too, the rows that there are go to the file without it: if it was killed, by the next one."""
        self.keep_what_was_killed()
        measured: list[Measured] = []
        waiting: list[tuple[BenchCase, Row]] = []
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            for case in cases:
                measured.append(self.time(case, what))
                waiting += [(case, row) for row in measured[-1].rows if "launches" in what]
            while waiting:
                case, row = waiting[0]
                row |= profiled(case, str(row["contestant"]), self.dtype, self.device) | self.machine
                append(self.path, [waiting.pop(0)[1]])
        finally:
            signal.signal(signal.SIGTERM, before)
            append(self.path, [row | dict.fromkeys(LAUNCHES) | self.machine for _, row in waiting])
            self.unfinished.unlink(missing_ok=True)
        return measured


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError) as error:
        return isinstance(error, PermissionError)
    return True


@dataclass(frozen=True)
class Measured:
    case: BenchCase
    rows: list[Row]
    refusals: list[Refusal]


def parser_of(benchmark: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{benchmark}.py", description=f"Rows go to {benchmark}.csv.")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--dtype", choices=list(DTYPES), help="bf16, and fp32 on the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny cases and short loops, for the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    return parser


def add_cases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases or groups of cases.py (seed)")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, metavar="N", help="each case at so many batches of 512 tokens"
    )


def cases_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[BenchCase]:
    try:
        cases = select(args.cases or ["quick" if args.quick else "seed"])
        return with_batch_sizes(cases, args.batch_sizes) if args.batch_sizes else cases
    except ValueError as error:
        parser.error(str(error))


def _options(args: argparse.Namespace) -> str:
    words: list[str] = []
    for name, value in vars(args).items():
        if value and name != "out":
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def run_of(benchmark: str, args: argparse.Namespace, default: Sequence[str] = DEFAULT_CONTESTANTS) -> Run:
    return Run(benchmark, args.contestants or default, args.dtype, args.quick, args.out, _options(args))


def conclude(run: Run, measured: Sequence[Measured], columns: Sequence[str]) -> int:
    """Print these columns as a table, as far as the rows have them; keep how long all took -> the exit status."""
    rows = [row for of_case in measured for row in of_case.rows]
    if rows:
        print(table(rows, [column for column in columns if column in rows[0]]))
    print(f"Rows went to {run.path}, after {run.keep_duration():.0f} s.")
    return exit_code(rows, [refusal for of_case in measured for refusal in of_case.refusals])


def timing_command(benchmark: str, what: Sequence[str], argv: Sequence[str] | None = None) -> int:
    """A command that measures these things of the cases it is given."""
    parser = parser_of(benchmark)
    add_cases(parser)
    args = parser.parse_args(argv)
    run, cases = run_of(benchmark, args), cases_of(parser, args)
    return conclude(run, run.time_all(cases, what), SHOWN)
