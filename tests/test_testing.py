"""The error budget tells right from wrong: other orders of summation pass, planted faults do not, in every dtype."""

import dataclasses
import threading

import pytest
import torch
from torch import Tensor

from triton_moe import reference
from triton_moe.activations import ACTIVATIONS
from triton_moe.testing import (
    CASES,
    SEED_CASES,
    Case,
    Inputs,
    assert_within_budget,
    check_against_oracle,
    make_inputs,
    poison_empty,
    run,
)

in_each_dtype = pytest.mark.parametrize("float_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
CASE = Case(48, 40, (33, 16, 0, 64), 2, "swiglu", reason="room for a tile")


def in_another_order(
    x, topk_weights, topk_ids, w1, w2, w3=None, *, layout, activation, b1=None, b2=None, b3=None
) -> Tensor:
    """Sums over H, over the width and over K from the far end, the first in two halves."""
    turned = torch.cat([torch.arange(o, o + i).flip(0) for o, i in zip(layout.offsets, layout.widths, strict=True)])
    half = x.shape[1] // 2
    far = torch.cat([torch.arange(half, x.shape[1]), torch.arange(half)])
    out = reference.moe_mlp(
        x[:, far], topk_weights.flip(1), topk_ids.flip(1), w1[far][:, turned], w2[turned][:, far],
        None if w3 is None else w3[far][:, turned], layout=layout, activation=activation,
        b1=None if b1 is None else b1[turned], b2=None if b2 is None else b2[:, far],
        b3=None if b3 is None else b3[turned],
    )  # fmt: skip
    return out[:, far.argsort()]


@in_each_dtype
@pytest.mark.parametrize("case", [*CASES, CASE], ids=lambda case: case.reason)
def test_another_order_of_summation_passes(case: Case, float_dtype: torch.dtype) -> None:
    inputs = make_inputs(case, float_dtype, "cpu")
    errors = check_against_oracle(in_another_order, inputs)
    given = ("x", "topk_weights", "w1", "w2", "w3", "b1", "b2", "b3")
    names = ["out", *(f"d{name}" for name in given if getattr(inputs, name) is not None)]
    assert list(errors) == names


def zeros(*operands, **options) -> Tensor:
    return 0 * reference.moe_mlp(*operands, **options)


def without_an_expert(x, topk_weights, topk_ids, *weights, layout, **options) -> Tensor:
    kept = topk_ids.where(topk_ids != 1, layout.num_experts)
    return reference.moe_mlp(x, topk_weights, kept, *weights, layout=layout, **options)


def gate_and_up_swapped(x, topk_weights, topk_ids, w1, w2, w3, **options) -> Tensor:
    return reference.moe_mlp(x, topk_weights, topk_ids, w3, w2, w1, **options)


def without_a_bias(*operands, b1, **options) -> Tensor:
    return reference.moe_mlp(*operands, b1=0 * b1, **options)


def biases_swapped(*operands, b1, b3, **options) -> Tensor:
    return reference.moe_mlp(*operands, b1=b3, b3=b1, **options)


def bias_of_another_expert(*operands, b2, **options) -> Tensor:
    return reference.moe_mlp(*operands, b2=b2.roll(1, 0), **options)


@in_each_dtype
@pytest.mark.parametrize("fault", [without_a_bias, biases_swapped, bias_of_another_expert])
def test_wrong_biases_fail(fault, float_dtype: torch.dtype) -> None:
    case = dataclasses.replace(CASE, bias=True)
    with pytest.raises(AssertionError, match="moe_mlp out: error budget exceeded"):
        check_against_oracle(fault, make_inputs(case, float_dtype, "cpu"))


def test_biases_change_no_other_input() -> None:
    with_biases, without = (make_inputs(dataclasses.replace(CASE, bias=b), torch.float32, "cpu") for b in (True, False))
    for name, value in vars(without).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(with_biases, name)), name
    assert without.b1 is None
    assert with_biases.b1 is not None
    assert with_biases.b3 is not None


def unweighted(x, topk_weights, *operands, **options) -> Tensor:
    return reference.moe_mlp(x, topk_weights * 0 + 0.5, *operands, **options)


@in_each_dtype
@pytest.mark.parametrize("fault", [zeros, without_an_expert, gate_and_up_swapped, unweighted])
def test_wrong_functions_fail(fault, float_dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="moe_mlp out: error budget exceeded"):
        check_against_oracle(fault, make_inputs(CASE, float_dtype, "cpu"))


