"""IMPLEMENTATION_GUIDE.md: quoted lines, files and figures are those of the project, what it says of rows is so."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import guide_tables
import pytest
import report
import tables

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "IMPLEMENTATION_GUIDE.md").read_text()
PROSE = re.sub(f"{report.BEGIN}.*{report.END}", "", re.sub(r"^```.*?^```$", "", GUIDE, flags=re.M | re.S), flags=re.S)
FIGURES = re.findall(r"^!\[.+\]\((.+\.svg)\)$", GUIDE, re.M)
MEASURED = re.compile(r"\d\s*(ms|us|seconds|TF(LOP/s)?|[TGM]B/s|[KMGT]i?B|%|percent|x|times (as|faster))(?!\w| \d)")


def quotes() -> list[tuple[str, str]]:
    """File and text of each quoted piece; a line of dots ends one."""
    blocks = re.findall(r"^```python (\S+)\n(.*?)^```$", GUIDE, re.M | re.S)
    return [(path, piece) for path, text in blocks for piece in re.split(r"^ *\.\.\.\n", text, flags=re.M)]


def stripped(text: str) -> str:
    return "\n" + "\n".join(line.strip() for line in text.strip().splitlines()) + "\n"


@pytest.mark.parametrize(("path", "piece"), quotes(), ids=lambda value: value.strip().partition("\n")[0])
def test_quoted_lines_stand_in_their_file(path: str, piece: str) -> None:
    assert stripped(piece) in stripped((ROOT / path).read_text())


def test_every_block_is_a_quote_or_no_code() -> None:
    kinds = re.findall(r"^```(\S*)", GUIDE, re.M)[::2]
    assert kinds.count("python") >= 12
    assert set(kinds) == {"python", "text", "sh"}
    assert len(quotes()) > kinds.count("python")  # some have a gap


def test_named_files_exist() -> None:
    named = re.findall(r"`([\w/.]+\.(?:py|json|md))`", GUIDE) + re.findall(r"\]\(([^)]+)\)", PROSE)
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.M | re.S))
    named += re.findall(r"[\w/]+\.py", commands)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_measured_numbers_are_in_the_tables_alone() -> None:
    assert MEASURED.findall(PROSE) == []
    assert MEASURED.search("at 593 TFLOP/s")
    assert MEASURED.search("48 KB a stage")


def test_the_prose_agrees_with_the_tables() -> None:
    """What it concludes from them: where it breaks, new rows tell another story, which is to be told."""
    _, orders, memory = guide_tables.guide_of(tables.RESULTS)
    gains = {(line[0], line[1]): float(line[2]) / float(line[3]) for line in orders.body}
    assert all(abs(gain - 1) < 0.02 for (backend, _), gain in gains.items() if backend == "triton")
    assert all(abs(gains["hopper", kernel] - 1) < 0.01 for kernel in ("up", "down")), "they gain nothing"
    assert gains["hopper", "dw1"] < 0.97, "it is slower"
    kept = [float(line[1]) for line in memory.body]
    assert kept[0] == min(kept)
    assert memory.body[0][0] == "this project"
    assert f"{guide_tables.OPERANDS_FLOPS_A_BYTE:.0f} operations a byte" in GUIDE


def test_the_tables_count_what_the_hopper_kernels_move() -> None:
    """Tiles of the size that the kernels have, and each epilogue's tensors."""
    pytest.importorskip("triton")
    from cases import CASES

    from triton_moe.kernels.hopper import launch
    from triton_moe.kernels.hopper.pipeline import HALF_M

    rows, columns = 2 * HALF_M.value, launch.BLOCK_N
    assert rows * columns / (rows + columns) == guide_tables.OPERANDS_FLOPS_A_BYTE
    moved = guide_tables.epilogue_bytes(CASES["128x256_top8"])
    dense, inner, weights = (2 * number for number in (24576 * 8 * 1536, 24576 * 8 * 256, 1536 * 128 * 256))
    assert moved["down"] == moved["dx"] == dense
    assert (moved["up"], moved["dh"]) == (3 * inner, 5 * inner)
    assert (moved["dw1"], moved["dw2"]) == (2 * weights, weights)


def drawn(path: Path) -> tuple[object, list[str]]:
    """What a figure says it was drawn from, and its texts."""
    text = path.read_text()
    (facts,) = re.findall(r"<dc:description>(.*)</dc:description>", text)
    return json.loads(html.unescape(facts)), re.findall(r"<!-- (.*?) -->", text, re.S)


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a process of its own, as the interpreter is chosen when the kernels are imported."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("figures")
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_what_the_kernels_make(name: str, redrawn: Path) -> None:
    """Not byte by byte: versions of matplotlib differ."""
    facts, texts = drawn(ROOT / name)
    assert len(texts) > 10
    assert (facts, texts) == drawn(redrawn / Path(name).name)
    assert (ROOT / name).stat().st_size < 60_000


def test_every_figure_is_shown(redrawn: Path) -> None:
    committed = {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert {Path(name).name for name in FIGURES} == committed == {path.name for path in redrawn.iterdir()}
