"""The searches for rare faults, on the CPU: random draws and the long training loop see what they are there to see."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import soak
import stress
import torch
from tables import rows_of

from operators import zeros
from triton_moe import moe_mlp
from triton_moe.activations import is_gated
from triton_moe.kernels.hopper import launch


@pytest.fixture(autouse=True)
def _on_the_cpu_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_stress(tmp_path: Path) -> None:
    assert stress.main(["--quick", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path / "stress.csv")
    assert row["draws"] == row["asked"] == "20"
    assert row["mismatches"] == row["bitwise_differences"] == row["crashes"] == "0"


def noise(*args, **kwargs) -> torch.Tensor:
    out = moe_mlp(*args, **kwargs)
    return out * (1 + torch.finfo(out.dtype).eps * torch.randint_like(out, 2))


@pytest.mark.parametrize(("wrong", "column"), [(zeros, "mismatches"), (noise, "bitwise_differences")])
def test_stress_fails(wrong: Callable, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress, "moe_mlp", wrong)
    assert stress.main(["--quick", "--out", str(tmp_path)]) == 1
    (row,) = rows_of(tmp_path / "stress.csv")
    assert int(row[column]) > 0


def test_soak(tmp_path: Path) -> None:
    assert soak.main(["--quick", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path / "soak.csv")
    assert row["faults"] == "0"
    assert int(row["checks"]) > 0
    assert float(row["last_loss"]) < float(row["first_loss"])


def test_soak_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "moe_mlp", zeros)
    assert soak.main(["--quick", "--steps", "6", "--out", str(tmp_path)]) == 1
    (row,) = rows_of(tmp_path / "soak.csv")
    assert row["faults"] == row["checks"]


def test_a_draw_is_its_seed() -> None:
    assert stress.draw(12345) == stress.draw(12345)
    assert stress.draw(12345) != stress.draw(12345 + stress.NUM_PROFILES)


def test_draws_reach_the_widest_tiles() -> None:
    """In 16 bits, with a gate and without: those across widths, across H, both and neither."""
    kinds = set()
    for seed in range(20 * stress.NUM_PROFILES):
        given = stress.draw(seed)
        wide = math.gcd(256, *given.case.widths) == 256, given.case.hidden_size % 256 == 0
        if given.dtype.itemsize == 2 and given.case.hidden_size % 16 == 0:
            kinds.add((is_gated(given.case.activation), *wide))
    assert kinds == set(itertools.product((False, True), repeat=3))


def test_fitted_draws_fit_the_hopper_kernels() -> None:
    aligned, shared = set(), set()
    for seed in range(0, 60 * stress.NUM_PROFILES, 25):
        given = stress.fitted(stress.draw(seed))
        assert given.dtype.itemsize == 2
        assert any(given.case.widths)
        assert given.case.hidden_size % 64 == 0
        assert not given.case.bias
        aligned.add(math.gcd(64, *given.case.widths))
        shared.add((given.dtype, given.num_programs))
    assert {64, 8, 1} <= aligned
    assert shared == {(dtype, count) for dtype in (torch.bfloat16, torch.float16) for count in stress.NUM_PROGRAMS}


def test_programs_of_a_draw() -> None:
    number = launch._num_programs
    with stress.programs(3):
        assert launch._num_programs(torch.device("cpu")) == 3
    with stress.programs(None):
        assert launch._num_programs is number
