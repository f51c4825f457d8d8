"""The benchmarks' commands on tiny shapes, and what keeps their numbers honest."""

import csv
import dataclasses
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import accuracy
import bench_decode
import bench_forward
import bench_fwd_bwd
import bench_host
import bench_kernels
import bench_memory
import bench_moe
import bench_scaling
import cold_start
import contestants
import gate
import layers
import measure
import pytest
import results
import roofline
import stages
import tables
import torch
from cases import CASES, GROUPS, bench_case, select, with_batch_sizes

from operators import zeros
from reference.moe import MoEMLP as BlockSparseMoEMLP
from triton_moe import MoEConfig, MoEMLP, moe_mlp, products
from triton_moe.testing import SEED_CASES

PROVENANCE = ["gpu", "driver", "torch", "triton", "python", "commit", "date"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_the_cpu_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bench_host(tmp_path: Path) -> None:
    assert bench_host.main(["--quick", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path / "bench_host.csv")
    assert row["case"] == "quick_variable"
    assert float(row["forward_ms"]) > 0
    assert float(row["step_ms"]) > 0
    assert row["graph_step_ms"] == row["launches_step"] == ""


def test_bench_moe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_moe.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "bench_moe.csv")
    ran = {(row["case"], row["contestant"]) for row in rows}
    everywhere = ("triton_moe", "torch_loop", "grouped_mm", "dense_ceiling")
    expected = {(case.name, name) for case in GROUPS["quick"] for name in everywhere}
    assert ran == expected | {("quick_variable", "grouped_mm_by_width")}
    assert not (tmp_path / "refused.csv").exists()
    assert list(rows[0])[-len(PROVENANCE) :] == PROVENANCE
    for row in rows:
        assert min(float(row[column]) for column in ("forward_ms", "step_ms", "forward_tflops", "saved_MiB")) > 0
        forward, backward, whole = (float(row[f"{name}_ms"]) for name in ("forward", "backward", "step"))
        assert backward == pytest.approx(whole - forward, rel=2e-2, abs=2e-3)
    printed = capsys.readouterr().out
    assert "quick_uniform: no time for scattermoe. ScatterMoE runs on CUDA alone." in printed
    assert "quick_variable: no time for scattermoe. ScatterMoE takes experts of one width." in printed


def test_a_contestant_that_raises_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_args: object) -> layers.Layer:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setitem(contestants.CONTESTANTS, "grouped_mm", broken)
    assert bench_moe.main(["--quick", "--cases", "quick_uniform", "--out", str(tmp_path)]) == 0
    assert "quick_uniform: no time for grouped_mm. RuntimeError: no such kernel\n" in capsys.readouterr().out
    (row,) = rows_of(tmp_path / "refused.csv")
    assert (row["benchmark"], row["case"], row["contestant"]) == ("bench_moe", "quick_uniform", "grouped_mm")
    assert (row["kind"], row["reason"]) == ("crashed", "RuntimeError: no such kernel")
    assert list(row)[-len(PROVENANCE) :] == PROVENANCE


