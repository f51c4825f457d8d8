"""The oracle itself: against numbers worked out by hand, against finite differences, and where nothing may leak."""

import math

import pytest
import torch
from torch import Tensor

from triton_moe import reference
from triton_moe.activations import ACTIVATIONS, is_gated
from triton_moe.layout import ExpertLayout, Routing

LAYOUT = ExpertLayout((3, 1, 0, 2))
IDS = torch.tensor([[1, 0], [2, 1], [4, 3], [3, 3], [0, -1]])  # a null expert, dropped slots, a repeated id


def normal(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()


def operands(activation: str, ids: Tensor = IDS, layout: ExpertLayout = LAYOUT, hidden_size: int = 3) -> list:
    """x, topk_weights, topk_ids, w1, w2, w3."""
    packed = (hidden_size, layout.total_width)
    w3 = normal(*packed, seed=4) if is_gated(activation) else None
    x, topk_weights = normal(len(ids), hidden_size, seed=0), normal(*ids.shape, seed=1)
    return [x, topk_weights, ids, normal(*packed, seed=2), normal(*reversed(packed), seed=3), w3]


def routing() -> Routing:
    return reference.route(IDS, LAYOUT)


def test_route_is_the_docstrings_example() -> None:
    ids = torch.tensor([[1, 0], [2, 1]])
    made = reference.route(ids, ExpertLayout((3, 2, 0)))
    assert made.topk_ids is ids
    assert made.counts.tolist() == [1, 2, 1]
    assert made.row_offsets.tolist() == [0, 1, 3, 3]
    assert made.row_to_slot.tolist() == [1, 0, 3, -1]
    assert made.slot_to_row.tolist() == [[1, 0], [-1, 2]]
    assert made.ragged_offsets.tolist() == [0, 64, 128, 128]
    assert made.expert_order.tolist() == [1, 0, 2]
    assert made.row_blocks.shape == (0, 2)
    assert made.block_m == 0
    tensors = [value for name, value in vars(made).items() if isinstance(value, Tensor) and name != "topk_ids"]
    assert len(tensors) == 7
    for tensor in tensors:
        assert tensor.dtype == (torch.int64 if tensor is made.ragged_offsets else torch.int32)


@pytest.mark.parametrize("dtype_of_ids", [torch.int32, torch.int64])
def test_route_drops_ids_out_of_range(dtype_of_ids: torch.dtype) -> None:
    made = reference.route(torch.tensor([[2, 0], [3, -1], [7, 0]], dtype=dtype_of_ids), ExpertLayout((4, 0)))
    assert made.counts.tolist() == [2, 0]
    assert made.row_to_slot.tolist() == [1, 5, -1, -1, -1, -1]
    assert made.slot_to_row.tolist() == [[-1, 0], [-1, -1], [-1, 1]]


def test_route_orders_experts_by_rows_and_ties_by_number() -> None:
    made = reference.route(torch.tensor([[3], [1], [3], [1], [0], [2], [2], [2]]), ExpertLayout((1, 1, 0, 1)))
    assert made.counts.tolist() == [1, 2, 3, 2]
    assert made.expert_order.tolist() == [1, 3, 0, 2]


def test_rows_are_rounded_up_to_8_elements_and_blocks_to_64() -> None:
    made = reference.route(torch.zeros(9, 1, dtype=torch.int32), ExpertLayout((5, 1)))
    assert made.ragged_offsets.tolist() == [0, 128, 128]
    assert reference.route(torch.zeros(8, 1).int(), ExpertLayout((1,))).ragged_offsets.tolist() == [0, 64]


def test_hand_computed() -> None:
    """H = 1, widths 2 and 1: expert 0 is `relu(1x)^2 * 1 + relu(-1x)^2 * 10`, expert 1 is `relu(2x)^2 * 1`."""
    layout = ExpertLayout((2, 1))
    x, topk_weights = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5, 0.25], [2.0, 1.0]])
    ids, w1, w2 = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[1.0], [10.0], [1.0]])
    out = reference.moe_mlp(x, topk_weights, ids, w1, w2, layout=layout)
    assert out.tolist() == [[0.5 * 1 + 0.25 * 4], [2 * 40]]
    w3 = torch.tensor([[3.0, 1.0, -1.0]])
    out = reference.moe_mlp(x, topk_weights, ids, w1, w2, w3, layout=layout, activation="reglu")
    assert out.tolist() == [[0.5 * 3 + 0.25 * -2], [2 * 2 * -2 * 10]]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("relu_squared", [0.0, 0.0, 4.0]),
        ("relu", [0.0, 0.0, 2.0]),
        ("gelu", [-0.15865525393145707, 0.0, 1.9544997361036416]),
        ("gelu_tanh", [-0.15880800939172324, 0.0, 1.9545976940877750]),
        ("silu", [-1 / (1 + math.e), 0.0, 2 / (1 + math.exp(-2))]),
        ("none", [-1.0, 0.0, 2.0]),
    ],
)
def test_activations_at_three_points(activation: str, expected: list[float]) -> None:
    h = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(reference.PLAIN[activation](h), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["relu", "relu_squared"])
