"""The plot of busy multiprocessors: its two orders hold the same tiles, its clock compiles, its numbers add up."""

import itertools
import re
from pathlib import Path

import busy_time
import pytest
import torch

from offline import compiled_by
from triton_moe import ExpertLayout, Routing

pytest.importorskip("triton")

PROGRAM = """
def describe(name, kernel, options):
    ptx = kernel.asm["ptx"]
    return name, ptx.count("%globaltimer"), ptx.count("%smid"), "mma" in ptx

describe_each(describe)
jit.JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: self.run(*a, grid=grid, warmup=True, **k)

import dataclasses

import busy_time
from triton_moe import ExpertLayout
from triton_moe.kernels import config
from triton_moe.kernels.hopper import launch
from triton_moe.kernels.route import packed_numel, trimmed
from triton_moe.products import Shape, products

config.capability = lambda device: divmod(capability, 10)
launch.fits = lambda *of_layer: True
launch._num_programs = lambda device: 132

def routed(ids, layout, panels):
    routing = trimmed(torch.zeros(packed_numel(ids.numel(), layout), dtype=torch.int32), ids, layout)
    return dataclasses.replace(routing, panels=panels)

shape = Shape(64, 128, ExpertLayout((128, 64, 33)), 2, "swiglu")
of_shape = products(shape, BACKEND, torch.bfloat16, torch.device("cpu"), routed)
for kernel in busy_time.KERNELS:
    with busy_time.recorded([]):
        of_shape[kernel].call()
"""


@pytest.mark.parametrize(
    ("backend", "kernel", "clock"),
    [
        ("triton", "grouped_gemm_up_fwd_kernel", "timed_kernel"),
        ("hopper", "grouped_gemm_up_hopper_kernel", "timed_gluon_kernel"),
    ],
)
def test_the_clock_compiles_around_each_kernel(backend: str, kernel: str, clock: str) -> None:
    """And around the copies of weights that one of an odd width asks for."""
    benchmarks = Path(busy_time.__file__).parent
    program = f"sys.path.insert(0, {str(benchmarks)!r})\nBACKEND = {backend!r}\n{PROGRAM}"
    compiled = compiled_by(program, 90)
    products = [line for line in compiled if line[-1]]
    assert products == [[kernel, 0, 0, True]] + [[clock, 2, 1, True]] * len(busy_time.KERNELS)
    assert [line for line in compiled if not line[-1]] == [
        *([["transpose_kernel", 0, 0, False]] * 2), *([["timed_kernel", 2, 1, False]] * 2)
    ]  # fmt: skip


def lists_of(routing: Routing) -> list[list[list[int]]]:
    """The Hopper kernels', as far as tiles exist: each of three experts with a width has one column of tiles."""
    assert routing.tiles is not None
    numbers, ragged, weights = routing.tiles
    counts = [*numbers[1:3].tolist(), 3, 3]
    tiles = (*ragged.values(), *weights.values())
    return [of_list[: 2 * count].view(-1, 2).tolist() for of_list, count in zip(tiles, counts, strict=True)]


def test_by_expert_is_the_same_work_in_another_order(device: str) -> None:
    from triton_moe import products
    from triton_moe.kernels.route import route, trimmed

    shape = products.Shape(48, 32, ExpertLayout((16, 64, 0, 32)), 2, "swiglu")

    def routed(ids: torch.Tensor, layout: ExpertLayout, panels: bool):
        packed = route(ids, layout, panels).packed
        assert packed is not None
        return trimmed(packed, ids, layout)

    heaviest, by_expert = [], []
    orders = (lambda *args: heaviest.append(routed(*args)) or heaviest[-1],
              lambda *args: by_expert.append(busy_time.by_expert(routed(*args))) or by_expert[-1])  # fmt: skip
    one, other = (
        products.products(shape, "triton", torch.float32, torch.device(device), order) for order in orders
    )  # fmt: skip
    blocks, sorted_blocks = heaviest[0].row_blocks.tolist(), by_expert[0].row_blocks.tolist()
    real = [block for block in blocks if block[0] >= 0]
    assert [block[0] for block in real[:1]] == [1]
    assert sorted_blocks[: len(real)] == sorted(real) != real
    assert all(block == [-1, -1] for block in sorted_blocks[len(real) :])
    assert by_expert[0].expert_order.tolist() == [0, 1, 2, 3]
    lists, sorted_lists = lists_of(heaviest[0]), lists_of(by_expert[0])
    assert sorted_lists == [sorted(tiles) for tiles in lists]
    assert [tiles[0][0] for tiles in lists[:2]] == [1, 1]
    for kernel in busy_time.KERNELS:
        assert products.disagreement(one[kernel], other[kernel]) == 0


def test_busy_time_counts_overlaps_once() -> None:
    programs = [(0, 0, 2000), (0, 1000, 3000), (0, 1500, 1600), (1, 500, 1500), (0, 5000, 6000)]
    assert busy_time.busy_us(programs) == {0: 4.0, 1: 1.0}


def test_shuffled_widths_are_the_same_widths() -> None:
    layout = ExpertLayout(tuple(range(1, 40)))
    assert sorted(busy_time.shuffled(layout).widths) == list(layout.widths) != list(busy_time.shuffled(layout).widths)


def test_the_plot_wants_each_kernel_in_each_order(tmp_path: Path) -> None:
    row = {"case": "c", "gpu": "a GPU", "date": "today", "commit": "abc", "span_us": "7", "busy_us": "5 4 3"}
    places = itertools.product(busy_time.BACKENDS, busy_time.KERNELS, busy_time.ORDERS)
    rows = [row | dict(zip(("backend", "kernel", "order"), place, strict=True)) for place in places]
    for backends, used in (({"portable"}, rows[:6]), ({"portable", "Hopper"}, rows)):
        busy_time.draw(used, tmp_path / "deep" / "busy_time.svg")
        drawn = (tmp_path / "deep" / "busy_time.svg").read_text()
        assert "heaviest first: 7 us in all" in drawn
        assert set(re.findall("<!-- up, (.*) -->", drawn)) == backends
    with pytest.raises(ValueError, match=r"rows: expected each kernel in each order, got none of \[\('hopper', 'dw1'"):
        busy_time.draw(rows[:-1], tmp_path / "none.svg")
