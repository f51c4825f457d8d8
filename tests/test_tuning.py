"""The tuning table, and the search that fills it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from triton_moe import ExpertLayout
from triton_moe.cli import app

pytest.importorskip("triton")

from triton_moe import products, tune
from triton_moe.kernels import tuning
from triton_moe.kernels.config import narrowed
from triton_moe.kernels.hopper.launch import fits
from triton_moe.kernels.tuning import PipelineConfig, TileConfig
from triton_moe.products import Shape

SHAPE = Shape(256, 128, ExpertLayout.from_sizes([(2, 128), (2, 64)]), 2, "swiglu")


@pytest.fixture
def fresh_table():
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


def row(kernel: str, config: TileConfig | PipelineConfig, capability: str = "9.0") -> dict:
    return {"capability": capability, "kernel": kernel, "config": config._asdict()}


def test_every_kernel_has_a_row_for_any_gpu_or_is_hoppers() -> None:
    rows = tuning.read_table(tuning.PACKAGED)
    kernels = {kernel for _, kernel in rows}
    assert {kernel for capability, kernel in rows if capability == "any"} == {
        kernel for kernel in kernels if not kernel.startswith("hopper_")
    }
    assert {f"hopper_{name}" for name in ("up", "down", "dh", "dh_gated", "dw")} <= kernels
    for config in rows.values():
        if isinstance(config, PipelineConfig):
            assert config.PRODUCER_REGISTERS + 2 * config.CONSUMER_REGISTERS <= 504


@pytest.mark.usefixtures("fresh_table")
def test_the_users_rows_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = TileConfig(64, 32, 4, 2)
    (tmp_path / "mine.json").write_text(json.dumps([row("up", mine, "8.6")]))
    packaged = tuning.read_table(tuning.PACKAGED)
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "mine.json"))
    assert tuning.tuned("up", (8, 6), TileConfig) == mine != packaged["any", "up"]
    assert tuning.tuned("up", (8, 0), TileConfig) == packaged["any", "up"]
    assert tuning.tuned("up", (9, 0), TileConfig) == packaged["9.0", "up"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"capability": "9.0", "kernel": "up", "config": {"BLOCK_M": 1}}]'])
def test_no_table(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text or "not JSON")
    if text == "{}":
        assert tuning.read_table(tmp_path / "table.json") == {}
        return
    with pytest.raises(ValueError, match=r"table\.json: expected a tuning table"):
        tuning.read_table(tmp_path / "table.json")
    with pytest.raises(ValueError, match=r"missing\.json: expected a tuning table"):
        tuning.read_table(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capability": "9"}, "a capability such as 9.0, or any, got '9'"),
        ({"kernel": "hopper_upp"}, "a kernel of the packaged table, got 'hopper_upp'"),
        ({"config": PipelineConfig(4, 72, 240)._asdict()}, "at most 64512 registers for hopper_up, got 70656"),
    ],
)
def test_rows_that_would_do_nothing_or_never_end(changes: dict, message: str, tmp_path: Path) -> None:
    path, good = tmp_path / "table.json", row("hopper_up", PipelineConfig(4, 56, 224))
    path.write_text(json.dumps([good]))
    assert list(tuning.read_table(path)) == [("9.0", "hopper_up")]
    path.write_text(json.dumps([good | changes]))
    with pytest.raises(ValueError, match=f"expected {message}"):
        tuning.read_table(path)


@pytest.mark.usefixtures("fresh_table")
def test_what_a_configuration_leaves_out_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the one before it has filled the same memory right."""
    lazy, memory = TileConfig(128, 32, 8, 3), torch.zeros(4)
    before = tuning.tuned("up", (8, 0), TileConfig)

    def call() -> None:
        if tuning.tuned("up", (8, 0), TileConfig) != lazy:
            memory.fill_(1)

    made = products.Product(call, lambda: [memory], 1, 4)
    expected = products.Product(lambda: None, lambda: [torch.ones(4)], 1, 4)
    monkeypatch.setattr(tune, "products", lambda _, backend, *args: {"up": made if args[2:] else expected})
    monkeypatch.setattr(tune, "TILES", (lazy,))
    monkeypatch.setattr(tune, "_milliseconds", lambda _: 1.0)
    found = dict(tune.search("up", "up", SHAPE, torch.float32, torch.device("cpu")))
    assert found == {before: 1.0, lazy: None}


