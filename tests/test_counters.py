"""The command of the hardware counters: what it reads from ncu's output, what it gives ncu to run, when it refuses."""

import csv
import stat
from pathlib import Path

import counters
import pytest
import torch
from cases import CASES
from results import ROOT, text

pytest.importorskip("triton")

HOPPER = """==PROF== Connected to process 1667 (/usr/bin/python3.12)
==PROF== Disconnected from process 1667
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum",\
"lts__t_sector_hit_rate.pct","sm__cycles_active.max","sm__cycles_active.min",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
"","","byte","byte","ns","%","cycle","cycle","%"
"0","grouped_gemm_up_hopper_kernel","8,077,247,232","1,603,024,640","6,890,784","74.30","10,795,503","10,557,303",\
"76.83"
"1","grouped_gemm_down_hopper_kernel","1,628,236,544","2,132,411,904","3,665,088","88.32","6,185,245","6,057,732",\
"67.11"
"2","grouped_gemm_down_hopper_kernel","5,625,516,544","2,158,052,608","6,922,816","81.27","11,204,173","10,979,872",\
"74.08"
"3","grouped_gemm_dh_hopper_kernel","5,050,516,992","1,608,248,576","3,903,648","72.52","6,168,473","6,023,362","67.06"
"4","grouped_gemm_dw_hopper_kernel","4,396,007,424","1,066,469,888","3,399,168","69.41","5,293,420","5,172,909","78.31"
"5","grouped_gemm_dw_hopper_kernel","4,583,783,168","2,138,662,144","6,742,688","83.43","10,798,883","10,609,259",\
"76.85"
"""
"""What ncu wrote on an H100, without the columns that nobody reads."""
PORTABLE = HOPPER.replace("up_hopper", "up_fwd").replace("down_hopper", "down_fwd").replace("_hopper", "")
CASE = "128x1024_top8_h4096"
STAND_IN = """#!/bin/sh
printf '%s\\n' "$*" >> "$NCU_CALLS"
for backend; do :; done
while [ "$1" != --log-file ]; do shift; done
cat "$NCU_SAYS/$backend" > "$2"
exec sh "$NCU_SAYS/end"
"""


def committed() -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / "counters.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU, and an ncu that writes what is in this folder for a backend and then runs `end`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("triton_moe.kernels.hopper.launch.fits", lambda hidden, dtype, device: hidden % 64 == 0)
    tool = tmp_path / "ncu"
    tool.write_text(STAND_IN)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("NCU_CALLS", str(tmp_path / "calls"))
    folder = tmp_path / "says"
    monkeypatch.setenv("NCU_SAYS", str(folder))
    folder.mkdir()
    for name, said in {"hopper": HOPPER, "triton": PORTABLE, "end": ""}.items():
        (folder / name).write_text(said)
    return folder


def test_numbers_are_those_of_the_rows_made_by_hand() -> None:
    rows = counters.rows_of(HOPPER, CASE, "hopper")
    of_log = ("351ff63-dirty", "by a counter")  # dw's as well, in that state of the kernels
    by_hand = {row["kernel"]: row for row in committed() if (row["commit"], row["tiles"]) == of_log}
    assert len(rows) == len(by_hand) == len(counters.KERNELS)
    for row in rows:
        of_product = by_hand[str(row["kernel"])]
        assert [text(row[column]) for column in counters.METRICS] == [of_product[name] for name in counters.METRICS]


@pytest.mark.parametrize(
    ("log", "backend", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM\n", "hopper", "expected launches, got none: ==ERROR== ERR_NVGPUCTRPERM"),
        (HOPPER.partition('"0",')[0], "hopper", "expected launches, got none"),
        (HOPPER.replace('"ns"', '"us"'), "hopper", "expected gpu__time_duration.sum in ns, got us"),
        (HOPPER.partition('"5",')[0], "hopper", "expected a launch for each of"),
        (HOPPER, "triton", "expected .*, got .*grouped_gemm_up_hopper_kernel"),
        (PORTABLE, "hopper", "expected .*, got .*grouped_gemm_up_fwd_kernel"),
    ],
)
def test_another_log_is_refused(log: str, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ncu: {message}"):
        counters.rows_of(log, CASE, backend)


def test_command(says: Path, tmp_path: Path) -> None:
    assert counters.main(["--cases", CASE, "quick_variable", "--out", str(tmp_path)]) == 0
    with (tmp_path / "counters.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(committed()[0])
    assert [(row["case"], row["backend"], row["kernel"]) for row in rows] == [
        (case, backend, kernel)
        for case, backend in ((CASE, "hopper"), (CASE, "triton"), ("quick_variable", "triton"))
        for kernel in counters.KERNELS
    ]
    assert [row["tiles"] for row in rows] == 4 * ["by a counter"] + 2 * ["every n-th"] + 12 * ["by the hardware"]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.partition("counters.py")[2] for call in calls] == [
        f" --launch {CASE} hopper", f" --launch {CASE} triton", " --launch quick_variable triton",
    ]  # fmt: skip
    assert calls[0].startswith("--clock-control none --cache-control none --profile-from-start off -k regex:grouped")


@pytest.mark.parametrize(("end", "reason"), [("exit 9", "expected status 0, got 9"), ("sleep 60", "within 3 s")])
def test_a_backend_without_an_end_gets_no_row(
    end: str, reason: str, says: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (says / "end").write_text(f'[ "$backend" = triton ] || {end}')
    (tmp_path / "ncu").write_text(STAND_IN.replace("exec", "export backend; exec"))
    assert counters.main(["--seconds", "3", "--out", str(tmp_path)]) == 1
    assert f"{CASE}: no rows of hopper. ncu: expected " in (printed := capsys.readouterr().out)
    assert reason in printed
    rows = (tmp_path / "counters.csv").read_text().splitlines()[1:]
    assert [row.split(",")[2] for row in rows] == 6 * ["triton"]


def test_without_a_gpu_or_ncu_there_is_a_sentence(
    says: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ncu").unlink()
    for sentence in ("NVIDIA's ncu, of Nsight Compute: expected it on the PATH", "expected a CUDA device, got none"):
        with pytest.raises(SystemExit) as ended:
            counters.main(["--out", str(tmp_path)])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_each_product_is_launched_once_between_start_and_stop(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_moe.kernels.launch import Launcher

    launch, events = Launcher.__call__, []

    def seen(self: Launcher, *args) -> None:
        events.append(self.kernel.__name__)
        launch(self, *args)

    monkeypatch.setattr(Launcher, "__call__", seen)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: events.append(name))
    counters.launch_each(CASES["quick_variable"], "triton", torch.device(device))
    between = events[events.index("start") : events.index("stop")]
    gemms = [name for name in between if "grouped_gemm" in name]
    assert gemms == [line.split('","')[1] for line in PORTABLE.splitlines()[4:]]
    assert set(gemms) < set(events[: events.index("start")])
