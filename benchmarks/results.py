"""Rows of measurements with the machine and the code they came from, appended to a CSV file."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def _output_of(*command: str) -> str:
    """What a command prints, stripped; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def version_of(package: str) -> str:
    """Nothing if it is not installed, or only lies on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def with_version(package: str) -> str:
    return f"{package} {version_of(package)}".strip()


def provenance(device: torch.device) -> dict[str, str]:
    """The columns every row ends with. The commit is the environment's BENCH_COMMIT, or else git's."""
    on_gpu = device.type == "cuda"
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else ""
    commit = os.environ.get("BENCH_COMMIT") or (
        _output_of("git", "rev-parse", "--short", "HEAD") if (ROOT / ".git").exists() else ""
    )
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": driver.partition("\n")[0],
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def folder(out: Path | None, *, quick: bool, device: torch.device) -> Path:
    """Where rows go: to `out` if given, to `results/` beside this file if measured on a GPU, else to a fresh folder."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return out
    if device.type == "cuda" and not quick:
        return ROOT / "benchmarks" / "results"
    return Path(tempfile.mkdtemp(prefix="triton-moe-benchmarks-"))


def text(value: object) -> str:
    """A cell: floats to 4 digits or one decimal, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
    return str(value)


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a CSV file, which gets a header if it is new.

    Raises ValueError, and writes nothing, if a row's columns are not those of the file, in that order.
    """
    if not rows:
        return
    columns = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"{path.name}: expected columns {columns}, got {list(row)}")
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns)
        writer.writerows([text(value) for value in row.values()] for row in rows)