def test_a_new_row_takes_the_old_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    path, device = tmp_path / "table.json", torch.device("cpu")
    for config in (TileConfig(64, 32, 4, 2), TileConfig(128, 32, 8, 3)):
        for kernel in ("up", "down"):
            tune.write_row(path, kernel, config, 1.5, SHAPE, device)
    assert tuning.read_table(path) == dict.fromkeys((("9.0", "up"), ("9.0", "down")), TileConfig(128, 32, 8, 3))
    assert json.loads(path.read_text())[0]["ms"] == 1.5


def test_a_table_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And behind a link, which stays one."""
    monkeypatch.setattr(tune, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    path, link, device = tmp_path / "table.json", tmp_path / "link.json", torch.device("cpu")
    path.write_text("[]")
    link.symlink_to(path)

    def cut_short(self: Path, text: str) -> None:
        self.write_bytes(text.encode()[:9])
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_short)
        with pytest.raises(OSError, match="no space"):
            tune.write_row(link, "up", TileConfig(64, 32, 4, 2), 1.5, SHAPE, device)
    assert path.read_text() == "[]"
    tune.write_row(link, "up", TileConfig(64, 32, 4, 2), 1.5, SHAPE, device)
    assert link.is_symlink()
    assert tuning.read_table(path) == {("9.0", "up"): TileConfig(64, 32, 4, 2)}
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link.json", "table.json"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--precision", "fp32", "precision: expected one of bf16, fp16"), ("--tokens", "0", "tokens: expected 1 or more")],
)
def test_bad_requests(option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["tune"])
    if not torch.cuda.is_available():
        assert result.exit_code == 2
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=message):
        tune.request(
            int(value) if option == "--tokens" else 8,
            64,
            [(2, 64)],
            1,
            "swiglu",
            value if option == "--precision" else "bf16",
        )


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/tuning.json", "out: expected a file that can be written, got nowhere/tuning.json: No such file"),
        ("/proc/tuning.json", "out: expected a file that can be written, got /proc/tuning.json"),
        ("text.txt", "text.txt: expected a tuning table as `triton-moe tune` writes it"),
        (".", "expected a tuning table as `triton-moe tune` writes it"),
    ],
)
def test_where_no_row_can_go(out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is said before the search."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("not a table")
    device = torch.device("cpu")
    monkeypatch.setattr(tune, "request", lambda *_: (SHAPE, torch.bfloat16, device))
    monkeypatch.setattr(tune, "kernels_for", lambda *_: {"up": []})
    monkeypatch.setattr(tune, "search", lambda *_: pytest.fail("searched"))
    result = CliRunner().invoke(app, ["tune", "--out", out], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 2
    assert message in result.output


def test_a_few_tokens_are_decoding() -> None:
    few = dataclasses.replace(SHAPE, num_tokens=32)
    assert tune.kernels_for(few, torch.bfloat16, torch.device("cpu")) == {
        "decode_up_gated": "up",
        "decode_down": "down",
    }
    many = tune.kernels_for(SHAPE, torch.bfloat16, torch.device("cpu"))
    assert many == {"up_gated": "up", "down": "down", "dh_gated": "dh", "dw": "dw2", "dw_pair": "dw1"}


def test_wide_tiles_only_where_they_leave_nothing_over() -> None:
    wide, narrow = TileConfig(256, 64, 16, 4), TileConfig(128, 64, 16, 4)
    assert narrowed(wide, 256, 0, 1024) == wide
    assert narrowed(wide, 256, 384) == narrowed(narrow, 256) == narrow
    mixed = Shape(256, 256, ExpertLayout((256, 384)), 2, "swiglu")
    assert wide in tune.candidates("down", "down", mixed)
    assert wide not in tune.candidates("dh_gated", "dh", mixed)
    assert narrow._replace(num_warps=8) in tune.candidates("dh_gated", "dh", mixed)


@pytest.mark.parametrize("kernel", ["decode_up_gated", "decode_down"])
def test_decodings_products_are_those_of_training(kernel: str, device: str) -> None:
    few, product = dataclasses.replace(SHAPE, num_tokens=9), "up" if "up" in kernel else "down"
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    backend, make_routing = tune._way(kernel)
    made = products.products(few, backend, dtype, torch.device(device), make_routing)[product]
    expected = products.products(few, "triton", dtype, torch.device(device))[product]
    assert products.disagreement(made, expected) < products.TOLERANCE


@pytest.mark.usefixtures("fresh_table")
@pytest.mark.parametrize(("of_another", "stays"), [(0.995, True), (0.98, False)])
def test_the_fastest_in_turns(of_another: float, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in force stays if another is as fast but for chance; what the search found slow runs no more."""
    device, dtype = torch.device("cpu"), torch.float32
    before, another, slow = (TileConfig(64, 32, 4, stages) for stages in (2, 3, 4))
    tuning.configure("up", (8, 0), before)
    timed = []

    def milliseconds(_: products.Product) -> float:
        timed.append(tuning.tuned("up", (8, 0), TileConfig))
        clock = (len(timed) + 1) // 2  # slower from round to round
        return clock * {before: 1.0, another: of_another}[timed[-1]]

    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    found: dict[TileConfig | PipelineConfig, float] = {before: 1.5, another: 1.4, slow: 1.6}
    best, _ = tune.best_of("up", "up", SHAPE, dtype, device, found)
    assert timed == [before, another] * (len(timed) // 2) != []
    assert tuning.tuned("up", (8, 0), TileConfig) == before
    assert best == (before if stays else another)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_table")
@pytest.mark.parametrize("kernel", ["decode_up_gated", "decode_down"])
def test_search_for_decoding(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, few = torch.device("cuda", torch.cuda.current_device()), dataclasses.replace(SHAPE, num_tokens=32)
    monkeypatch.setattr(tune, "DECODE_TILES", (TileConfig(64, 32, 4, 2), TileConfig(128, 64, 4, 40)))
    product = tune.kernels_for(few, torch.bfloat16, device)[kernel]
    before, small, impossible = dict(tune.search(kernel, product, few, torch.bfloat16, device)).values()
    assert before is not None
    assert small is not None
    assert impossible is None


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_table")
@pytest.mark.parametrize("kernel", ["up_gated", "down", "dh_gated", "dw", "dw_pair", "hopper_up", "hopper_dw"])
def test_search(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times what fits, puts what was in force back, and leaves out what cannot run."""
    device = torch.device("cuda", torch.cuda.current_device())
    if kernel.startswith("hopper_") and not fits(SHAPE.hidden_size, torch.bfloat16, device):
        assert kernel not in tune.kernels_for(SHAPE, torch.bfloat16, device)
        return
    monkeypatch.setattr(tune, "TILES", (TileConfig(64, 32, 4, 2), TileConfig(128, 64, 4, 40)))
    monkeypatch.setattr(tune, "PIPELINES", (PipelineConfig(3, 56, 224), PipelineConfig(9, 56, 224)))
    major, minor = torch.cuda.get_device_capability(device)
    before = tuning.table().get((f"{major}.{minor}", kernel)) or tuning.table()["any", kernel]
    product = tune.kernels_for(SHAPE, torch.bfloat16, device)[kernel]
    times = dict(tune.search(kernel, product, SHAPE, torch.bfloat16, device))
    assert len(times) == 3
    assert next(iter(times)) == before
    first, small, impossible = times.values()
    assert first is not None
    assert small is not None
    assert first > 0
    assert small > 0
    assert impossible is None
    best, milliseconds = tune.best_of(
        kernel, product, SHAPE, torch.bfloat16, device, {config: ms for config, ms in times.items() if ms}
    )
    assert times[best] is not None
    assert milliseconds > 0
    assert tuning.table()[f"{major}.{minor}", kernel] == before