def three_ways(case: Case, dtype: torch.dtype) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, truth and plain."""
    inputs = make_inputs(case, dtype, "cpu")
    return inputs, run(reference.moe_mlp, inputs, dtype=torch.float64), run(reference.moe_mlp, inputs)


def stale_tile(tensor: Tensor) -> Tensor:
    """A 16 x 16 tile that kept what was computed for another."""
    tensor = tensor.clone()
    rows, columns = (slice(0, 16) if n < 32 else slice(16, 32) for n in tensor.shape)
    tensor[rows, columns] = tensor[rows, columns].roll(1, 0)
    return tensor


def one_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 1] = torch.nan
    return tensor


FAULTS = {
    "zeros": torch.zeros_like,
    "stale": stale_tile,
    "scaled": lambda tensor: tensor * 1.05,
    "NaN": one_nan,
    "infinite": lambda tensor: tensor / 0,
    "shape": lambda tensor: tensor[:-1],
    "dtype": lambda tensor: tensor.double(),
    "transposed": lambda tensor: tensor.t().reshape(tensor.shape),
}


@in_each_dtype
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_tensors_fail(fault: str, float_dtype: torch.dtype) -> None:
    """One tensor at a time is wrong: the output, or one of the gradients."""
    _, truth, plain = three_ways(CASE, float_dtype)
    assert_within_budget(plain, truth, plain, eps_dtype=float_dtype, name="layer")
    for name in plain:
        spoilt = {**plain, name: FAULTS[fault](plain[name])}
        with pytest.raises(AssertionError, match=f"^layer {name}: "):
            assert_within_budget(spoilt, truth, plain, eps_dtype=float_dtype, name="layer")


@in_each_dtype
def test_a_fault_in_a_small_gradient_fails_beside_a_large_one(float_dtype: torch.dtype) -> None:
    """A tile of a wide expert's dw1, beside a narrow expert whose gradients are ten times as large."""
    case = Case(48, 64, (1, 400), 2, "none", reason="1:400")

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w1: Tensor) -> Tensor:  # type: ignore[override]
            return w1.clone()

        @staticmethod
        def backward(ctx, dw1: Tensor) -> Tensor:  # type: ignore[override]
            return torch.cat([dw1[:, :1], dw1[:, 1:] * 1.05], dim=1)

    def spoilt(x, topk_weights, topk_ids, w1, *weights, **options):
        return reference.moe_mlp(x, topk_weights, topk_ids, Spoil.apply(w1), *weights, **options)

    with pytest.raises(AssertionError, match="dw1: error budget exceeded"):
        check_against_oracle(spoilt, make_inputs(case, float_dtype, "cpu"))


def test_tf32_sized_errors_fail_in_fp32() -> None:
    _, truth, plain = three_ways(CASE, torch.float32)
    short = {name: tensor.half().float() for name, tensor in plain.items()}  # as many bits as TF32 has
    with pytest.raises(AssertionError, match="layer out: error budget exceeded"):
        assert_within_budget(short, truth, plain, eps_dtype=torch.float32, name="layer")


def test_the_message_says_where_and_how_much() -> None:
    truth = torch.zeros(4, 5, dtype=torch.float64)
    plain = truth.float()
    actual = plain.clone()
    actual[2, 3] = 1
    with pytest.raises(AssertionError) as info:
        assert_within_budget(actual, truth, plain, eps_dtype=torch.float32, name="dx")
    message = str(info.value)
    assert message.startswith("dx: error budget exceeded")
    assert "max error 1, allowed" in message
    assert "rms error 0.224, allowed" in message
    assert "worst at (2, 3): 1, truth 0" in message


def test_missing_and_superfluous_tensors_fail() -> None:
    _, truth, plain = three_ways(CASE, torch.float32)
    for other in ({k: v for k, v in plain.items() if k != "dw3"}, {**plain, "db1": plain["dw1"]}):
        with pytest.raises(AssertionError, match=r"^layer: expected .*dw3"):
            assert_within_budget(other, truth, plain, eps_dtype=torch.float32, name="layer")


def test_nan_where_nan_belongs_passes() -> None:
    """In x of one token: in its output it must be, elsewhere it must not."""
    inputs, _, _ = three_ways(CASE, torch.float32)
    inputs.x[3] = torch.nan
    check_against_oracle(in_another_order, inputs)
    with pytest.raises(AssertionError, match="moe_mlp out: 40 of 1920 elements are NaN or infinite"):
        check_against_oracle(lambda *operands, **options: reference.moe_mlp(*operands, **options).nan_to_num(), inputs)


def test_empty_tensors_pass_and_their_shape_counts() -> None:
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert assert_within_budget(empty.half(), empty, empty.half(), eps_dtype=torch.half, name="x") == (0, 0)
    with pytest.raises(AssertionError, match="x: expected shape"):
        assert_within_budget(empty.half().t(), empty, empty.half(), eps_dtype=torch.half, name="x")


def test_a_missing_gradient_fails() -> None:
    with pytest.raises(AssertionError, match="dw2: expected a gradient, got None"):
        run(
            lambda x, s, ids, w1, w2, w3, **_: x * s.sum() * w1.sum() * w3.sum(),
            make_inputs(CASE, torch.float32, "cpu"),
        )


