"""moe_mlp on the kernels, output and every gradient, within the error budget of the fp64 oracle."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from operators import inputs_for
from triton_moe import moe_mlp, reference
from triton_moe.activations import ACTIVATIONS
from triton_moe.kernels import grouped_gemm_bwd
from triton_moe.kernels.config import narrowed, tile_config
from triton_moe.kernels.tuning import forget
from triton_moe.testing import (
    BIASES,
    CASES,
    SEED_CASES,
    Case,
    Inputs,
    check_against_oracle,
    make_inputs,
    poison_empty,
    run,
)

kernels = functools.partial(moe_mlp, backend="triton")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_cases(case: Case, device: str, dtype: torch.dtype) -> None:
    with poison_empty():
        check_against_oracle(kernels, inputs_for(case, dtype, device))


@pytest.mark.pairs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, bias: bool, device: str, dtype: torch.dtype) -> None:
    case = Case(21, 24, (16, 5, 0, 33), 3, activation, bias=bias, reason="every activation")
    with poison_empty():
        check_against_oracle(kernels, inputs_for(case, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_tf32_where_it_is_allowed(activation: str) -> None:
    """As far from the truth as PyTorch, which is allowed the same, and farther than fp32."""
    inputs = inputs_for(Case(512, 256, (128, 384, 0, 256), 2, activation, reason="tf32"), torch.float32, "cuda")
    exact = check_against_oracle(kernels, inputs)
    torch.set_float32_matmul_precision("high")
    try:
        allowed = check_against_oracle(kernels, inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    for name in ("out", "dx", "dw1", "dw2"):
        assert allowed[name][0] > 100 * exact[name][0], name


def test_gradient_of_narrow_weights_is_narrow(device: str, dtype: torch.dtype) -> None:
    case = Case(21, 24, (16, 5, 0, 33), 3, "swiglu", reason="weights in x's dtype")
    inputs = inputs_for(case, dtype, device, weights_dtype=dtype)
    assert run(kernels, inputs)["dtopk_weights"].dtype == dtype
    check_against_oracle(kernels, inputs)


OPERANDS = ("x", "topk_weights", "w1", "w2", "w3", "b1", "b2", "b3")


@functools.cache
def frozen(device: str) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs, and all of their results."""
    inputs = inputs_for(Case(21, 24, (16, 5, 0, 33), 3, "swiglu", bias=True, reason="frozen"), torch.float32, device)
    return inputs, run(kernels, inputs)


@pytest.mark.parametrize(
    "asked", [*([name] for name in OPERANDS), *([n for n in OPERANDS if n != m] for m in OPERANDS)]
)
def test_only_what_is_asked_for(asked: list[str], device: str) -> None:
    """One operand alone needs a gradient, or all but one: it is what it was."""
    inputs, everything = frozen(device)
    operands = {name: getattr(inputs, name).clone().requires_grad_(name in asked) for name in OPERANDS}
    out = kernels(topk_ids=inputs.topk_ids, layout=inputs.layout, activation="swiglu", **operands)
    with poison_empty():
        out.backward(inputs.dout)
    for name, operand in operands.items():
        if name in asked:
            assert operand.grad is not None, name
            assert torch.equal(operand.grad, everything[f"d{name}"]), name
        else:
            assert operand.grad is None


@pytest.mark.pairs
@pytest.mark.parametrize("given", [["b1"], ["b2"], ["b3"], ["b1", "b3"]])
@pytest.mark.parametrize("routing", ["random", "repeated"])
def test_any_of_the_biases(given: list[str], routing: str, device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(Case(21, 24, (16, 5, 0, 33), 3, "geglu", routing, bias=True, reason="some"), dtype, device)
    without = {name: None for name in BIASES if name not in given}
    with poison_empty():
        check_against_oracle(kernels, dataclasses.replace(inputs, **without))


def test_biases_are_summed_before_they_are_rounded(device: str, dtype: torch.dtype) -> None:
    """The gradient of a narrow expert's bias, a sum of many rows, is off by one rounding: its own."""
    inputs = inputs_for(Case(150, 8, (1, 40), 2, "none", bias=True, reason="many rows, one column"), dtype, device)
    found = run(moe_mlp, inputs, backend="triton")["db1"]
    truth = run(reference.moe_mlp, inputs, dtype=torch.float64)["db1"]
    error = (found.double() - truth).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * truth.abs() + 1e-5).all()


def test_a_bias_nobody_adds_has_a_gradient_of_zeros(device: str) -> None:
    inputs = inputs_for(
        Case(9, 8, (8, 0, 5), 1, "swiglu", "one expert", bias=True, reason="idle"), torch.float32, device
    )
    with poison_empty():
        grads = run(kernels, inputs)
    assert not grads["db1"][8:].any()
    assert not grads["db3"][8:].any()
    assert not grads["db2"][1:].any()
    assert all(grads[name].any() for name in ("db1", "db2", "db3"))