def test_derivative_at_zero_is_zero(activation: str) -> None:
    h = torch.zeros(1, requires_grad=True)
    reference.PLAIN[activation](h).backward()
    assert h.grad is not None
    assert h.grad.item() == 0


def test_every_activation_is_there_and_passes_nan_on() -> None:
    assert {*reference.PLAIN, *reference.GATED} == set(ACTIVATIONS)
    for formula in (*reference.PLAIN.values(), *reference.GATED.values()):
        assert formula(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_moe_mlp(activation: str) -> None:
    x, topk_weights, ids, w1, w2, w3 = operands(activation)

    def layer(x, topk_weights, w1, w2, w3):
        return reference.moe_mlp(x, topk_weights, ids, w1, w2, w3, layout=LAYOUT, activation=activation)

    assert torch.autograd.gradcheck(layer, (x, topk_weights, w1, w2, w3))


def biases(activation: str, hidden_size: int = 3) -> dict[str, Tensor]:
    S, E = LAYOUT.total_width, LAYOUT.num_experts
    made = {"b1": normal(S, seed=6), "b2": normal(E, hidden_size, seed=7)}
    return {**made, "b3": normal(S, seed=8)} if is_gated(activation) else made


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_moe_mlp_with_biases(activation: str) -> None:
    x, topk_weights, ids, w1, w2, w3 = operands(activation)
    given = biases(activation)

    def layer(x, topk_weights, w1, w2, w3, *values):
        named = dict(zip(given, values, strict=True))
        return reference.moe_mlp(x, topk_weights, ids, w1, w2, w3, layout=LAYOUT, activation=activation, **named)

    assert torch.autograd.gradcheck(layer, (x, topk_weights, w1, w2, w3, *given.values()))


def test_biases_by_hand() -> None:
    """H = 1, widths 1 and 0: `relu(2x + 1) * (3x - 1) + 5`; the null expert's bias is nobody's."""
    b = {"b1": torch.tensor([1.0]), "b2": torch.tensor([[5.0], [7.0]]), "b3": torch.tensor([-1.0])}
    out = reference.moe_mlp(
        torch.tensor([[2.0]]), torch.tensor([[0.5, 2.0]]), torch.tensor([[0, 1]]), torch.tensor([[2.0]]),
        torch.tensor([[1.0]]), torch.tensor([[3.0]]), layout=ExpertLayout((1, 0)), activation="reglu", **b,
    )  # fmt: skip
    assert out.item() == 0.5 * (5 * 5 + 5)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_biases_are_inputs_of_one(activation: str) -> None:
    """b1 and b3 as rows of w1 and w3 for a column of ones in x; b2 as one more expert's, known by its tokens."""
    x, topk_weights, ids, w1, w2, w3 = operands(activation)
    b = biases(activation)
    out = reference.moe_mlp(x, topk_weights, ids, w1, w2, w3, layout=LAYOUT, activation=activation, **b)
    wide_x, wide_w2 = torch.cat([x, torch.ones(5, 1)], dim=1), torch.cat([w2, torch.zeros(6, 1)], dim=1)
    wide_w1 = torch.cat([w1, b["b1"][None]])
    wide_w3 = None if w3 is None else torch.cat([w3, b["b3"][None]])
    expected = reference.moe_mlp(
        wide_x, topk_weights, ids, wide_w1, wide_w2, wide_w3, layout=LAYOUT, activation=activation
    )[:, :3]
    for t, k in ((t, k) for t in range(5) for k in range(2) if 0 <= ids[t, k] < 4 and LAYOUT.widths[ids[t, k]]):
        expected = expected.index_add(0, torch.tensor([t]), (topk_weights[t, k] * b["b2"][ids[t, k]])[None])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_up_and_activation(activation: str) -> None:
    x, _, _, w1, _, w3 = operands(activation)
    r = routing()
    up = lambda x, w1, w3: reference.grouped_gemm_up(x, w1, w3, routing=r, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(up, (x, w1, w3))
    pre = reference.pre_activation(x, w1, w3, routing=r).detach().requires_grad_()
    assert pre.shape == (r.ragged_numel(2 if is_gated(activation) else 1),)
    a = reference.activation(pre, routing=r, activation=activation)
    torch.testing.assert_close(a, up(x, w1, w3), rtol=0, atol=0)
    act = lambda pre: reference.activation(pre, routing=r, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(act, (pre,), fast_mode=True)


def test_gradients_of_gather_pre_activation_down_and_scatter() -> None:
    x, topk_weights, _, w1, w2, w3 = operands("swiglu")
    r = routing()
    check = torch.autograd.gradcheck
    assert check(lambda x: reference.gather(x, routing=r), (x,))
    assert check(lambda x, w1, w3: reference.pre_activation(x, w1, w3, routing=r), (x, w1, w3))
    x_up = reference.grouped_gemm_up(x, w1, w3, routing=r, activation="swiglu").detach().requires_grad_()
    assert check(lambda x_up, w2: reference.grouped_gemm_down(x_up, w2, routing=r), (x_up, w2), fast_mode=True)
    y = normal(r.num_rows, 3, seed=5)
    assert check(lambda y, weights: reference.scatter(y, weights, routing=r), (y, topk_weights))


def test_moe_mlp_is_the_sum_over_tokens_and_slots() -> None:
    x, topk_weights, ids, w1, w2, w3 = operands("swiglu")
    expected = torch.zeros_like(x)
    for t, k in ((t, k) for t in range(5) for k in range(2) if 0 <= ids[t, k] < 4):
        columns = LAYOUT.columns(int(ids[t, k]))
        a = torch.nn.functional.silu(x[t] @ w1[:, columns]) * (x[t] @ w3[:, columns])
        expected[t] += topk_weights[t, k] * (a @ w2[columns])
    out = reference.moe_mlp(x, topk_weights, ids, w1, w2, w3, layout=LAYOUT, activation="swiglu")
    torch.testing.assert_close(out, expected)


def test_halves_of_a_gated_pre_activation() -> None:
    x, _, _, w1, _, w3 = operands("swiglu")
    r, columns = routing(), LAYOUT.columns(0)
    x_e = x[[0, 4]]
    pre = reference.pre_activation(x, w1, w3, routing=r)
    for part, w in enumerate((w1, w3)):
        torch.testing.assert_close(r.ragged_block(pre, 0, part, 2), x_e @ w[:, columns])


def test_zeros_between_the_blocks_and_past_the_last_row() -> None:
    x, _, _, w1, w2, _ = operands("none")
    r = routing()
    a = reference.grouped_gemm_up(x + 10, w1.abs(), routing=r, activation="none")
    assert a.shape == (r.ragged_numel(),)
    assert a.count_nonzero() == 2 * 3 + 2 * 1 + 3 * 2  # n_e * I_e of the experts 0, 1 and 3
    used = int(r.row_offsets[-1])
    assert used == 7
    for rows in (reference.gather(x, routing=r), reference.grouped_gemm_down(a, w2, routing=r)):
        assert rows.shape == (10, 3)
        assert rows[:used].all()
        assert not rows[used:].any()


def test_null_experts_and_dropped_ids_add_nothing() -> None:
    x, topk_weights, _, w1, w2, _ = operands("none")
    nothing = torch.tensor([[2, 4], [2, 2], [4, 4], [-1, 9], [2, -5]])
    out = reference.moe_mlp(x, topk_weights, nothing, w1, w2, layout=LAYOUT, activation="none")
    assert not out.any()
    for gradient in torch.autograd.grad(out.sum(), (x, topk_weights, w1, w2)):
        assert not gradient.any()


@pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
def test_no_tokens(activation: str) -> None:
    x, topk_weights, ids, w1, w2, w3 = operands(activation, ids=torch.zeros(0, 2, dtype=torch.int32))
    out = reference.moe_mlp(x, topk_weights, ids, w1, w2, w3, layout=LAYOUT, activation=activation)
    assert out.shape == (0, 3)
    leaves = [leaf for leaf in (x, topk_weights, w1, w2, w3) if leaf is not None]
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_with_its_token(activation: str) -> None:
    arguments = operands(activation)
    clean = reference.moe_mlp(*arguments, layout=LAYOUT, activation=activation)
    spoilt = arguments[0].detach().clone()
    spoilt[3] = torch.nan
    out = reference.moe_mlp(spoilt, *arguments[1:], layout=LAYOUT, activation=activation)
    others = torch.arange(5) != 3
    assert out[3].isnan().all()
    assert torch.equal(out[others], clean[others])


def test_nan_where_there_is_no_row_stays_there() -> None:
    r = routing()
    y, topk_weights = normal(10, 3).detach(), normal(5, 2).detach()
    clean = reference.scatter(y, topk_weights, routing=r)
    y[r.row_to_slot < 0] = torch.nan
    topk_weights[r.slot_to_row < 0] = torch.nan
    topk_weights.requires_grad_()
    out = reference.scatter(y, topk_weights, routing=r)
    assert torch.equal(out, clean)
    (gradient,) = torch.autograd.grad(out.sum(), topk_weights)
    assert not gradient[r.slot_to_row < 0].any()


@pytest.mark.parametrize("float_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(float_dtype: torch.dtype) -> None:
    """The output has x's dtype, each gradient that of its operand; sums over k are fp32."""
    x, topk_weights, ids, w1, w2, w3 = (
        t.detach().to(float_dtype).requires_grad_() if t.is_floating_point() else t for t in operands("swiglu")
    )
    topk_weights = topk_weights.detach().float().requires_grad_()
    out = reference.moe_mlp(x, topk_weights, ids, w1, w2, w3, layout=LAYOUT, activation="swiglu")
    assert out.dtype == float_dtype
    for leaf, gradient in zip((x, topk_weights), torch.autograd.grad(out.sum(), (x, topk_weights)), strict=True):
        assert gradient.dtype == leaf.dtype
    three = reference.route(torch.zeros(1, 3).int(), ExpertLayout((1,)))
    big = 2 / torch.finfo(float_dtype).eps  # big + 1 rounds to big
    y = torch.tensor([[big], [1.0], [-big]], dtype=float_dtype)
    if float_dtype != torch.float32:
        assert reference.scatter(y, torch.ones(1, 3), routing=three).item() == 1


def test_errors() -> None:
    x, topk_weights, ids, w1, w2, w3 = operands("swiglu")

    def call(w3: Tensor | None, activation: str) -> Tensor:
        return reference.moe_mlp(x, topk_weights, ids, w1, w2, w3, layout=LAYOUT, activation=activation)

    with pytest.raises(ValueError, match=r"activation: expected one of relu_squared.*, reglu, got 'swish'"):
        call(None, "swish")
    with pytest.raises(ValueError, match="activation: expected one of"):
        reference.activation(x.flatten(), routing=routing(), activation="")
    with pytest.raises(ValueError, match="w3: expected the up weights of a gated activation, got None"):
        call(None, "swiglu")
    with pytest.raises(ValueError, match="w3: expected None with an activation that is not gated, got a tensor"):
        call(w3, "silu")
    with pytest.raises(ValueError, match="b3: expected None with an activation that is not gated, got a tensor"):
        reference.grouped_gemm_up(x, w1, b3=w1[0], routing=routing(), activation="silu")
