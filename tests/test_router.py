import math
from typing import Any

import numpy
import pytest
import torch

from triton_moe import BiasBalancing, Experts, MoEConfig, MoEMLP
from triton_moe.layout import ExpertLayout
from triton_moe.router import (
    ROUTERS,
    GroupLimit,
    choose_experts,
    expand_null_row,
    router_logits,
    router_scores,
    select_experts,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _tensors(T=7, H=33, E=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator).to(dtype)
    weight = (torch.randn(E, H, generator=generator) / math.sqrt(H)).to(dtype)
    return x, weight


def _by_definition(x, weight, K, router, normalize, bias=None):
    """Loops over fp64 numbers: scores, and per token the chosen experts with their weights."""
    x, weight = x.double().tolist(), weight.double().tolist()
    scores, ids, weights = [], [], []
    for token in x:
        logits = [sum(a * b for a, b in zip(token, row, strict=True)) for row in weight]
        if router == "sigmoid":
            p = [1 / (1 + math.exp(-logit)) for logit in logits]
        else:
            p = [math.exp(logit) / sum(math.exp(other) for other in logits) for logit in logits]
        selection = p if bias is None else [a + b for a, b in zip(p, bias.tolist(), strict=True)]
        chosen = sorted(range(len(p)), key=lambda e: -selection[e])[:K]
        total = sum(p[e] for e in chosen) + 1e-20 if normalize else 1.0
        scores.append(p)
        ids.append(chosen)
        weights.append([p[e] / total for e in chosen])
    return torch.tensor(scores), torch.tensor(ids), torch.tensor(weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_exact_products_summed_in_fp32(dtype):
    x, weight = _tensors(dtype=dtype)
    logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-6)


def test_logits_take_the_weight_in_the_dtype_of_x():
    x, _ = _tensors(dtype=torch.bfloat16)
    _, weight = _tensors()
    assert torch.equal(router_logits(x, weight), router_logits(x, weight.bfloat16()))


def test_logits_of_fp64_stay_fp64():
    x, weight = _tensors(dtype=torch.float64)
    assert router_logits(x, weight).dtype == torch.float64


def test_autocast_does_not_round_the_logits():
    x, weight = _tensors()
    expected = router_logits(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router_logits(x, weight), expected)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("router", ROUTERS)
def test_choice_and_weights_match_the_definition(router, K, normalize, with_bias):
    x, weight = _tensors()
    bias = torch.tensor([0.9, -0.2, 0.0, 0.5, -0.7]) if with_bias else None
    out = choose_experts(x, weight, num_active_experts=K, router=router, normalize_weights=normalize, bias=bias)
    scores, ids, weights = _by_definition(x, weight, K, router, normalize, bias)
    assert torch.equal(out.topk_ids, ids)
    torch.testing.assert_close(out.probs, scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.topk_weights, weights, rtol=1e-5, atol=1e-6)


def test_a_bias_changes_the_choice_but_not_the_weights():
    x, weight = _tensors()
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0, 0.0])
    out = choose_experts(x, weight, num_active_experts=1, normalize_weights=False, bias=bias)
    assert (out.topk_ids == 3).all()
    assert torch.equal(out.topk_weights[:, 0], out.probs[:, 3])


