"""The commands that compare gradients and training runs: what they print, and that they tell right from wrong."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import gradients
import pytest
import torch
import validate_training
from baselines import moe

from triton_moe.train.trainer import Trainer


@pytest.fixture(autouse=True)
def _on_the_cpu_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Text that a small model learns something from."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} and {n} make {2 * n}, and {n} times {n} makes {n * n}.\n" for n in range(2000)))
    return path


def test_training_the_baseline_and_ours_agrees(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--data", str(text), "--out", str(tmp_path)]
    assert validate_training.main(arguments) == 0
    assert capsys.readouterr().out.endswith("\nPASSED\n")
    rows = rows_of(tmp_path / "validate_training.csv")
    assert [(row["seed"], row["steps"], row["result"], row["gpu"]) for row in rows] == [
        ("0", "100", "pass", "cpu"),
        ("1", "100", "pass", "cpu"),
    ]
    for row in rows:
        assert float(row["correlation"]) >= 0.9999
        assert float(row["first_steps_difference"]) < 1e-4
        assert int(row["compared_steps"]) >= 10
        assert 0 < float(row["our_dw1_error"]) < 1e-5


def test_the_historical_baseline_fails(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its losses in the first steps and by its gradients; a run of it alone would look sound: its loss falls too."""
    arguments = ["--quick", "--data", str(text), "--out", str(tmp_path), "--baseline", "block_sparse_historical"]
    assert validate_training.main(arguments) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("\nFAILED\n")
    for seed in range(2):
        assert re.search(rf"\n(losses|scores) of seed {seed}: ", printed)
    assert "gradients of layer 0, block_sparse_historical: " in printed
    assert "gradients of layer 0, triton_moe: " not in printed
    for row in rows_of(tmp_path / "validate_training.csv"):
        assert row["result"] == "fail"
        assert float(row["baseline_dw1_error"]) > 0.5
        assert float(row["correlation"]) > 0.99


def test_held_out_losses_apart_fail_every_row(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the baseline alone, whose losses while it trains are right."""
    sound = validate_training.finish

    def off(trainer: Trainer, steps: int) -> validate_training.Run:
        run = sound(trainer, steps)
        is_baseline = any(isinstance(module, moe.MoEMLP) for module in trainer.model.modules())
        return replace(run, held_out=run.held_out + 9.0 * is_baseline)

    monkeypatch.setattr(validate_training, "finish", off)
    assert validate_training.main(["--quick", "--steps", "2", "--data", str(text), "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("\nheld-out losses: 9 apart in the mean, seeds ") == 1
    assert "of seed" not in printed
    assert "gradients of layer" not in printed
    assert [row["result"] for row in rows_of(tmp_path / "validate_training.csv")] == ["fail", "fail"]


def run_of(losses: list[float], logits: list[list[float]]) -> validate_training.Run:
    """One layer, one token, two experts."""
    return validate_training.Run(torch.tensor(losses).double(), torch.tensor(logits)[:, None, None], held_out=1.0)


TIE = [[1.0, 0.0], [1.0, 0.0], [0.5 + 1e-6, 0.5], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("losses", "logits", "faults"),
    [
        ([5.0, 4.0, 3.0, 2.0], TIE, []),
        ([5.0, 4.0, 3.5, 2.5], [*TIE[:2], [0.5, 0.5 + 1e-6], [0.0, 1.0]], []),  # two runs, each right
        ([5.0, 4.0, 3.5, 2.5], [*TIE[:2], [0.4, 0.5], [0.0, 1.0]], ["scores of seed 7: 0.1 apart at step 2"]),
        ([5.0, 4.01, 3.0, 2.0], TIE, ["losses of seed 7: 0.01 apart at step 1"]),
        ([5.0, 3.0, 4.0, 2.0], TIE, ["losses of seed 7: 1 apart", "correlation of seed 7: 0.8"]),
    ],
)
def test_runs_are_compared_until_a_tie_parts_them(
    losses: list[float], logits: list[list[float]], faults: list[str]
) -> None:
    ours, twin = run_of([5.0, 4.0, 3.0, 2.0], TIE), run_of([5.0, 4.0, 3.0, 2.0], [[1 + 1e-6, 0.0], *TIE[1:]])
    columns, found = validate_training.compare(ours, run_of(losses, logits), twin, top_k=1, seed=7)
    assert columns["compared_steps"] == (4 if logits is TIE else 2)
    assert len(found) == len(faults)
    assert all(fault.startswith(start) for fault, start in zip(found, faults, strict=True))


@pytest.mark.parametrize("parted", [0, 1, 9, 10, 99])
def test_a_seed_that_parts_at_once_fails(parted: int) -> None:
    """By a tie, so that nothing else is wrong. How many steps the other seeds have does not count."""
    losses = [5.0 - step / 100 for step in range(100)]
    before, after = [[1.0, 0.0]] * parted, [[1.0, 0.0]] * (99 - parted)
    logits, others = ([*before, tie, *after] for tie in ([0.5 + 1e-6, 0.5], [0.5, 0.5 + 1e-6]))
    twin = run_of(losses, [[first + 1e-6, second] for first, second in logits])
    columns, faults = validate_training.compare(run_of(losses, logits), run_of(losses, others), twin, top_k=1, seed=7)
    assert columns["compared_steps"] == parted
    assert faults == [f"compared steps of seed 7: expected 10 or more, got {parted}"] * (parted < 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "499"], "--steps: expected 500 or more, got 499"),
        (["--steps", "0"], "--steps: expected 500 or more, got 0"),
        (["--seeds", "2"], "--seeds: expected 3 or more, got 2"),
        (["--quick", "--steps", "1"], "--steps: expected 2 or more, got 1"),
        (["--quick", "--seeds", "1"], "--seeds: expected 2 or more, got 1"),
    ],
)
def test_what_validates_nothing_is_refused(
    arguments: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        validate_training.main([*arguments, "--data", str(text), "--out", str(tmp_path)])
    assert f"error: {message}\n" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))


def test_gradients(tmp_path: Path) -> None:
    assert gradients.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "gradients.csv")
    assert {row["contestant"] for row in rows} == set(gradients.ON_CPU)
    for row in rows:
        garbage = row["contestant"] == "block_sparse_historical" and row["tensor"] in ("dw1", "dw2", "dw3")
        if garbage and row["case"] == "quick_variable":  # quick_uniform's experts are one block wide
            assert float(row["relative_error"]) > 0.5
        else:
            assert float(row["relative_error"]) < 1e-5
            assert float(row["cosine"]) > 0.9999


def test_cosine_and_relative_error() -> None:
    a = torch.tensor([1.0, 0.0])
    assert gradients.cosine(a, torch.tensor([2.0, 0.0])) == 1
    assert gradients.cosine(a, torch.tensor([0.0, 2.0])) == 0
    assert gradients.relative_error(a, torch.tensor([2.0, 0.0])) == 0.5