def test_expanded_output_gradient(device: str, dtype: torch.dtype) -> None:
    """`out.sum().backward()` hands down a gradient of strides 0."""
    inputs = inputs_for(Case(21, 24, (16, 5, 0, 33), 3, "swiglu", reason="sum"), dtype, device)
    ones = torch.ones_like(inputs.dout)
    expected = run(kernels, inputs.__class__(**{**vars(inputs), "dout": ones}))
    actual = run(kernels, inputs.__class__(**{**vars(inputs), "dout": ones[:1, :1].expand_as(ones)}))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_backward_may_run_again_but_has_no_backward(device: str) -> None:
    inputs = inputs_for(Case(9, 8, (8, 5), 2, "silu", reason="graph"), torch.float32, device)
    x = inputs.x.clone().requires_grad_()
    out = kernels(
        x, inputs.topk_weights, inputs.topk_ids, inputs.w1, inputs.w2, layout=inputs.layout, activation="silu"
    )
    first, second = (torch.autograd.grad(out, x, inputs.dout, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(out, x, inputs.dout, create_graph=True)


@pytest.mark.parametrize("wide", ["w1", "w2", "w3"])
@pytest.mark.parametrize(
    "view",
    [lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]], lambda w: w.t().contiguous().t()],
    ids=["wider rows", "transposed"],
)
def test_each_weight_may_have_strides_of_its_own(view: Callable[[Tensor], Tensor], wide: str, device: str) -> None:
    inputs = inputs_for(Case(21, 24, (16, 5, 0, 33), 3, "swiglu", reason="views"), torch.float32, device)
    names = ("x", "topk_weights", "topk_ids", "w1", "w2", "w3")

    def viewed(*operands: Tensor, **options: Any) -> Tensor:
        return kernels(*(view(t) if name == wide else t for name, t in zip(names, operands, strict=True)), **options)

    check_against_oracle(viewed, inputs)


def test_ids_changed_before_backward_raise(device: str) -> None:
    inputs = inputs_for(Case(9, 8, (8, 5), 2, "silu", reason="reused ids"), torch.float32, device)
    x, ids = inputs.x.clone().requires_grad_(), inputs.topk_ids.clone()
    out = kernels(x, inputs.topk_weights, ids, inputs.w1, inputs.w2, layout=inputs.layout, activation="silu")
    ids.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(inputs.dout)


def test_two_runs_agree_bit_for_bit(device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(Case(50, 24, (16, 5, 0, 33), 3, "swiglu", reason="determinism"), dtype, device)
    first, second = run(kernels, inputs), run(kernels, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


ROUTINGS = ("random", "one expert", "dropped", "repeated")


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_layouts_and_routings(data: st.DataObject) -> None:
    """Any widths, any routing, any shape: the kernels stay within the budget, forward and backward."""
    widths = data.draw(
        st.lists(st.sampled_from([0, 1, 3, 8, 16, 17, 33, 100]), min_size=1, max_size=6).filter(any), "widths"
    )
    case = Case(
        num_tokens=data.draw(st.integers(0, 24), "num_tokens"),
        hidden_size=data.draw(st.integers(1, 34), "hidden_size"),
        widths=tuple(widths),
        top_k=data.draw(st.integers(1, len(widths)), "top_k"),
        activation=data.draw(st.sampled_from(ACTIVATIONS), "activation"),
        routing=data.draw(st.sampled_from(ROUTINGS), "routing"),
        reason="drawn",
    )
    dtype, seed = data.draw(st.sampled_from(KERNEL_DTYPES), "dtype"), data.draw(st.integers(0, 2**16), "seed")
    check_against_oracle(kernels, make_inputs(case, dtype, KERNEL_DEVICE, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize("case", SEED_CASES, ids=lambda case: case.reason)
def test_seed_cases(case: Case, device: str, dtype: torch.dtype) -> None:
    check_against_oracle(kernels, inputs_for(case, dtype, device))


@pytest.mark.parametrize("pieces", [2, 4, 8])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_an_epilogue_in_pieces(activation: str, pieces: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = narrowed(tile_config("dh", torch.float16, torch.device(device)), 1)
    monkeypatch.setattr(grouped_gemm_bwd, "_EPILOGUE_N", tile.BLOCK_N // pieces)
    case = Case(21, 24, (16, 5, 0, 33), 3, activation, bias=True, reason="a tile finished in pieces")
    forget()
    try:
        check_against_oracle(kernels, inputs_for(case, torch.float16, device))
    finally:
        forget()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_widths_that_fill_wide_tiles(activation: str, dtype: torch.dtype) -> None:
    for hidden_size, bias in ((256, False), (200, True)):  # of 200 no load is known to be aligned
        case = Case(300, hidden_size, (256, 512, 0, 256), 2, activation, bias=bias, reason="wide tiles")
        inputs = inputs_for(case, dtype, "cuda")
        with poison_empty():
            check_against_oracle(kernels, inputs)
            first, second = run(kernels, inputs), run(kernels, inputs)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