def test_bias_of_zeros_is_no_bias_forward_and_backward():
    results = []
    for bias in (None, torch.zeros(5, requires_grad=True)):
        x, weight = (tensor.requires_grad_() for tensor in _tensors())
        out = choose_experts(x, weight, num_active_experts=2, bias=bias)
        out.topk_weights.square().sum().backward()
        assert bias is None or bias.grad is None
        results.append((*out, x.grad, weight.grad))
    for plain, biased in zip(*results, strict=True):
        assert torch.equal(plain, biased)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_the_formula(router, normalize):
    x, weight = (tensor.requires_grad_() for tensor in _tensors(T=4, H=6, dtype=torch.float64))

    def weights(x, weight):
        return choose_experts(x, weight, num_active_experts=2, router=router, normalize_weights=normalize).topk_weights

    assert torch.autograd.gradcheck(weights, (x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_have_the_dtype_of_x(dtype):
    out = choose_experts(*_tensors(dtype=dtype), num_active_experts=2)
    assert (out.logits.dtype, out.probs.dtype) == (torch.float32, torch.float32)
    assert (out.topk_weights.dtype, out.topk_ids.dtype) == (dtype, torch.int64)


def test_scores_that_underflow_give_finite_weights():
    out = choose_experts(torch.full((1, 1), -1e4), torch.ones(3, 1), num_active_experts=2)
    assert torch.equal(out.topk_weights, torch.zeros(1, 2))


def test_no_tokens():
    x, weight = _tensors(T=0)
    out = choose_experts(x, weight.requires_grad_(), num_active_experts=2)
    assert out.logits.shape == out.probs.shape == (0, 5)
    assert out.topk_weights.shape == out.topk_ids.shape == (0, 2)
    out.topk_weights.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("router", ["tanh", "", None])
def test_unknown_router(router):
    with pytest.raises(ValueError, match=r"router: expected one of sigmoid, softmax, got"):
        router_scores(torch.zeros(1, 2), router)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_groups", "active", "num_scores", "K"), [(4, 2, 2, 3), (3, 1, 1, 4), (6, 6, 2, 5)])
def test_group_limited_choice_is_its_definition(num_groups, active, num_scores, K, with_bias):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 12, generator=generator)
    bias = torch.randn(12, generator=generator) if with_bias else None
    ids = select_experts(scores, K, bias, GroupLimit(num_groups, active, num_scores))
    size = 12 // num_groups
    for row, chosen in zip((scores if bias is None else scores + bias).tolist(), ids.tolist(), strict=True):
        groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
        groups.sort(key=lambda members: -sum(sorted((row[e] for e in members), reverse=True)[:num_scores]))
        candidates = [e for members in groups[:active] for e in members]
        assert chosen == sorted(candidates, key=lambda e: -row[e])[:K]


def test_softmax_over_the_chosen_is_a_normalised_softmax():
    x, weight = _tensors()
    out = choose_experts(x, weight, num_active_experts=3, router="softmax")
    logits = x @ weight.t()
    chosen, ids = logits.topk(3)
    assert torch.equal(out.topk_ids, ids)
    torch.testing.assert_close(out.topk_weights, chosen.softmax(-1))


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_scale(normalize):
    x, weight = _tensors()
    plain, scaled = (
        choose_experts(x, weight, num_active_experts=2, normalize_weights=normalize, weights_scale=scale)
        for scale in (1, 2.5)
    )
    torch.testing.assert_close(scaled.topk_weights, 2.5 * plain.topk_weights)


@pytest.mark.parametrize(
    ("K", "groups", "message"),
    [
        (9, None, "num_active_experts: expected 1 to E = 8, got 9"),
        (0, None, "num_active_experts: expected 1 to E = 8, got 0"),
        (4, GroupLimit(4, 1), "num_active_groups: expected room for K = 4 experts in at most 4 groups of 2, got 1"),
        (2, GroupLimit(3, 1), "num_groups: expected a divisor of E = 8, got 3"),
    ],
)
def test_more_than_there_are_to_choose(K, groups, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        select_experts(torch.rand(3, 8), K, groups=groups)


@pytest.mark.parametrize("value", [2.0, "2", True, None, 0])
@pytest.mark.parametrize("name", ["num_groups", "num_active_groups", "num_scores"])
def test_groups_are_counted_in_integers(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected an integer of 1 or more, got {value!r}"):
        GroupLimit(**{"num_groups": 2, "num_active_groups": 1, name: value})


def test_integers_of_numpy_are_integers():
    GroupLimit(numpy.int64(2), numpy.int64(1)).check(4, 2)  # type: ignore[arg-type]
    Experts(ExpertLayout((8, 8)), numpy.int64(16))  # type: ignore[arg-type]
    BiasBalancing(speed=numpy.float32(1e-3))  # type: ignore[arg-type]
    names = ("num_active_experts", "hidden_size", "block_size", "shared_width")
    numbers: dict[str, Any] = {name: numpy.int64(2) for name in names}
    config = MoEConfig([(4, 8)], **numbers)
    assert all(type(getattr(config, name)) is int for name in names)
    assert MoEMLP(config)(torch.randn(5, 2))[0].shape == (5, 2)


def test_a_null_row_too_many():
    with pytest.raises(ValueError, match=r"^weight: expected 3 rows, the last for all null experts, got 4"):
        expand_null_row(torch.randn(4, 6), ExpertLayout((8, 8, 0, 0)))


def test_logits_under_torch_func():
    x, weight = _tensors(dtype=torch.float64)
    dlogits = torch.randn(7, 5, dtype=torch.float64)
    dweight = torch.func.grad(lambda w: (router_logits(x, w) * dlogits).sum())(weight)
    torch.testing.assert_close(dweight, dlogits.T @ x)


@pytest.mark.parametrize("widths", [(8, 8, 0, 0), (0, 8, 0, 0, 5, 0), (0, 3)])
def test_null_experts_share_a_row(widths):
    layout, real = ExpertLayout(widths), sum(width > 0 for width in widths)
    weight = torch.randn(real + 1, 6, requires_grad=True)
    expanded = expand_null_row(weight, layout)
    rows, row = [], 0
    for width in widths:
        rows.append(row if width else real)
        row += width > 0
    assert torch.equal(expanded, weight[rows])
    dout = torch.randn_like(expanded)
    expanded.backward(dout)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[real], dout[[e for e, width in enumerate(widths) if width == 0]].sum(0))
