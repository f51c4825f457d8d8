"""triton-moe train as a command: a run, its report, what goes on with it, and what is refused."""

import datetime
import hashlib
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from triton_moe.cli import app
from triton_moe.train.checkpoint import FILE_NAME, Checkpoint

TINY_OPTIONS = [
    "--experts", "1x24+2x8+1x0", "--hidden-size", "16", "--num-layers", "2", "--num-heads", "2", "--context", "16",
    "--batch-size", "4", "--device", "cpu", "--sample-bytes", "20",
]  # fmt: skip
NOON = datetime.datetime(2026, 11, 27, 12)


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output, as wide as no line is broken."""
    result = CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "400", "TERM": "dumb"})
    return result.exit_code, result.output


def test_a_run_and_its_report(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    code, printed = command("--data", str(text), "--out", str(out), "--steps", "12", *TINY_OPTIONS)
    assert code == 0, printed
    for figure in (r"train loss +\d\.\d{3} nats a byte", r"held-out loss +\d\.\d{3}", r"unigram model +\d\.\d{3}"):
        assert re.search(figure, printed), printed
    assert re.search(r"speed +[\d,]+ tokens/s", printed)
    assert "Sample, continuing 'def '" in printed
    assert "experts 1x24 + 2x8 + 1x0, top-2, swiglu, fp32 on cpu" in printed
    assert (out / "usage.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(out / FILE_NAME, "pt") as file:
        assert file.metadata()["step"] == "12"
        assert file.get_tensor("model/blocks.1.mlp.w3").shape == (16, 40)


def test_resume(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The newest run goes on, with more steps if asked; nothing else of it may change."""
    monkeypatch.chdir(tmp_path)
    code, printed = command("--data", str(text), "--steps", "4", *TINY_OPTIONS)
    assert code == 0, printed
    (run,) = (tmp_path / "runs").iterdir()
    code, printed = command("--resume", "--steps", "9", "--device", "cpu")
    assert code == 0, printed
    assert Checkpoint.load(run).step == 9
    for wrong, message in (
        (["--hidden-size", "32"], "hidden_size: expected nothing, or 16 as the resumed run, got 32"),
        (["--data", __file__], "data: expected the run's text"),
        (["--out", "elsewhere"], "resume: expected a checkpoint at elsewhere"),
    ):
        code, printed = command(*wrong, "--resume", "--device", "cpu")
        assert code == 2
        assert message in printed


