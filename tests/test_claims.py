"""What is claimed of the layer, held against the newest rows that tell: a change that loses it is told by its rows."""

import pytest
from tables import OURS, OURS_AS_GRAPH, REFERENCE, RESULTS, Row, Rows, command_of, rows_of

MOE, HOST = rows_of(RESULTS / "bench_moe.csv"), rows_of(RESULTS / "bench_host.csv")
SEED = ("8exp", "16exp", "64exp", "128exp")


def newest(rows: Rows, *wanted: tuple[str, str]) -> list[Row]:
    """The rows of these cases and contestants from the last command that has them all: ratios come from one run."""
    commands: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        commands.setdefault(command_of(row), {})[row["case"], row["contestant"]] = row
    complete = [command for command in commands.values() if command.keys() >= {*wanted}]
    assert complete, f"no command measured {wanted}"
    return [complete[-1][place] for place in wanted]


@pytest.mark.parametrize(
    ("uniform", "variable", "least"),
    [
        ("128x256", "32x384_64x256_32x128", 0.93),
        ("128x1024_h4096", "32x1536_64x1024_32x512_h4096", 0.93),
        ("64x1536", "23_to_1", 0.93),
        ("120x512", "9_to_23_times_32", 0.8),
        ("220x320", "220_random", 0.8),
    ],
)
def test_variable_widths_cost_nothing(uniform: str, variable: str, least: float) -> None:
    """Of the uniform layout's TFLOP/s: 93% in multiples of 128, 80% where they are ragged."""
    even, uneven = newest(MOE, (uniform, OURS), (variable, OURS))
    for column in ("forward_tflops", "step_tflops"):
        assert float(uneven[column]) >= least * float(even[column]), column


@pytest.mark.parametrize("case", [f"{experts}_{kind}" for experts in SEED for kind in ("uniform", "variable")])
@pytest.mark.parametrize(("ours", "forward", "step"), [(OURS, 7, 4.5), (OURS_AS_GRAPH, 20, 12)])
def test_times_the_reference_on_stk(ours: str, forward: float, step: float, case: str) -> None:
    reference, mine = newest(MOE, (case, REFERENCE), (case, ours))
    for column, least in (("forward_ms", forward), ("step_ms", step)):
        assert float(reference[column]) >= least * float(mine[column]), column


@pytest.mark.parametrize("case", ["128x256_top8", "32x1024_top2", "128x1024_top8_h4096", "128x768_top8_h2048"])
def test_the_peak_is_sonic_moes(case: str) -> None:
    mine, its = newest(MOE, (case, OURS), (case, "sonic_moe"))
    assert float(mine["peak_MiB"]) <= 1.02 * float(its["peak_MiB"])


@pytest.mark.parametrize(
    ("gpu", "case", "least"),
    [
        ("NVIDIA H200", "128x256_top8", 1.2),
        ("NVIDIA H200", "32x1024_top2", 1.2),
        ("NVIDIA H200", "128x768_top8_h2048", 1.2),
        ("NVIDIA H200", "128x1024_top8_h4096", 1.15),
        ("NVIDIA H100 80GB HBM3", "128x256_top8", 1.6),
        ("NVIDIA H100 80GB HBM3", "128x768_top8_h2048", 1.4),
        ("NVIDIA H100 80GB HBM3", "128x1024_top8_h4096", 1.3),
    ],
)
def test_portable_kernels_lead_scattermoe(gpu: str, case: str, least: float) -> None:
    """By the 1.2 times that were asked of an H200; with H = 4096 that is missed there, as the README says."""
    of_gpu = [row for row in MOE if row["gpu"] == gpu]
    mine, its = newest(of_gpu, (case, "triton_moe_portable"), (case, "scattermoe"))
    assert float(its["step_ms"]) >= least * float(mine["step_ms"])


def test_loss_curves_beside_the_reference() -> None:
    rows = [row for row in rows_of(RESULTS / "validate_training.csv") if row["baseline"] == "block_sparse"]
    newest_of = {row["seed"]: row for row in rows}
    assert newest_of.keys() == {"0", "1", "2"}
    for row in newest_of.values():
        assert row["result"] == "pass"
        assert float(row["correlation"]) >= 0.9999


@pytest.mark.parametrize("case", ["8exp_uniform", "8exp_variable", "16exp_uniform", "16exp_variable"])
def test_small_steps_as_graphs(case: str) -> None:
    row = [row for row in HOST if row["case"] == case][-1]
    assert float(row["graph_forward_ms"]) <= 0.08
    assert float(row["graph_step_ms"]) <= 0.2
    assert float(row["launches_forward"]) <= 10
    assert float(row["launches_step"]) <= 24
