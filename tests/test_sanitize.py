"""The memory checks' command: what it takes for a report, whose it says that is, and that it runs the tests it is asked
to."""

import csv
import stat
from collections import Counter
from pathlib import Path

import pytest
import sanitize

LOG = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at gather_kernel+0x120 in gather.py:45
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f0000000000 is out of bounds
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<float>>(int)+0x80
=========     by thread (0,0,0) in block (0,0,0)
========= Uninitialized access at 0x7f0000000000 on access by cudaMemcpy source
=========     Saved host backtrace up to driver entry point at error
========= Error: Race reported between Write access at scatter_fwd_kernel+0x70 and Read access at ...
========= ERROR SUMMARY: 3 errors
"""
STAND_IN = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
log=${2%.%p}.1
shift 2
"$@"
printf '%s' "$SANITIZER_SAYS" > "$log"
"""


def test_reports() -> None:
    found = sanitize.reports(LOG)
    assert found == {
        "gather_kernel": 1, "at::native::vectorized_elementwise_kernel": 1, "host": 1, "scatter_fwd_kernel": 1,
    }  # fmt: skip
    assert [kernel for kernel in found if sanitize.is_ours(kernel)] == ["gather_kernel", "scatter_fwd_kernel"]
    many = "========= ERROR SUMMARY: 12 errors were not printed. Use --print-limit option to adjust the number\n"
    assert sanitize.reports(LOG + many) == found + Counter(unprinted_kernel=12)
    assert sanitize.is_ours("unprinted_kernel")
    assert sanitize.reports("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == {}


@pytest.mark.parametrize(
    ("tool", "said", "status", "asked"),
    [("memcheck", "", 0, "2"), ("memcheck", LOG, 1, "2"), ("initcheck", "", 0, "1")],
)
def test_command(
    tool: str, said: str, status: int, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With something that only runs what it is given in the sanitizer's place, and tests that need no GPU."""
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SANITIZER_SAYS", said)
    tests = ["tests/test_layout.py::test_docstrings", "tests/test_sanitize.py::test_reports"]
    monkeypatch.setattr(sanitize, "collect", lambda chosen: tests)
    monkeypatch.setitem(sanitize.UNSEEN, "initcheck", "test_reports")
    assert sanitize.main(["--tools", tool, "--workers", "2", "--out", str(tmp_path)]) == status
    (row,) = csv.DictReader((tmp_path / "sanitize.csv").read_text().splitlines())
    assert (row["tool"], row["asked"], row["passed"], row["failed"]) == (tool, asked, asked, "0")
    monkeypatch.setitem(sanitize.UNSEEN, tool, "tests/")
    assert sanitize.main(["--tools", tool, "--out", str(tmp_path)]) == 1
    assert (row["reports_of_our_kernels"], row["other_reports"]) == (("4", "4") if said else ("0", "0"))
