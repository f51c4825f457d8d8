"""grouped_gemm_up and grouped_gemm_down against the oracle, each alone and composed, in either weight orientation."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from operators import check_operator, inputs_for, routings, unit
from triton_moe import functional, reference
from triton_moe.activations import ACTIVATIONS, is_gated
from triton_moe.kernels import config, grouped_gemm_down_autograd, grouped_gemm_up_autograd, scatter_autograd
from triton_moe.kernels.launch import Launcher
from triton_moe.kernels.tiles import as_tf32
from triton_moe.layout import Routing
from triton_moe.testing import CASES, Case, Inputs, check_against_oracle

BASE = next(case for case in CASES if case.routing == "random" and case.num_tokens > 8)


def live(buffer: Tensor, routing: Routing) -> Tensor:
    """The buffer with zeros between the experts' blocks, as the oracle's buffers have."""
    kept = torch.zeros_like(buffer)
    for e in range(routing.layout.num_experts):
        routing.ragged_block(kept, e).copy_(routing.ragged_block(buffer, e))
    return kept


def up_operands(inputs: Inputs) -> list[Tensor]:
    return [inputs.x, inputs.w1] if inputs.w3 is None else [inputs.x, inputs.w1, inputs.w3]


def check_up(inputs: Inputs, operands: list[Tensor]) -> None:
    _, routing = routings(inputs)
    dout = live(unit((routing.ragged_numel(),), inputs.x), routing)
    check_operator("grouped_gemm_up", operands, dout, inputs, activation=inputs.activation)


def check_down(inputs: Inputs, w2: Tensor) -> None:
    _, routing = routings(inputs)
    x_up = live(unit((routing.ragged_numel(),), inputs.x, seed=3), routing)
    dout = unit((routing.num_rows, w2.shape[1]), inputs.x)
    check_operator("grouped_gemm_down", [x_up, w2], dout, inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_up(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(case, dtype, device)
    check_up(inputs, up_operands(inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_down(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(case, dtype, device)
    check_down(inputs, inputs.w2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, device: str, dtype: torch.dtype) -> None:
    case = Case(13, 24, (16, 5, 0, 33), 2, activation, reason="every activation")
    inputs = inputs_for(case, dtype, device)
    assert (inputs.w3 is not None) == is_gated(activation)
    check_up(inputs, up_operands(inputs))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)], ids=["fp64", "kahan"])
def test_sums_of_fp32(capability: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without tensor cores for fp64: a sum of many terms that cancel keeps its digits."""
    monkeypatch.setattr(config, "capability", lambda device: capability)
    assert config.input_precision(torch.float32, torch.device(device)) == ("fp64" if capability == (8, 0) else "ieee")
    inputs = inputs_for(Case(40, 128, (33, 64), 2, "swiglu", reason="fp32 sums"), torch.float32, device)
    check_up(inputs, up_operands(inputs))
    check_down(inputs, inputs.w2)
    x = torch.cat([inputs.x, -inputs.x], dim=1)
    x[:, 0] += 2.0**-20
    w1 = torch.cat([inputs.w1, inputs.w1]).abs() + 0.5
    routing, _ = routings(inputs)
    sums = functional.grouped_gemm_up(x, w1, routing=routing, activation="none")
    for e in range(2):
        rows, columns = slice(*routing.row_offsets[e : e + 2].tolist()), routing.layout.columns(e)
        slots = routing.row_to_slot[rows].long()
        exact = (x[slots // routing.top_k].double() @ w1[:, columns].double()).float()
        error = (routing.ragged_block(sums, e) - exact).abs().max()
        assert error <= (0 if capability == (8, 0) else 2e-5)


@triton.jit
def as_tf32_kernel(x, rounded, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(rounded + places, as_tf32(tl.load(x + places)))


def test_rounding_to_tf32(device: str) -> None:
    """To the nearest of 11 bits, where dropping bits would err twice as much and always towards zero."""
    special = torch.tensor([0.0, -0.0, 1 + 2.0**-11, -1 - 3 * 2.0**-11, math.inf, -math.inf, math.nan, 1e-40])
    all_ones = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # NaN, as GPUs make them
    numbers = torch.randn(1014, generator=torch.Generator().manual_seed(0)).exp2() * 3
    x = torch.cat([special, all_ones, numbers]).to(device)
    rounded = torch.empty_like(x)
    Launcher(as_tf32_kernel, N=1024)((1,), x, rounded)
    assert rounded[:4].tolist() == [0.0, -0.0, 1 + 2.0**-10, -1 - 2.0**-9]
    assert torch.equal(rounded[4:6], x[4:6])
    assert rounded[[6, 8, 9]].isnan().all()
    assert abs(rounded[7]) <= 2e-40
    mantissa, exponent = torch.frexp(numbers.double())
    assert torch.equal(rounded[10:].cpu().double(), torch.ldexp((mantissa * 2**11 + 0.5).floor(), exponent - 11))


def test_transposed_weights(device: str, dtype: torch.dtype) -> None:
    """Weights that lie the other way round in memory, w3 unlike w1."""
    case = Case(13, 24, (16, 5, 0, 33), 2, "swiglu", reason="orientation")
    inputs = inputs_for(case, dtype, device)
    assert inputs.w3 is not None
    check_up(inputs, [inputs.x, inputs.w1.t().contiguous().t(), inputs.w3])
    check_up(inputs, [inputs.x, inputs.w1.t().contiguous().t(), inputs.w3.t().contiguous().t()])
    check_down(inputs, inputs.w2.t().contiguous().t())


@pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
def test_building_blocks_compose_to_the_layer(activation: str, device: str, dtype: torch.dtype) -> None:
    """up, down and scatter one after the other, each with its own backward, are moe_mlp."""
    case = Case(21, 24, (16, 5, 0, 33), 3, activation, reason="composition")

    def composed(x, topk_weights, topk_ids, w1, w2, w3=None, *, layout, activation):
        if x.dtype == torch.float64:
            return reference.moe_mlp(x, topk_weights, topk_ids, w1, w2, w3, layout=layout, activation=activation)
        routing, _ = routings(inputs)
        x_up = grouped_gemm_up_autograd(x, w1, w3, routing=routing, activation=activation)
        x_down = grouped_gemm_down_autograd(x_up, w2, routing=routing)
        return scatter_autograd(x_down, topk_weights, routing=routing)

    inputs = inputs_for(case, dtype, device)
    check_against_oracle(composed, inputs)


def test_what_lies_past_the_widths_reaches_nothing(device: str) -> None:
    """Between up and down a caller may fill the padding of odd widths with anything, NaN as well, forward or back."""
    inputs = inputs_for(Case(30, 32, (5, 24, 3), 2, "gelu", reason="odd widths"), torch.float32, device)
    ours, theirs = routings(inputs)
    results = []
    for module, routing in ((functional, ours), (reference, theirs)):
        up = getattr(module, "grouped_gemm_up_autograd", None) or reference.grouped_gemm_up
        down = getattr(module, "grouped_gemm_down_autograd", None) or reference.grouped_gemm_down
        x = inputs.x.clone().requires_grad_()
        a = up(x, inputs.w1, routing=routing, activation="gelu")
        y = down((a.abs() + 1e-30).log().abs().sqrt() + a / a.abs(), inputs.w2, routing=routing)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    for actual, expected in zip(*results, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
