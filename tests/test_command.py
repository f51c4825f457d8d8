"""What the timing commands have in common."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_forward
import bench_fwd_bwd
import bench_memory
import bench_moe
import command
import page
import pytest
import timing
import torch
from tables import rows_of


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


def test_contestants_take_turns() -> None:
    """Each is warm before the first round, and in a round called once before it is timed."""
    calls: list[str] = []
    effort = timing.Effort(repeats=3, loop_seconds=1e-9)
    of = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.wall_times(of, torch.device("cpu"), effort)
    warm_up = 2 * timing.WARM_UP
    assert calls == [*"a" * warm_up, *"b" * warm_up, *"aabb" * effort.repeats]
    assert times["a"].median > 0
    assert times["a"].spread >= 0


def test_memory_counts_what_is_saved() -> None:
    """The product's other operand and the square's own; not the parameter."""
    weight, x = torch.nn.Parameter(torch.ones(2**10, 2**9)), torch.ones(2**10, 2**10)
    found = timing.memory(lambda: (x @ weight).square(), torch.ones(2**10, 2**9), [weight])
    assert (found.saved, found.held, found.peak) == (4 + 2, None, None)


PROGRAM = """
import os
import bench_moe, contestants, torch

build = contestants.CONTESTANTS["torch_loop"]

def fatal(config, state):
    if len(config.layout.width_classes) > 1:
        os.abort()
    return build(config, state)

contestants.CONTESTANTS["torch_loop"] = fatal
torch.cuda.is_available = lambda: False
bench_moe.main(["--quick", "--contestants", "dense_ceiling", "torch_loop", "--out", OUT])
"""


def test_a_contestant_that_kills_the_process_takes_no_rows_with_it(tmp_path: Path) -> None:
    """Those of the cases before are in the file after the next command, which leaves alone those of one at work."""
    at_work = tmp_path / f"bench_moe.{os.getppid()}.unfinished"
    at_work.write_text("case,contestant\nquick_uniform,stk\n")
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", f"OUT = {str(tmp_path)!r}\n{PROGRAM}"],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGABRT
    assert not (tmp_path / "bench_moe.csv").exists()
    assert bench_moe.main(["--quick", "--contestants", "torch_loop", "--out", str(tmp_path)]) == 0
    ran = [(row["case"], row["contestant"]) for row in rows_of(tmp_path / "bench_moe.csv")]
    assert ran == [
        ("quick_uniform", "dense_ceiling"), ("quick_uniform", "torch_loop"),
        ("quick_uniform", "torch_loop"), ("quick_variable", "torch_loop"),
    ]  # fmt: skip
    assert [*tmp_path.glob("*.unfinished")] == [at_work]


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