def test_cases_cover_what_they_must() -> None:
    def made(case: Case) -> Inputs:
        return make_inputs(case, torch.float32, "cpu")

    def row_counts(case: Case) -> list[int]:
        return reference.route(made(case).topk_ids, made(case).layout).row_offsets.diff().tolist()

    assert len({case.reason for case in (*CASES, *SEED_CASES)}) == len(CASES) + len(SEED_CASES)
    assert {case.activation for case in CASES} == set(ACTIVATIONS)
    assert {0, 1, 8, 100} <= {width for case in CASES for width in case.widths}
    live = [case for case in CASES if case.num_tokens > 0]
    assert len(live) < len(CASES)
    assert any(0 in row_counts(case) and 0 not in case.widths for case in live)
    assert any(max(row_counts(case)) == case.num_tokens * case.top_k for case in live if len(case.widths) > 1)
    assert any(case.top_k == len(case.widths) for case in live)
    assert any(case.top_k == 1 for case in live)
    assert any(case.hidden_size % 2 for case in live)
    assert any(max(case.widths) > 10 * sorted(case.widths)[len(case.widths) // 2] for case in live)
    assert any(len(case.widths) > case.num_tokens * case.top_k for case in live)
    dropped = [(made(case).topk_ids == len(case.widths)).float().mean() for case in live]
    assert 1 in dropped
    assert any(0 < share < 1 for share in dropped)
    assert any(
        (made(case).topk_ids.sort(1).values.diff(dim=1) == 0).any() for case in live if case.routing == "repeated"
    )


@in_each_dtype
def test_inputs(float_dtype: torch.dtype) -> None:
    """Unit scale, the asked dtypes, the same numbers each time, and rounded: the truth sees what the kernels see."""
    inputs = make_inputs(CASE, float_dtype, "cpu", seed=3, ids_dtype=torch.int64)
    again = make_inputs(CASE, float_dtype, "cpu", seed=3, weights_dtype=float_dtype)
    assert torch.equal(inputs.x, again.x)
    assert not torch.equal(inputs.x, make_inputs(CASE, float_dtype, "cpu", seed=4).x)
    assert (inputs.topk_ids.dtype, again.topk_ids.dtype) == (torch.int64, torch.int32)
    assert (inputs.topk_weights.dtype, again.topk_weights.dtype) == (torch.float32, float_dtype)
    torch.testing.assert_close(inputs.topk_weights.sum(1), torch.ones(48))
    assert inputs.w3 is not None
    for tensor in (inputs.x, inputs.dout, inputs.w1, inputs.w2, inputs.w3):
        assert tensor.dtype == float_dtype
    for e in (0, 1, 3):
        columns = inputs.layout.columns(e)
        for tensor, fan_in in ((inputs.w1[:, columns], 40), (inputs.w2[columns], CASE.widths[e])):
            assert 0.8 < tensor.double().std() * fan_in**0.5 < 1.2


def test_unknown_routing_raises() -> None:
    with pytest.raises(ValueError, match=r"routing: expected one of .*, got 'uniform'"):
        make_inputs(Case(2, 2, (2,), 1, "silu", "uniform", reason="typo"), torch.float32, "cpu")


def test_poison_empty() -> None:
    like = torch.zeros(2, 3)

    def fresh(dtype: torch.dtype) -> list[Tensor]:
        return [
            torch.empty(2, 3, dtype=dtype),
            torch.empty_like(like, dtype=dtype),
            torch.empty_strided((2, 3), (1, 2), dtype=dtype),
            like.new_empty((2, 3), dtype=dtype),
        ]

    originals = torch.empty, torch.empty_like, torch.empty_strided
    with poison_empty():
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64):
            assert all(tensor.isnan().all() for tensor in fresh(dtype))
        for dtype in (torch.int64, torch.int32):
            assert all((tensor > 2**28).all() for tensor in fresh(dtype))
        assert torch.empty(3, dtype=torch.bool).all()
        assert torch.empty(3, requires_grad=True).requires_grad
        assert torch.empty_strided((2, 3), (1, 2)).stride() == (1, 2)
        elsewhere: list[Tensor] = []
        thread = threading.Thread(target=lambda: elsewhere.extend(fresh(torch.float32)))
        thread.start()
        thread.join()
        assert all(tensor.isnan().all() for tensor in elsewhere)
    assert (torch.empty, torch.empty_like, torch.empty_strided) == originals
    assert "new_empty" not in vars(torch.Tensor)


def test_poison_ends_with_an_exception() -> None:
    original = torch.empty
    with pytest.raises(KeyError), poison_empty():
        raise KeyError
    assert torch.empty is original
