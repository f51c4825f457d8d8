"""scatter against the oracle: weighted sum over K, gradients of rows and weights."""

import pytest
import torch

from operators import check_operator, inputs_for, routings, unit
from triton_moe import ExpertLayout, functional
from triton_moe.functional import route, scatter_autograd
from triton_moe.ops import building_blocks
from triton_moe.testing import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_scatter(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(case, dtype, device)
    y = unit((case.num_tokens * case.top_k, case.hidden_size), inputs.x, seed=2)
    check_operator("scatter", [y, inputs.topk_weights], inputs.dout, inputs)


def test_weights_in_the_dtype_of_x(device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(CASES[-1], dtype, device, weights_dtype=dtype)
    y = unit((inputs.topk_ids.numel(), inputs.x.shape[1]), inputs.x, seed=2)
    check_operator("scatter", [y, inputs.topk_weights], inputs.dout, inputs)


@pytest.mark.parametrize(("needed", "launched"), [("y", ["gather_fwd"]), ("weights", ["scatter_bwd_weights"])])
def test_only_the_gradient_asked_for_is_computed(
    needed: str, launched: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("gather_fwd", "scatter_bwd_weights"):
        function = getattr(building_blocks, name)
        monkeypatch.setattr(
            building_blocks, name, lambda *args, name=name, f=function: (called.append(name), f(*args))[1]
        )
    layout, ids = ExpertLayout((16, 24)), torch.tensor([[0], [1], [1]], dtype=torch.int32, device=device)
    y = torch.randn(3, 16, device=device, requires_grad=needed == "y")
    weights = torch.rand(3, 1, device=device, requires_grad=needed == "weights")
    scatter_autograd(y, weights, routing=route(ids, layout, backend="triton")).sum().backward()
    assert called == launched
    leaf = y if needed == "y" else weights
    assert leaf.grad is not None
    assert leaf.grad.any()


def test_rows_without_a_slot_are_never_read(device: str) -> None:
    """A dropped slot's weight and the rows past the last may hold NaN."""
    case = next(case for case in CASES if (inputs_for(case, torch.float32, "cpu").topk_ids == len(case.widths)).any())
    inputs = inputs_for(case, torch.float32, device)
    routing, _ = routings(inputs)
    dropped = routing.slot_to_row < 0
    y = torch.ones(routing.num_rows, 5, device=device)
    y[routing.row_to_slot < 0] = torch.nan
    weights = inputs.topk_weights.masked_fill(dropped, torch.nan)
    out = functional.scatter(y, weights, routing=routing)
    expected = inputs.topk_weights.masked_fill(dropped, 0).sum(1, keepdim=True).expand(-1, 5)
    torch.testing.assert_close(out, expected)
