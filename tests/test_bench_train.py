"""The commands that measure the training recipe, on tiny models."""

import csv
import dataclasses
import json
from pathlib import Path

import bench_train
import pytest
import tables
import torch
import train_widths
from bpe import Tokens
from padded_experts import PaddedExperts

TEXT = Path(dataclasses.__file__)
PASSES = {"steps": None, "passes": 2}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bench_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_train.main(["--quick", "--data", str(TEXT), "--repeats", "1", "--out", str(tmp_path)]) == 0
    ours, rival, without = rows_of(tmp_path / "bench_train.csv")
    assert [row["experts"] for row in (ours, rival, without)] == ["triton", "grouped_mm", "none"]
    for row in (ours, rival):
        share = 1 - float(without["step_ms"]) / float(row["step_ms"])
        assert float(row["moe_share"]) == pytest.approx(share, abs=2e-3)
    config = bench_train.QUICK_CONFIG
    rate = config.tokens_per_step / float(ours["step_ms"]) * 1e3
    assert float(ours["tokens_per_second"]) == pytest.approx(rate, rel=2e-3)
    assert without["moe_share"] == ours["busy_ms"] == ours["mfu"] == ""
    assert "tokens/s over those with PyTorch's grouped GEMM:" in capsys.readouterr().out
    *_, of_ours, _, of_none = tables.tables_of(tmp_path)[0].markdown().splitlines()
    assert of_ours.startswith(f"| triton | off | {ours['step_ms']} | ")
    assert of_ours.endswith(f" |  | {float(ours['moe_share']):.0%} |  |")
    assert of_none.startswith("| none | off |")


def test_experts_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PaddedExperts, "load_packed", lambda _self, _experts: None)
    assert bench_train.main(["--quick", "--data", str(TEXT), "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


def test_quick_has_a_model_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_train.main(["--quick", "--config", str(tmp_path / "config.json")])
    assert "argument --config: expected none with --quick" in capsys.readouterr().err


def test_both_agree_in_bf16() -> None:
    tokens = Tokens.load(TEXT, bench_train.QUICK_CONFIG.vocabulary)
    config = dataclasses.replace(bench_train.QUICK_CONFIG, precision="bf16")
    assert bench_train.agree(bench_train.contestants(config, tokens, torch.device("cpu")))


def test_train_widths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT.read_text()[:12000])
    names = []
    for sizes in ([[4, 12]], [[2, 16], [2, 8]]):
        changes = {"expert_sizes": sizes, "batch_size": 32, "learning_rate": 0.01, **PASSES}
        names.append(tmp_path / f"{len(sizes)}_widths.json")
        names[-1].write_text(json.dumps({**dataclasses.asdict(bench_train.QUICK_CONFIG), **changes}))
    out = tmp_path / "out"
    assert train_widths.main([*map(str, names), "--data", str(text), "--seeds", "0", "1", "--out", str(out)]) == 0
    rows = rows_of(out / "train_widths.csv")
    assert [(row["experiment"], row["seed"]) for row in rows] == [
        (name, seed) for seed in "01" for name in ("1_widths", "2_widths")
    ]
    for row in rows:
        assert 1.9 < float(row["passes"]) <= 2
        assert float(row["held_out_loss"]) < 5.5
    assert len({row["held_out_loss"] for row in rows}) > 1
    last = tables.tables_of(out)[0].markdown().splitlines()[-1]
    losses = [row["held_out_loss"] for row in rows if row["experiment"] == "2_widths"]
    mean = sum(map(float, losses)) / 2
    assert last.startswith(
        f"| 2x16+2x8, top-2 | 0.0M / 0.0M | {mean:.3f} ({min(losses, key=float)} to {max(losses, key=float)}) | "
    )
    plot = out / "train_widths.svg"
    first = plot.read_text()
    assert "4x12, top-2" in first
    plot.unlink()
    assert train_widths.main(["--draw", "--out", str(out)]) == 0
    assert plot.read_text() == first
    assert capsys.readouterr().out.endswith(f"{plot}\n")


def test_a_run_too_short_for_a_speed_is_drawn(tmp_path: Path) -> None:
    text, config = tmp_path / "text", tmp_path / "short.json"
    text.write_text(TEXT.read_text()[:12000])
    config.write_text(json.dumps({**dataclasses.asdict(bench_train.QUICK_CONFIG), "batch_size": 128, **PASSES}))
    assert train_widths.main([str(config), "--data", str(text), "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path / "train_widths.csv")
    assert (int(row["steps"]) < 10, row["tokens_per_second"]) == (True, "nan")
    assert (tmp_path / "train_widths.svg").exists()


def test_too_little_text_for_a_step(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT.read_text()[:20000])
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**dataclasses.asdict(bench_train.QUICK_CONFIG), "batch_size": 10**5, **PASSES}))
    with pytest.raises(ValueError, match=r"^data: expected 100000 sequences, a step's, in passes = 2, got \d+$"):
        train_widths.main([str(config), "--data", str(text), "--out", str(tmp_path)])
