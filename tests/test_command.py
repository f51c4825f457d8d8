"""What the timing commands have in common."""

import csv
import os
import re
import time
from pathlib import Path

import bench_forward
import bench_fwd_bwd
import bench_memory
import bench_moe
import command
import page
import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_cpu_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_command_keeps_how_long_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row each, with its options but not the folder, which is of one machine."""
    options = ["--contestants", "torch_loop", "dense_ceiling", "--quick", "--cases", "quick_uniform"]
    options += ["--batch-sizes", "1", "2"]
    start = time.perf_counter()
    assert bench_moe.main([*options, "--out", str(tmp_path)]) == 0
    whole = time.perf_counter() - start
    assert bench_forward.main(["--quick", "--contestants", "torch_loop", "--out", str(tmp_path)]) == 0
    with (tmp_path / "durations.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["benchmark"], first["options"]) == ("bench_moe", " ".join(options))
    assert (second["benchmark"], second["options"]) == ("bench_forward", "--contestants torch_loop --quick")
    assert (first["cores"], first["gpu"]) == (str(os.cpu_count()), "cpu")
    assert 0.5 * whole < float(first["seconds"]) <= 1.01 * whole
    assert re.search(r"/bench_moe\.csv, after \d+ s\.\n", capsys.readouterr().out)


def test_each_measurement_alone_is_plotted(tmp_path: Path) -> None:
    """By `triton-moe report`, from the files that these commands write."""
    for command_of_one in (bench_forward, bench_fwd_bwd, bench_memory):
        assert command_of_one.main(["--quick", "--contestants", "torch_loop", "--out", str(tmp_path)]) == 0
    written = page.page(tmp_path)
    assert written.count("<svg") == 3
    assert all(f">{column}</text>" in written for column in ("forward_ms", "step_ms", "saved_MiB"))


def test_defaults_are_no_options() -> None:
    """So the row of a command's defaults is found by its empty options."""
    parser = command.parser_of("bench_moe")
    command.add_cases(parser)
    assert command.run_of("bench_moe", parser.parse_args([])).options == ""
    assert command.run_of("bench_moe", parser.parse_args(["--dtype", "fp16"])).options == "--dtype fp16"
