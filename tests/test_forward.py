"""moe_mlp on the kernels: the output, whatever the shape, the strides and the dtypes of what comes in."""

import dataclasses

import pytest
import torch

from operators import inputs_for
from triton_moe import ExpertLayout, moe_mlp, reference
from triton_moe.testing import CASES, Case, poison_empty, run

CASE = Case(21, 24, (16, 5, 0, 33), 3, "swiglu", reason="the usual")


def call(inputs, **changes):
    arguments = {
        "x": inputs.x, "topk_weights": inputs.topk_weights, "topk_ids": inputs.topk_ids, "w1": inputs.w1,
        "w2": inputs.w2, "w3": inputs.w3, "layout": inputs.layout, "activation": inputs.activation, "backend": "triton",
    }  # fmt: skip
    return moe_mlp(**{**arguments, **changes})


@pytest.mark.parametrize("shape", [(21, 24), (3, 7, 24), (1, 3, 7, 24)])
def test_any_rank(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(CASE, dtype, device)
    out = call(inputs, x=inputs.x.view(shape))
    assert out.shape == shape
    assert out.dtype == dtype
    torch.testing.assert_close(out.view(21, 24), call(inputs), rtol=0, atol=0)


def test_one_token_of_rank_one(device: str) -> None:
    inputs = inputs_for(CASE, torch.float32, device)
    out = call(inputs, x=inputs.x[0], topk_weights=inputs.topk_weights[:1], topk_ids=inputs.topk_ids[:1])
    torch.testing.assert_close(out, call(inputs)[0])


def test_any_strides(device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(CASE, dtype, device)
    expected = call(inputs)
    wide = torch.full((21, 60), torch.nan, dtype=dtype, device=device)
    wide[:, 7:31] = inputs.x
    assert torch.equal(call(inputs, x=wide[:, 7:31]), expected)
    assert torch.equal(call(inputs, x=inputs.x.t().contiguous().t()), expected)
    turned = {
        "topk_weights": inputs.topk_weights.t().contiguous().t(),
        "topk_ids": inputs.topk_ids.t().contiguous().t(),
    }
    assert torch.equal(call(inputs, **turned), expected)


def test_int64_ids_and_narrow_weights(device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(CASE, dtype, device)
    narrow = inputs.topk_weights.to(dtype)
    expected = call(inputs, topk_weights=narrow.float())
    assert torch.equal(call(inputs, topk_weights=narrow, topk_ids=inputs.topk_ids.long()), expected)


def test_nan_reaches_its_own_token_only(device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(CASE, dtype, device)
    clean, spoilt = call(inputs), inputs.x.clone()
    spoilt[4] = torch.nan
    out = call(inputs, x=spoilt)
    owns_rows = torch.tensor(inputs.layout.widths, device=device)[inputs.topk_ids[4].long()].gt(0).any()
    assert owns_rows
    assert out[4].isnan().all()
    others = torch.arange(21, device=device) != 4
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("activation", ["relu", "relu_squared", "gelu", "silu", "reglu"])
def test_activations_pass_nan_on(activation: str, device: str) -> None:
    inputs = inputs_for(Case(3, 8, (8, 8), 1, activation, reason="NaN"), torch.float32, device)
    out = call(inputs, x=torch.full_like(inputs.x, torch.nan))
    assert out.isnan().all()


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same(device: str, dtype: torch.dtype) -> None:
    """But for a few tokens, which have tiles of their own (tests/test_decode.py)."""
    inputs = inputs_for(dataclasses.replace(CASE, num_tokens=23), dtype, device)
    tracked = call(inputs, w1=inputs.w1.clone().requires_grad_())
    assert tracked.grad_fn is not None
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = call(inputs, w1=inputs.w1.clone().requires_grad_())
        assert out.grad_fn is None
        assert torch.equal(out, tracked)
    again = call(inputs, w1=inputs.w1.clone().requires_grad_())  # what inference cached serves training
    again.sum().backward()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_plain_backend_is_the_oracle(case: Case) -> None:
    inputs = inputs_for(case, torch.float64, "cpu", weights_dtype=torch.float64)
    actual, expected = run(moe_mlp, inputs), run(reference.moe_mlp, inputs)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_all_null_but_one(device: str) -> None:
    """Tokens whose experts are all null get exact zeros."""
    layout = ExpertLayout((0, 0, 4))
    x, w1, w2 = torch.ones(2, 3, device=device), torch.ones(3, 4, device=device), torch.ones(4, 3, device=device)
    ids = torch.tensor([[0, 1], [1, 2]], device=device)
    with poison_empty():
        out = moe_mlp(
            x, torch.ones(2, 2, device=device), ids, w1, w2, layout=layout, activation="none", backend="triton"
        )
    assert torch.equal(out, torch.tensor([[0.0] * 3, [12.0] * 3], device=device))