def test_resume_finds_the_text(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where it was, or where `--data` says it is now, from any folder."""
    out = str(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    code, printed = command("--data", text.name, "--out", out, "--steps", "1", *TINY_OPTIONS)
    assert code == 0, printed
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ["--resume", "--out", out, "--device", "cpu", "--sample-bytes", "20"]
    code, printed = command(*resume, "--steps", "2")
    assert code == 0, printed
    moved = text.rename("moved.txt")
    code, printed = command(*resume, "--steps", "3")
    assert code == 2
    assert f"data: expected a file or a folder of text, got {text}, which does not exist" in printed
    for step, arguments in ((3, ["--data", str(moved)]), (4, [])):
        code, printed = command(*resume, *arguments, "--steps", str(step))
        assert code == 0, printed
        assert Checkpoint.load(Path(out)).step == step


def test_resume_wants_the_same_text(text: Path, tmp_path: Path):
    """Another text of the same name and size is another text."""
    resume = ["--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]
    code, printed = command("--data", str(text), "--out", str(tmp_path / "run"), "--steps", "1", *TINY_OPTIONS)
    assert code == 0, printed
    before = text.read_bytes()
    text.write_bytes(before.swapcase())
    expected, got = (
        f"0.0 MB in 1 files of {text}, SHA-256 {hashlib.sha256(content).hexdigest()[:12]}"
        for content in (before, before.swapcase())
    )
    for arguments in ([], ["--data", str(text)]):
        code, printed = command(*resume, *arguments)
        assert code == 2
        assert f"data: expected the run's text, {expected}, got {got}" in printed


def test_resume_of_a_run_on_the_standard_library(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = tmp_path / "library"
    library.mkdir()
    module = text.rename(library / "module.py")
    monkeypatch.setattr("triton_moe.train.data.standard_library", lambda: library)
    out = tmp_path / "run"
    code, printed = command("--out", str(out), "--steps", "1", *TINY_OPTIONS)
    assert code == 0, printed
    assert Checkpoint.load(out).data is None
    resume = ["--resume", "--out", str(out), "--device", "cpu", "--sample-bytes", "20", "--steps", "2"]
    code, printed = command(*resume)
    assert code == 0, printed
    module.write_text("another release of it" * 100)
    code, printed = command(*resume)
    assert code == 2
    assert "data: expected the run's text, 0.0 MB in 1 files of the Python standard library, SHA-256" in printed


def test_a_run_is_not_overwritten(text: Path, tmp_path: Path):
    arguments = ["--data", str(text), "--out", str(tmp_path / "run"), "--steps", "1", *TINY_OPTIONS]
    assert command(*arguments)[0] == 0
    code, printed = command(*arguments)
    assert code == 2
    assert "out: expected a folder without a run" in printed


def test_runs_that_begin_together(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Have a folder each; the newest is the one saved last, whatever its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("triton_moe.cli.datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: NOON)))
    for out in (["--out", "runs/zero"], [], []):
        code, printed = command("--data", str(text), *out, "--steps", "2", *TINY_OPTIONS)
        assert code == 0, printed
    runs = sorted(path.name for path in Path("runs").iterdir())
    assert runs == ["20261127-120000", "20261127-120000-2", "zero"]
    code, printed = command("--resume", "--steps", "3", "--device", "cpu")
    assert code == 0, printed
    assert [Checkpoint.load(Path("runs") / run).step for run in runs] == [2, 3, 2]
    code, printed = command("--resume", "--steps", "2", "--device", "cpu")
    assert code == 2
    assert "steps: expected at least the 3 that the run has, got 2" in printed


def test_resume_of_a_finished_run_keeps_what_is_new(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    code, printed = command("--data", str(text), "--out", str(out), "--steps", "2", *TINY_OPTIONS)
    assert code == 0, printed
    moved = text.rename(tmp_path / "moved.txt")
    resume = ["--resume", "--out", str(out), "--device", "cpu", "--sample-bytes", "20"]
    code, printed = command(*resume, "--data", str(moved))
    assert code == 0, printed
    code, printed = command(*resume, "--steps", "3")
    assert code == 0, printed


def test_no_folder_for_runs(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("/nowhere")
    code, printed = command("--data", str(text), "--steps", "2", *TINY_OPTIONS)
    assert code == 2
    assert "File exists: 'runs'" in printed


def test_checkpoints_come_as_often_as_asked(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, folder: saved.append(self.step))
    arguments = ["--data", str(text), "--out", str(tmp_path / "run"), "--checkpoint-every", "12", *TINY_OPTIONS]
    code, printed = command(*arguments, "--steps", "24")
    assert code == 0, printed
    assert saved == [12, 24]


def test_divergence_is_said_in_a_line(text: Path, tmp_path: Path):
    arguments = ["--data", str(text), "--out", str(tmp_path / "run"), "--learning-rate", "1e30", *TINY_OPTIONS]
    code, printed = command(*arguments, "--steps", "40")
    assert code == 1
    assert re.search(r"Stopped: the loss is \w+ after \d+ steps: try a lower learning rate", printed)
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("train", ["Python's standard library", "runs/<date-time>", "cuda if there is one"]),
        ("sample", ["the newest run", "all", "cuda if there is one"]),
    ],
)
def test_help_has_the_defaults(name: str, defaults: list[str]):
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    for default in defaults:
        assert re.search(rf"\[default: \(.*{re.escape(default)}\)\]", result.output), result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "device: expected one of cpu"),
        (["--experts", "four"], "experts: expected count x width pairs"),
        (["--device", "cpu", "--backend", "triton"], "backend: expected auto or torch on cpu, got 'triton'"),
        (["--device", "cpu", "--compile"], "compile: expected a CUDA device, got cpu"),
        (["--seed", "4294967296"], "seed: expected 0 <= seed < 2**32, got 4294967296"),
        (["--learning-rate", "inf"], "learning_rate: expected 0 or more, got inf"),
        (["--steps", "0"], "steps: expected an integer of 1 or more, got 0"),
        (["--data", "/nowhere"], "data: expected a file or a folder of text, got /nowhere"),
        (
            ["--top-k", "9", "--experts", "2x8", "--device", "cpu"],
            "num_active_experts: expected at most E = 2, got 9",
        ),
        (["--learning-speed", "1"], "No such option: --learning-speed"),
    ],
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code, printed = command(*arguments)
    assert code == 2
    assert message in printed
    assert not list(tmp_path.iterdir())


def test_ctrl_c_saves(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments = [
        "--data",
        str(text),
        "--out",
        str(out),
        "--steps",
        "100000",
        "--checkpoint-every",
        "5",
        *TINY_OPTIONS,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "triton_moe", "train", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = threading.Event()
        while not (out / FILE_NAME).exists():
            assert process.poll() is None
            deadline.wait(0.1)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    step = Checkpoint.load(out).step
    assert 0 < step < 100_000
    assert f"Stopped after {step} steps; saved." in printed
