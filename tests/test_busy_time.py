"""The plot of busy multiprocessors: its two orders hold the same tiles, its clock compiles, its numbers add up."""

from pathlib import Path

import busy_time
import pytest
import torch

from offline import compiled_by
from triton_moe import ExpertLayout

pytest.importorskip("triton")

PROGRAM = """
def describe(name, kernel, options):
    ptx = kernel.asm["ptx"]
    return name, ptx.count("%globaltimer"), ptx.count("%smid"), "mma" in ptx

describe_each(describe)
jit.JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: self.run(*a, grid=grid, warmup=True, **k)

import busy_time
from triton_moe import ExpertLayout
from triton_moe.kernels import config
from triton_moe.kernels.route import packed_numel, trimmed
from triton_moe.products import Shape, products

config.capability = lambda device: divmod(capability, 10)

def routed(ids, layout, panels):
    return trimmed(torch.zeros(packed_numel(ids.numel(), layout), dtype=torch.int32), ids, layout)

shape = Shape(64, 128, ExpertLayout((128, 64)), 2, "swiglu")
of_shape = products(shape, "triton", torch.bfloat16, torch.device("cpu"), routed)
for kernel in busy_time.KERNELS:
    with busy_time.recorded([]):
        of_shape[kernel].call()
"""


def test_the_clock_compiles_around_each_kernel() -> None:
    benchmarks = Path(busy_time.__file__).parent
    of_operands, *compiled = compiled_by(f"sys.path.insert(0, {str(benchmarks)!r})\n{PROGRAM}", 90)
    assert of_operands == ["grouped_gemm_up_fwd_kernel", 0, 0, True]
    assert compiled == [["timed_kernel", 2, 1, True]] * len(busy_time.KERNELS)


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
    rows = [{**row, "kernel": kernel, "order": order} for kernel in busy_time.KERNELS for order in busy_time.ORDERS]
    busy_time.draw(rows, tmp_path / "deep" / "busy_time.svg")
    assert "heaviest first: 7 us in all" in (tmp_path / "deep" / "busy_time.svg").read_text()
    with pytest.raises(ValueError, match=r"rows: expected each kernel in each order, got none of \[\('dw1'"):
        busy_time.draw(rows[:-1], tmp_path / "none.svg")