@pytest.mark.parametrize("passed", [0, 4])
def test_a_contestant_that_raises_while_it_is_timed(
    passed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many calls. It gets a row in refused.csv, and the others their times."""
    build, time, left = contestants.CONTESTANTS["grouped_mm"], measure.wall_times, [10**6]

    def broken(config: MoEConfig, state: layers.State) -> layers.Layer:
        layer = build(config, state)

        def forward(x: torch.Tensor) -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("illegal memory access")
            return layer.forward(x)

        return dataclasses.replace(layer, forward=forward)

    def timed(*arguments: Any) -> Any:
        left[0] = min(left[0], passed)
        return time(*arguments)

    monkeypatch.setattr(measure, "wall_times", timed)
    monkeypatch.setitem(contestants.CONTESTANTS, "grouped_mm", broken)
    arguments = ["--quick", "--cases", "quick_uniform", "--contestants", "grouped_mm", "triton_moe"]
    assert bench_moe.main([*arguments, "--out", str(tmp_path)]) == 0
    assert [row["contestant"] for row in rows_of(tmp_path / "bench_moe.csv")] == ["triton_moe"]
    (row,) = rows_of(tmp_path / "refused.csv")
    assert (row["contestant"], row["kind"]) == ("grouped_mm", "crashed")
    assert row["reason"] == "RuntimeError: illegal memory access"


def test_what_was_timed_is_kept_when_the_command_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(config: MoEConfig, state: layers.State) -> layers.Layer:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not seen")

    build = contestants.CONTESTANTS["grouped_mm"]
    monkeypatch.setitem(
        contestants.CONTESTANTS,
        "grouped_mm",
        lambda config, state: (build if len(config.layout.width_classes) == 1 else ended)(config, state),
    )
    arguments = ["--quick", "--contestants", "triton_moe", "grouped_mm", "--out", str(tmp_path)]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        bench_moe.main(arguments)
    assert signal.getsignal(signal.SIGTERM) is before
    rows = rows_of(tmp_path / "bench_moe.csv")
    assert [(row["case"], row["contestant"]) for row in rows] == [
        ("quick_uniform", "triton_moe"),
        ("quick_uniform", "grouped_mm"),
    ]
    assert all(row["launches_step"] == "" for row in rows)


def test_nothing_measured_is_a_failure(tmp_path: Path) -> None:
    assert bench_moe.main(["--quick", "--contestants", "stk", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("command", "measured"),
    [
        (bench_forward, {"forward_ms", "forward_spread_ms", "forward_tflops"}),
        (bench_fwd_bwd, {"step_ms", "step_spread_ms", "step_tflops"}),
        (bench_memory, {"saved_MiB", "held_MiB", "peak_MiB"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_measurement(command: ModuleType, measured: set[str], tmp_path: Path) -> None:
    arguments = [
        "--quick",
        "--cases",
        "quick_variable",
        "--batch-sizes",
        "1",
        "--contestants",
        "triton_moe",
        "grouped_mm",
    ]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / f"{command.__name__}.csv")
    assert [(row["case"], row["T"], row["contestant"]) for row in rows] == [
        ("quick_variable_batch1", "512", "triton_moe"),
        ("quick_variable_batch1", "512", "grouped_mm"),
    ]
    assert set(measure.COLUMNS) & rows[0].keys() == measured
    assert all(float(row[column]) > 0 for row in rows for column in measured if row[column])
    assert any(rows[0][column] for column in measured)


def test_batch_sizes() -> None:
    cases = with_batch_sizes(GROUPS["seed"][:1], [4, 8])
    assert [(case.name, case.num_tokens) for case in cases] == [("8exp_uniform_batch4", 2048), ("8exp_uniform", 4096)]
    with pytest.raises(ValueError, match="batch_sizes: expected 1 or more each, got 0"):
        with_batch_sizes(GROUPS["seed"], [8, 0])


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--profile", "--cases", "quick_variable", "--out", str(tmp_path)]
    assert bench_moe.main(arguments) == 0
    rows = rows_of(tmp_path / "bench_profile.csv")
    by_contestant = {
        name: [row for row in rows if row["contestant"] == name] for name in ("block_sparse", "triton_moe")
    }
    assert [row["stage"] for row in by_contestant["block_sparse"]] == [*stages.STAGES, "rest", "forward"]
    ours = ["router", "sort", "up", "down", "scatter", "rest", "forward"]
    assert [row["stage"] for row in by_contestant["triton_moe"]] == ours
    for of_contestant in by_contestant.values():
        percents = [float(row["percent"]) for row in of_contestant]
        assert percents[-1] == 100
        assert sum(percents[:-1]) == pytest.approx(100, abs=0.5)
        assert all(float(row["ms"]) > 0 for row in of_contestant if row["stage"] != "rest")
    assert "quick_variable: the topology takes" in capsys.readouterr().out


def test_a_contestant_that_raises_while_it_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_apart = bench_moe.stages_of

    def broken() -> None:
        raise RuntimeError("illegal memory access")

    def stages_of(layer: MoEMLP, x: torch.Tensor) -> dict[str, Any]:
        found = taken_apart(layer, x)
        return {**found, "up": broken} if isinstance(layer, BlockSparseMoEMLP) else found

    monkeypatch.setattr(bench_moe, "stages_of", stages_of)
    arguments = ["--quick", "--profile", "--cases", "quick_uniform", "--out", str(tmp_path)]
    assert bench_moe.main(arguments) == 0
    assert {row["contestant"] for row in rows_of(tmp_path / "bench_profile.csv")} == {"triton_moe"}
    (row,) = rows_of(tmp_path / "refused.csv")
    assert (row["benchmark"], row["contestant"], row["kind"]) == ("bench_profile", "block_sparse", "crashed")


def test_the_stages_make_up_the_forward_pass() -> None:
    """The last stage of each contestant's gives its output."""
    (case,) = select(["quick_variable"])
    state = gate.initial_state(case, torch.float32, CPU)
    x, _ = gate.tokens(case, torch.float32, CPU)
    for name in ("block_sparse", "triton_moe"):
        layer = contestants.CONTESTANTS[name](case.config, state)
        assert layer.module is not None
        torch.testing.assert_close(stages.stages_of(layer.module, x)["scatter"](), layer.forward(x))


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_scaling.main(["--quick", "--contestants", "triton_moe", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "bench_scaling.csv")
    points = [
        (sweep, str(point.value)) for sweep in bench_scaling.SWEEPS for point in bench_scaling.points(sweep, True)
    ]
    assert [(row["sweep"], row["value"]) for row in rows] == points
    assert all(min(float(row[column]) for column in ("forward_ms", "step_ms", "forward_gflop")) > 0 for row in rows)
    assert "triton_moe: T 8 to 64: a step takes" in capsys.readouterr().out


def test_the_sweeps_change_one_thing() -> None:
    tokens, experts, ratios = (bench_scaling.points(sweep, quick=False) for sweep in bench_scaling.SWEEPS)
    assert [point.value for point in tokens] == [4**n for n in range(10)]
    assert tokens[-1].case.num_tokens == 262144
    assert [point.case.config.layout.num_experts for point in experts] == [8, 16, 32, 64, 128, 256, 512]
    assert len({point.case.forward_flops() for point in experts}) == 1
    for point in ratios:
        wide, narrow = (width for _, width in point.case.config.expert_sizes)
        assert (wide // narrow, wide % narrow, narrow % 64) == (point.value, 0, 0)
        assert abs(wide + narrow - 65 * 64) <= 0.05 * 65 * 64
    assert ratios[-1].value == 64


def times_two(layer: layers.Layer, name: str) -> layers.Layer:
    """The same layer, with one of its gradients twice what it should be."""

    def gradients() -> dict[str, torch.Tensor]:
        found = layer.gradients()
        return found | {name: 2 * found[name]}

    return dataclasses.replace(layer, gradients=gradients)


@pytest.mark.parametrize("contestant", ["triton_moe", "grouped_mm"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: dataclasses.replace(layer, forward=lambda x: 0 * layer.forward(x)),
        lambda layer: dataclasses.replace(layer, forward=lambda x: torch.nan * layer.forward(x)),
        lambda layer: times_two(layer, "drouter"),
        lambda layer: times_two(layer, "dw3"),
    ],
    ids=["zeros", "nan", "router gradient", "w3 gradient"],
)
def test_the_gate_refuses_a_wrong_contestant(
    spoil: Callable[[layers.Layer], layers.Layer],
    contestant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = contestants.CONTESTANTS[contestant]
    monkeypatch.setitem(contestants.CONTESTANTS, contestant, lambda *args: spoil(right(*args)))
    arguments = ["--quick", "--cases", "quick_variable", "--out", str(tmp_path), "--contestants", contestant]
    assert bench_moe.main([*arguments, "torch_loop"]) == (contestant == "triton_moe")
    assert f"quick_variable: no time for {contestant}. " in capsys.readouterr().out
    assert [row["contestant"] for row in rows_of(tmp_path / "bench_moe.csv")] == ["torch_loop"]
    assert [(row["contestant"], row["kind"]) for row in rows_of(tmp_path / "refused.csv")] == [(contestant, "wrong")]


def test_flops() -> None:
    # Two of three experts for each of 5 tokens, of mean width (2 * 8 + 5) / 3 = 7: 10 rows of 7 columns, H = 4, so that
    # a matrix takes 2 * 10 * 7 * 4 = 560 operations.
    assert bench_case("", 5, 4, [(2, 8), (1, 5)], 2, "gelu").forward_flops() == 2 * 560
    assert bench_case("", 5, 4, [(2, 8), (1, 5)], 2, "swiglu").forward_flops() == 3 * 560


def test_the_seed_cases_are_those_of_the_tests() -> None:
    tested = [(case.num_tokens, case.hidden_size, case.widths, case.top_k) for case in SEED_CASES[:8]]
    assert tested == [
        (case.num_tokens, case.config.hidden_size, case.config.layout.widths, case.config.num_active_experts)
        for case in GROUPS["seed"][:8]
    ]


def test_select() -> None:
    assert [case.name for case in select(["quick", "quick_uniform"])] == ["quick_uniform", "quick_variable"]
    assert len(select(["all"])) == len(CASES) - len(GROUPS["quick"])
    with pytest.raises(ValueError, match=r"cases: expected some of .*, got 'nothing'"):
        select(["nothing"])


def test_accuracy(tmp_path: Path) -> None:
    assert accuracy.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "accuracy.csv")
    assert {(row["dtype"], row["tensor"]) for row in rows} == {
        (dtype, tensor)
        for dtype in ("bfloat16", "float16", "float32")
        for tensor in ("out", "dx", "dtopk_weights", "dw1", "dw2", "dw3")
    }
    assert {row["result"] for row in rows} == {"pass"}
    assert list(rows[0])[-len(PROVENANCE) :] == PROVENANCE


def test_accuracy_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "moe_mlp", zeros)
    assert accuracy.main(["--quick", "--out", str(tmp_path)]) == 1
    assert {row["result"] for row in rows_of(tmp_path / "accuracy.csv")} == {"fail"}


def test_kernels(tmp_path: Path) -> None:
    assert bench_kernels.main(["--quick", "--cases", "quick_variable", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "bench_kernels.csv")
    assert [row["kernel"] for row in rows] == ["up", "down", "dh", "dw2", "dw1", "dx", "scatter", "scatter_dx", "route"]
    assert [row["kernel"] for row in rows if not row["tflops"]] == ["scatter", "scatter_dx", "route"]
    assert all(float(row["ms"]) > 0 for row in rows)
    assert list(rows[0])[-len(PROVENANCE) :] == PROVENANCE


def test_kernels_off_get_no_time() -> None:
    right, wrong = (
        products.Product(lambda: None, lambda value=value: [torch.full((4,), value)], 1, 4) for value in (1.0, 1.1)
    )
    assert products.disagreement(right, right) == 0
    assert products.disagreement(wrong, right) > products.TOLERANCE


def test_nan_in_any_output_is_a_disagreement() -> None:
    right, wrong = (
        products.Product(lambda: None, lambda last=last: [torch.ones(4), torch.full((4,), last)], 1, 8)
        for last in (1.0, math.nan)
    )
    assert math.isnan(products.disagreement(wrong, right))


def test_roofline(tmp_path: Path) -> None:
    row = {"case": "a", "kernel": "up", "backend": "hopper", "tflops": "500", "TBps": "1", "copy_TBps": "4"}
    row |= {"cublas_8192_tflops": "700", "gpu": "a GPU", "date": "today", "commit": "abc"}
    scatter = {**row, "kernel": "scatter", "backend": "triton", "tflops": "", "TBps": "3"}
    roofline.draw([row, {**row, "kernel": "down", "backend": "triton"}, scatter], tmp_path / "deep" / "roofline.svg")
    assert "scatter 75%" in (tmp_path / "deep" / "roofline.svg").read_text()
    with pytest.raises(ValueError, match="rows: expected one"):
        roofline.draw([scatter], tmp_path / "none.svg")


def test_the_committed_roofline_is_of_the_newest_rows(tmp_path: Path) -> None:
    """By the texts after the axes': versions of Matplotlib differ in where lines are and in what ticks say."""

    def texts(path: Path) -> list[str]:
        return re.findall("<!-- (.*) -->", path.read_text().partition("<!-- TFLOP/s -->")[2])

    assert roofline.main(["--out", str(tmp_path / "roofline.svg")]) == 0
    drawn = texts(tmp_path / "roofline.svg")
    assert drawn == texts(results.ROOT / "docs" / "roofline.svg")
    newest = [row for row in rows_of(tables.RESULTS / "bench_kernels.csv") if row["case"] == "128x256_top8"][-1]
    assert f"{newest['case']}, {newest['gpu']}, {newest['date']}, {newest['commit']}" in drawn


def test_decode(tmp_path: Path) -> None:
    assert bench_decode.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "bench_decode.csv")
    assert [row["T"] for row in rows] == ["1", "2"]
    for row in rows:
        assert min(float(row[column]) for column in ("chosen_MB", "eager_us", "loop_us")) > 0
        assert row["graph_us"] == row["TBps"] == row["of_copy"] == ""
    assert list(rows[0])[-len(PROVENANCE) :] == PROVENANCE
    (table,) = tables.decode(rows)
    assert "2x32+2x8, 2, 32, swiglu" in table.caption
    assert [line[0] for line in table.body] == ["1", "2"]


def test_wrong_decoding_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_decode, "moe_mlp", zeros)
    assert bench_decode.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "quick_variable: no time. T=1: error budget exceeded" in capsys.readouterr().out
    assert not (tmp_path / "bench_decode.csv").exists()


def test_the_loop_over_chosen_experts_and_the_bytes_it_reads() -> None:
    case, generator = CASES["quick_variable"], torch.Generator().manual_seed(0)
    S, H = case.config.layout.total_width, case.config.hidden_size
    x, w1, w2, w3 = (torch.randn(shape, generator=generator) for shape in ((5, H), (H, S), (S, H), (H, S)))
    ids, shares = bench_decode.random_ids(case, 5, 0), torch.rand(5, 2, generator=generator)
    expected = moe_mlp(x, shares, ids, w1, w2, w3, layout=case.config.layout, activation="swiglu")
    torch.testing.assert_close(bench_decode.loop(x, shares, ids, (w1, w2, w3), case), expected)
    chosen = torch.tensor([[0, 3]])  # of widths 32 and 8
    assert bench_decode.chosen_bytes(case, chosen, (w1, w2, w3)) == 3 * (32 + 8) * H * 4


def test_cold_start(tmp_path: Path) -> None:
    assert cold_start.main(["--quick", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path / "cold_start.csv")
    assert float(row["empty_cache_s"]) > 0
    parts = [float(row[f"warm_{part}_s"]) for part in cold_start.PARTS]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(float(row["warm_cache_s"]), rel=1e-2)
    assert list(row)[-len(PROVENANCE) :] == PROVENANCE


def test_rows_of_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    results.append(path, [{"case": "x", "ms": 1.23456}])
    results.append(path, [{"case": "y", "ms": None}])
    for other in ({"case": "x"}, {"case": "x", "ms": 1.0, "more": 2}, {"ms": 1.0, "case": "x"}):
        with pytest.raises(ValueError, match=r"a.csv: expected columns \['case', 'ms'\], got"):
            results.append(path, [{"case": "z", "ms": 2.0}, other])
    assert path.read_text() == "case,ms\nx,1.235\ny,\n"
