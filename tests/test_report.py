"""The tables, the documents and the page are made of the rows, and of nothing else."""

import contextlib
import importlib
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report
import results
import tables
from command import DEFAULT_CONTESTANTS
from contestants import CONTESTANTS
from page import PLOTS, dots, page
from typer.testing import CliRunner

from triton_moe import cli

MACHINE = {"gpu": "a GPU", "torch": "2", "triton": "3", "date": "today", "commit": "abc"}
SHAPE = {"T": "4096", "H": "256", "sizes": "8x512", "K": "2", "activation": "relu_squared"}
CASE = "8exp_uniform"


def timed(contestant: str, forward: str, step: str, **changed: str) -> dict[str, str]:
    times = {"forward_ms": forward, "step_ms": step, "peak_MiB": "", "cublas_8192_tflops": "777", "torch_add_us": "9"}
    times |= {"forward_tflops": "1", "step_tflops": "1", "forward_spread_ms": "0.0123", "step_spread_ms": "2.34"}
    times |= {"busy_forward_ms": forward, "busy_step_ms": "0.5", "held_MiB": "12"}
    return {"case": CASE, "contestant": contestant, **SHAPE, **times, **MACHINE} | changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of the reference and ours, timed and profiled, and of a sweep."""
    path = tmp_path / "rows"
    path.mkdir()
    times = {"stk": ("2.125", "4.25"), "triton_moe": ("0.25", "0.85"), "triton_moe_graph": ("0.0625", "0.17")}
    results.append(path / "bench_moe.csv", [timed(name, *of) for name, of in times.items()])
    stages = {"router": ("0.5", "25"), "topology": ("0.75", "37.5"), "rest": ("0.75", "37.5"), "forward": ("2", "100")}
    results.append(
        path / "bench_profile.csv",
        [
            {"case": CASE, "contestant": "stk", **SHAPE, "stage": stage, "ms": ms, "percent": percent, **MACHINE}
            for stage, (ms, percent) in stages.items()
        ],
    )
    sweep = [{"sweep": "T", "value": str(4**n), "contestant": "triton_moe"} for n in range(3)]
    results.append(
        path / "bench_scaling.csv",
        [{**row, "forward_ms": f"0.{n}123", "step_ms": f"0.{n}456"} for n, row in enumerate(sweep, 1)],
    )
    refused = {
        "benchmark": "bench_moe",
        "case": CASE,
        "contestant": "momoe",
        "kind": "crashed",
        "reason": "<no & kernel>",
    }
    results.append(path / "refused.csv", [{**refused, **MACHINE}])
    return path


class Read(HTMLParser):
    """Texts of table cells, names of elements, and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.elements: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster") or "url(" in (value or ""):
                self.loads.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_has_the_rows_and_loads_nothing(folder: Path) -> None:
    text = page(folder)
    read = Read(text)
    for path in folder.glob("*.csv"):
        for row in tables.rows_of(path):
            for value in filter(None, row.values()):
                assert value in read.cells, (path.name, value)
    assert read.elements.count("svg") == 3
    assert all(load.startswith("#") or load.startswith("url(#") or "url(#" in load for load in read.loads), read.loads
    assert not {"script", "link", "img", "iframe", "image", "object"} & set(read.elements)
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", text)
    assert "8.5x / 5.0x" in read.cells
    assert "34.0x / 25.0x" in read.cells


def test_the_page_of_the_repository(tmp_path: Path) -> None:
    """Every row of every file is there, and every file with a plot has one."""
    text = page(tables.RESULTS)
    for path in tables.RESULTS.glob("*.csv"):
        last = tables.rows_of(path)[-1]
        assert "".join(f"<td>{value}</td>" for value in last.values()) in text, path.name
    assert text.count("<svg") == sum((tables.RESULTS / name).exists() for name in PLOTS)


def test_against_the_reference(folder: Path) -> None:
    (table,) = tables.against_reference(tables.rows_of(folder / "bench_moe.csv"))
    assert [list(line) for line in table.body] == [
        [
            "4096, 256, 8x512, 2, relu_squared",
            "2.125 (0.012) / 4.25 (2.3)",
            "0.25 (0.012) / 0.85 (2.3)",
            "8.5x / 5.0x",
            "0.0625 (0.012) / 0.17 (2.3)",
            "34.0x / 25.0x",
            "8.5x / 1.0x",
        ]
    ]
    assert tables.against_reference([timed("stk", "1", "1"), timed("triton_moe", "1", "1")]) == []


def test_the_topology_has_its_share(folder: Path) -> None:
    (table,) = tables.topology(tables.rows_of(folder / "bench_profile.csv"))
    assert list(table.body[0])[1:] == ["2", "0.75", "38%"]


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_the_rows_say(path: Path) -> None:
    document = path.read_text()
    assert report.with_measured(document, report.DOCUMENTS[path](tables.RESULTS)) == document


def test_newest_rows_alone(tmp_path: Path) -> None:
    row = dict.fromkeys(("backend", "draws", "mismatches", "bitwise_differences", "gpu", "torch", "triton"), "0")
    runs = (("old", "9000"), ("new", "1000"), ("new", "2000"), ("newest", "1"))  # one repeats a draw that failed
    rows = [{**row, "asked": asked, "draws": asked, "date": "d", "commit": commit} for commit, asked in runs]
    results.append(tmp_path / "stress.csv", rows)
    (table,) = tables.tables_of(tmp_path)
    assert "run twice: backend 0 3000 draws (3000 asked), 0 outside" in table.caption


def of_runs(runs: dict[str, str]) -> list[dict[str, str]]:
    """Commit -> its contestants, to rows whose times say of whom and of which commit they are."""
    return [timed(name, f"{name}{commit}", "s", commit=commit) for commit, of in runs.items() for name in of.split()]


def test_ratios_come_from_one_run() -> None:
    """The last one that had both."""
    runs = {"1": "triton_moe grouped_mm", "2": "triton_moe grouped_mm", "3": "triton_moe", "4": "grouped_mm"}
    (table,) = tables.speed(of_runs(runs))
    assert table.markdown().endswith("| triton_moe2 (0.012) / s (2.3) | grouped_mm2 (0.012) / s (2.3) | 2 |")


def test_every_contestant_has_its_newest_run() -> None:
    """Beside ours of that run, and what else has no newer one; those of one run stand in one line."""
    runs = {
        "1": "triton_moe grouped_mm momoe torch_loop",
        "2": "triton_moe triton_moe_portable grouped_mm scattermoe dense_ceiling stk",
        "3": "triton_moe grouped_mm",
    }
    in_pytorch, libraries = tables.speed(of_runs(runs))

    def lines(table: tables.Table) -> list[dict[str, str]]:
        """By heading, what is there, without spreads."""
        cells = ([cell.partition(" (")[0] for cell in line] for line in table.body)
        return [{name: cell for name, cell in zip(table.header[1:], line[1:], strict=True) if cell} for line in cells]

    portable = {"this project": "triton_moe2", "its portable kernels": "triton_moe_portable2"}
    grouped_mm, dense, loop, scattermoe, momoe = (
        tables.NAMES[name] for name in ("grouped_mm", "dense_ceiling", "torch_loop", "scattermoe", "momoe")
    )
    assert lines(in_pytorch) == [
        {"this project": "triton_moe3", grouped_mm: "grouped_mm3", "commit": "3"},
        {**portable, dense: "dense_ceiling2", "commit": "2"},
        {"this project": "triton_moe1", loop: "torch_loop1", "commit": "1"},
    ]
    assert lines(libraries) == [
        {**portable, scattermoe: "scattermoe2", "commit": "2"},
        {"this project": "triton_moe1", momoe: "momoe1", "commit": "1"},
    ]


def test_every_contestant_that_runs_by_default_has_a_column() -> None:
    """stk and our graphs in a table of their own."""
    assert set(DEFAULT_CONTESTANTS) - tables.NAMES.keys() == {tables.REFERENCE}
    assert tables.NAMES.keys() <= CONTESTANTS.keys()


def test_training_is_shown_beside_each_reference() -> None:
    """The last run of each, what failed too."""
    columns = ("steps", "compared_steps", "first_steps_difference", "rounding_difference", "correlation")
    row = dict.fromkeys((*columns, "our_held_out_loss", "baseline_held_out_loss"), "0") | MACHINE
    runs = (
        ("old", "block_sparse", "fail"),
        ("old", "block_sparse_historical", "fail"),
        ("new", "block_sparse", "pass"),
    )
    rows = [
        {**row, "commit": commit, "baseline": baseline, "seed": str(seed), "result": result}
        for commit, baseline, result in runs
        for seed in range(3)
    ]
    (table,) = tables.validation(rows)
    assert [(line[0], line[1], line[-1]) for line in table.body] == [
        (baseline, str(seed), result)
        for baseline, result in (("block_sparse", "pass"), ("block_sparse_historical", "fail"))
        for seed in range(3)
    ]
    assert "block_sparse_historical has garbage for its experts' gradients, and must fail (" in table.caption
    assert "commit new, old;" in table.caption
    assert "must fail" not in tables.validation(rows[:3])[0].caption


def test_commands_of_one_day_and_commit_are_told_apart() -> None:
    first = [timed("stk", "2", "4"), timed("triton_moe", "1", "2")]
    again = timed("triton_moe", "3", "6", torch_add_us="10")
    assert tables.newest_of_each_case([*first, again], ("stk", "triton_moe")) == [first]


def test_both_layouts_of_a_pair_are_of_one_command() -> None:
    def of(case: str, rate: str, **changed: str) -> dict[str, str]:
        return timed("triton_moe", "1", "2", **{"case": case, "forward_tflops": rate, "step_tflops": rate, **changed})

    rows = [of("128x256", "100"), of("32x384_64x256_32x128", "90"), of("128x256", "200", torch_add_us="10")]
    (table,) = tables.widths(rows)
    assert list(table.body[0])[-2:] == ["90% / 90%", "12"]


def test_a_readme_without_the_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^document: expected one part between .*, got 0"):
        report.with_measured("# Nothing measured", [])


def test_a_folder_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.html")])
    assert "--results: expected a folder with CSV files" in capsys.readouterr().err


def test_the_command_writes_the_page(folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "page.html"
    assert report.main(["--results", str(folder), "--page", str(written)]) == 0
    assert written.read_text() == page(folder)


def test_the_commands_run_scripts_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        calls.append(command[1:])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    for line in ("bench scaling --quick --sweeps T E", "bench --quick", "bench", "report --page p"):
        assert CliRunner().invoke(cli.app, line.split()).exit_code == 3
    assert [[Path(script).name, *options] for script, *options in calls] == [
        ["bench_scaling.py", "--quick", "--sweeps", "T", "E"],
        ["bench_moe.py", "--quick"],
        ["bench_moe.py"],
        ["report.py", "--page", "p"],
    ]
    assert all(Path(script).exists() for script, *_ in calls)


@pytest.mark.parametrize("arguments", [["bench"], ["report"]])
def test_without_the_repository_there_is_a_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path)
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "400", "TERM": "dumb"})
    assert done.exit_code == 2
    assert "the benchmarks are in the repository, not in the installed package" in done.output


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = CliRunner().invoke(cli.app, ["bench", "decode", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert [row["T"] for row in tables.rows_of(tmp_path / "bench_decode.csv")] == ["1", "2"]


def test_what_is_offered_is_what_takes_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Of all scripts that are commands: the others are tools, or train for minutes."""
    offered, quick = set(), set()
    for path in sorted(cli.BENCHMARKS.glob("*.py")):
        if '__name__ == "__main__"' not in path.read_text():
            continue
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(path.stem).main(["--help"])
        assert ended.value.code == 0
        if "--quick" in capsys.readouterr().out:
            quick.add(path.stem)
        with contextlib.suppress(ValueError):
            offered.add(cli._benchmark(path.stem.removeprefix("bench_")).stem)
    assert offered == quick
    assert {"bench_moe", "validate_training"} < offered


@pytest.mark.parametrize("name", ["nothing", "sanitize", "report"])
def test_another_name_is_refused(name: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", name], env={"COLUMNS": "400", "TERM": "dumb"})
    assert done.exit_code == 2
    assert "name: expected one of accuracy, cold_start, decode, forward, " in done.output
    assert ", stress, train, validate_training, got " in done.output
    assert f"got '{name}'" in done.output


def test_a_plot_compares_one_run() -> None:
    """That which had most contestants; the newest of such."""
    rows = [
        {"case": case, "contestant": contestant, "commit": commit, "date": "", "gpu": "", "ms": ms}
        for case, contestant, commit, ms in [
            ("one", "ours", "a", "1"),
            ("one", "theirs", "a", "2"),
            ("one", "ours", "b", "3"),
            ("one", "theirs", "b", "4"),
            ("one", "ours", "c", "5"),
            ("two", "ours", "c", "6"),
        ]
    ]
    figure = dots("ms")(rows)
    assert figure is not None
    (axes,) = figure.axes
    drawn = {line.get_label(): np.asarray(line.get_xdata()).tolist() for line in axes.get_lines()}
    assert drawn == {"ours": [3, 6], "theirs": [4]}


def test_what_was_refused_is_told() -> None:
    row = {"benchmark": "bench_moe", "case": "c", "kind": "crashed", "reason": "no such kernel", **MACHINE}
    rows = [{**row, "contestant": name} for name in ("momoe", "scattermoe", "momoe")]
    (table,) = tables.refusals(rows)
    assert [(line[2], line[3], line[4]) for line in table.body] == [
        ("momoe", "crashed", "no such kernel"), ("scattermoe", "crashed", "no such kernel")
    ]  # fmt: skip
