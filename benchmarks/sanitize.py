"""The GPU tests' small cases under NVIDIA's compute-sanitizer; a row for each of its tools goes to sanitize.csv.

    python benchmarks/sanitize.py --tools memcheck initcheck

Tests are dealt out to processes that share the device. PyTorch's cache of memory is off, so each tensor is an
allocation of its own, whose ends the tools see; CUDA graphs cannot be captured then. initcheck does not see what TMA
stores, and takes each read of it for one of memory that nobody wrote: of the Hopper kernels' tests it is given the one
whose buffers PyTorch has filled, and not where the router reads logits that cuBLAS stored so. Exits with 1 if a kernel
of ours is reported or a report not printed, a test fails, or one is not reached in time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from results import ROOT, append, folder, provenance, text

TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
FILES = (
    *("gather", "scatter", "grouped_gemm", "route", "route_tokens", "forward", "backward", "hopper", "decode"),
    *("experts", "replay"),
)
"""What launches each kernel on small operands; others check memory, speed, graphs or torch.compile around them."""
UNSEEN = {
    "initcheck": r"test_hopper\.py::(?!test_each_kernel_by_itself)"
    r"|::test_a_repeated_call_copies_weights_again|::test_descriptors_are_encoded_once"
    r"|::test_who_multiplies_makes_no_difference\[.*-(16-64|128-256)\]"  # rows of a multiple of 16 bytes
}
"""Tests, by a pattern of their names, in which a tool does not see what is written."""
CHOSEN = "not seed_cases and not cuda_graph"
_REPORT = re.compile(
    r"^=========\s+(?:Invalid|Uninitialized|Misaligned|Error:|Warning:|Barrier error|Potential).*$", re.M
)
_KERNEL = re.compile(r"\bat (?:void )?(?!error\b)([A-Za-z_][\w:]*)")  # not "driver entry point at error"
_UNPRINTED = re.compile(r"\b(\d+) errors were not printed")
_OUTCOME = re.compile(r"^tests/\S.* (PASSED|FAILED|ERROR) ", re.M)


def reports(log: str) -> Counter[str]:
    """Kernel -> reports of it in the tool's output; a name with colons is a C++ kernel, and so PyTorch's or CUDA's.
    Those that the tool does not print may be of any kernel, and are an unprinted_kernel's."""
    counted: Counter[str] = Counter()
    starts = [match.start() for match in _REPORT.finditer(log)]
    for start, end in itertools.pairwise([*starts, len(log)]):
        kernel = _KERNEL.search(log, start, end)
        counted[kernel.group(1) if kernel else "host"] += 1
    if unprinted := sum(int(number) for number in _UNPRINTED.findall(log)):
        counted["unprinted_kernel"] = unprinted
    return counted


def is_ours(kernel: str) -> bool:
    return kernel.endswith("_kernel") and ":" not in kernel


def collect(chosen: str) -> list[str]:
    files = [f"tests/test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "--collect-only", "-k", chosen, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "::" in line]


def run(tool: str, tests: Sequence[str], seconds: float, log: Path) -> tuple[Counter[str], Counter[str]]:
    """-> outcomes of the tests that came to their ends, reports by kernel."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "1000000", "--show-backtrace", "no"]
    command += ["--report-api-errors", "no", "--log-file", f"{log}.%p"]
    command += [sys.executable, "-m", "pytest", "-n", "0", "--timeout=0", "-vv", *tests]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    found: Counter[str] = Counter()
    for path in log.parent.glob(f"{log.name}.*"):
        found += reports(path.read_text(errors="replace"))
    return Counter(_OUTCOME.findall(log.read_text(errors="replace"))), found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory checks of the kernels; a row a tool goes to sanitize.csv.")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS[:2])
    parser.add_argument("-k", dest="chosen", default=CHOSEN, help="tests, as pytest's -k takes them")
    parser.add_argument("--workers", type=int, default=14, help="processes that share the device")
    parser.add_argument("--seconds", type=float, default=500, help="a tool's tests are stopped after this time")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = folder(args.out, quick=False, device=device) / "sanitize.csv"
    tests = collect(args.chosen)
    logs = Path(tempfile.mkdtemp(prefix="sanitize-"))
    bad = False
    for tool in args.tools:
        start = time.time()
        given_tests = [test for test in tests if not re.search(UNSEEN.get(tool, "(?!)"), test)]
        shares = [given_tests[worker :: args.workers] for worker in range(min(args.workers, len(given_tests)))]
        with ThreadPoolExecutor(max(1, len(shares))) as pool:
            given = [(tool, share, args.seconds, logs / f"{tool}{number}") for number, share in enumerate(shares)]
            done = list(pool.map(lambda arguments: run(*arguments), given))
        outcomes = sum((outcome for outcome, _ in done), Counter())
        found = sum((kernels for _, kernels in done), Counter())
        ours = sum(count for kernel, count in found.items() if is_ours(kernel))
        row = {
            "tool": tool,
            "asked": len(given_tests),
            "passed": outcomes["PASSED"],
            "failed": outcomes["FAILED"] + outcomes["ERROR"],
            "reports_of_our_kernels": ours,
            "other_reports": found.total() - ours,
            "seconds": time.time() - start,
            **provenance(device),
        }
        append(path, [row])
        print(", ".join(f"{name} {text(value)}" for name, value in row.items()))
        for kernel, count in found.most_common(20):
            print(f"{tool}: {count} reports in {kernel}")
        bad |= not given_tests or bool(ours or row["failed"] or row["passed"] < len(given_tests))
    print(f"Rows: {path}, the tools' output: {logs}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
