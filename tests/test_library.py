"""The operators of torch.library: what their schemas, fakes and backwards promise, checked by PyTorch's own opcheck."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from triton_moe import functional
from triton_moe.activations import ACTIVATIONS, is_gated
from triton_moe.balancing import METHODS
from triton_moe.layout import ExpertLayout

pytest.importorskip("triton")
import triton_moe.ops.building_blocks
import triton_moe.ops.moe_layer
import triton_moe.ops.moe_mlp
import triton_moe.ops.router  # noqa: F401
from triton_moe.ops.library import Operator

# opcheck itself reads the gradients of tensors that are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
LAYOUT, T, H, K = ExpertLayout((16, 8, 5, 0)), 9, 12, 2
WITH_BACKWARD = (
    "gather", "scatter", "grouped_gemm_up", "grouped_gemm_down", "moe_mlp", "route_tokens", "moe_layer",
)  # fmt: skip
E, S = LAYOUT.num_experts, LAYOUT.total_width


@pytest.fixture(autouse=True)
def no_memory_is_left_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck compares every element of a result, and those between the blocks of a ragged buffer are unspecified."""

    def zeroed(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()

    for owner, name in ((torch, "empty"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, zeroed(getattr(owner, name)))


def normal(*shape: int, device: str, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) / 4).to(device).requires_grad_(requires_grad)


def ids(device: str) -> Tensor:
    """Some of them E: no expert."""
    return torch.randint(0, E + 1, (T, K), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).to(device)


def of_moe_mlp(activation: str, device: str, with_biases: bool) -> tuple:
    """What its operators take first."""
    x, w1, w2 = (normal(*shape, device=device) for shape in ((T, H), (H, S), (S, H)))
    w3 = normal(H, S, device=device) if is_gated(activation) else None
    weights = torch.rand(T, K, device=device, requires_grad=True)
    b1, b2, b3 = (normal(*shape, device=device) if with_biases else None for shape in ((S,), (E, H), (S,)))
    b3 = b3 if is_gated(activation) else None
    return x, weights, ids(device), w1, w2, w3, b1, b2, b3, LAYOUT.widths, activation


@pytest.mark.pairs
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moe_mlp(activation: str, with_biases: bool, trained: bool, device: str) -> None:
    arguments = of_moe_mlp(activation, device, with_biases)
    with torch.set_grad_enabled(trained):
        opcheck(torch.ops.triton_moe.moe_mlp.default, (*arguments, False, trained, "auto"))


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moe_mlp_inference(activation: str, with_biases: bool, device: str) -> None:
    arguments = of_moe_mlp(activation, device, with_biases)
    with torch.no_grad():
        opcheck(torch.ops.triton_moe.moe_mlp_inference.default, (*arguments, False, "auto"))


@pytest.mark.parametrize(("exact", "keep_pre"), [(True, True), (True, False), (False, False)])
def test_memory_options(exact: bool, keep_pre: bool, device: str) -> None:
    opcheck(torch.ops.triton_moe.moe_mlp.default, (*of_moe_mlp("swiglu", device, False), exact, keep_pre, "auto"))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_route_tokens(softmax: bool, with_bias: bool, device: str) -> None:
    x, weight = normal(T, H, device=device), normal(E, H, device=device)
    bias = normal(E, device=device, requires_grad=False) if with_bias else None
    options = (True, 2.5 if with_bias else 1.0, with_bias)
    opcheck(torch.ops.triton_moe.route_tokens.default, (x, weight, bias, LAYOUT.widths, K, softmax, *options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moe_layer(activation: str, device: str) -> None:
    x, _, _, *weights, widths, _ = of_moe_mlp(activation, device, activation == "gelu")
    router, bias = normal(E, H, device=device), normal(E, device=device, requires_grad=False)
    options = (K, activation == "gelu", True, 2.5, True, activation, False, True, "auto")
    opcheck(torch.ops.triton_moe.moe_layer.default, (x, router, bias, *weights, widths, *options))


@pytest.mark.parametrize("softmax", [False, True])
def test_moe_layer_inference(softmax: bool, device: str) -> None:
    x, _, _, *weights, widths, activation = of_moe_mlp("swiglu", device, softmax)
    router, bias = normal(E, H, device=device), normal(E, device=device, requires_grad=False)
    options = (widths, K, softmax, True, 2.5, True, activation, False, "auto")
    with torch.no_grad():
        opcheck(torch.ops.triton_moe.moe_layer_inference.default, (x, router, bias, *weights, *options))


def transposed(*shape: int, device: str) -> Tensor:
    return normal(*reversed(shape), device=device, requires_grad=False).t().requires_grad_()


def differentiable(device: str, activation: str = "swiglu") -> dict[str, tuple]:
    """Arguments of each operator with a backward, x, w1, w2 and w3 transposed in memory."""
    _, weights, topk_ids, *_, b1, b2, b3, widths, _ = of_moe_mlp(activation, device, True)
    x, w1, w2, w3 = (transposed(*shape, device=device) for shape in ((T, H), (H, S), (S, H), (H, S)))
    w3 = w3 if is_gated(activation) else None
    experts, router = (w1, w2, w3, b1, b2, b3, widths), (K, False, True, 2.5, True)
    router_weight, bias = normal(E, H, device=device), normal(E, device=device, requires_grad=False)
    routing = functional.route(topk_ids, LAYOUT, backend="triton")
    apart = (topk_ids, routing.packed, widths)
    rows, act = normal(T * K, H, device=device), normal(routing.ragged_numel(), device=device)
    return {
        "gather": (x, *apart),
        "scatter": (rows, weights, *apart),
        "grouped_gemm_up": (x, w1, w3, *apart, activation),
        "grouped_gemm_down": (act, w2, *apart),
        "moe_mlp": (x, weights, topk_ids, *experts, activation, False, True, "auto"),
        "route_tokens": (x, router_weight, bias, widths, *router),
        "moe_layer": (x, router_weight, bias, *experts, *router, activation, False, True, "auto"),
    }


def test_moe_layer_of_transposed_operands(device: str) -> None:
    arguments = differentiable(device)["moe_layer"]
    assert not any(operand.is_contiguous() for operand in (arguments[0], *arguments[3:6]))
    opcheck(torch.ops.triton_moe.moe_layer.default, arguments)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, columns or every second element apart."""
    if tensor.dim() > 1:
        return tensor.t().contiguous().t()
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_gradients_of_any_strides(name: str, device: str) -> None:
    arguments = differentiable(device)[name]
    leaves = [leaf for leaf in arguments if isinstance(leaf, Tensor) and leaf.requires_grad]
    results = getattr(torch.ops.triton_moe, name).default(*arguments)
    results = [result for result in ((results,) if isinstance(results, Tensor) else results) if result.requires_grad]
    grads = [normal(*result.shape, device=device, requires_grad=False) for result in results]
    given = [strided(grad) for grad in grads]
    assert all(grad.numel() == 1 or not grad.is_contiguous() for grad in given)
    found, expected = (torch.autograd.grad(results, leaves, of, retain_graph=True) for of in (given, grads))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("activation", ["swiglu", "relu_squared"])
@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_backward_operators(name: str, activation: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By themselves: with the operator's own check they run, but nothing is compared with their fakes."""
    calls: list[tuple] = []
    call = Operator.__call__

    def recorded(self: Operator, *arguments: Any, **eager_options: Any) -> Any:
        calls.append((self.overload, arguments))
        return call(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Operator, "__call__", recorded)
        results = getattr(torch.ops.triton_moe, name).default(*differentiable(device, activation)[name])
        results = (results,) if isinstance(results, Tensor) else results
        torch.stack([result.sum() for result in results if result.requires_grad]).sum().backward()
    ((operator, arguments),) = [call for call in calls if call[0]._schema.name.endswith("_backward")]
    assert operator._schema.name == f"triton_moe::{name}_backward"
    opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_building_blocks(device: str) -> None:
    """Forward by way of each operator, and with it, its backward."""
    operators = torch.ops.triton_moe
    topk_ids = ids(device)
    opcheck(operators.route.default, (topk_ids, LAYOUT.widths))
    routing = functional.route(topk_ids, LAYOUT, backend="triton")
    apart = (topk_ids, routing.packed, LAYOUT.widths)
    opcheck(operators.gather.default, (normal(T, H, device=device), *apart))
    opcheck(operators.scatter.default, (normal(T * K, H, device=device), torch.rand(T, K, device=device), *apart))
    act, w2 = normal(routing.ragged_numel(), device=device), normal(S, H, device=device)
    opcheck(operators.grouped_gemm_down.default, (act, w2, *apart))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grouped_gemm_up(activation: str, device: str) -> None:
    topk_ids, (x, w1, w3) = ids(device), (normal(*shape, device=device) for shape in ((T, H), (H, S), (H, S)))
    packed = functional.route(topk_ids, LAYOUT, backend="triton").packed
    arguments = (x, w1, w3 if is_gated(activation) else None, topk_ids, packed, LAYOUT.widths, activation)
    opcheck(torch.ops.triton_moe.grouped_gemm_up.default, arguments)


def test_expert_bias(device: str) -> None:
    bias, momentum = (normal(E, device=device, requires_grad=False) for _ in range(2))
    counts, load = torch.tensor([3, 1, 0, 4], device=device), torch.rand(E, device=device)
    operators = torch.ops.triton_moe
    opcheck(operators.keep_bias.default, (bias.clone(), bias))
    opcheck(operators.count_choices.default, (counts, load, T * K))
    for method in METHODS:
        opcheck(operators.move_bias_in_forward.default, (bias, momentum, counts, method, 0.1, 2.0, 0.5))


def test_every_operator_is_checked() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("triton_moe::")}
    backward = {f"{name}_backward" for name in WITH_BACKWARD}
    without_backward = {"route", "moe_mlp_inference", "moe_layer_inference"}
    without_backward |= {"keep_bias", "count_choices", "move_bias_in_forward"}
    assert names == {f"triton_moe::{name}" for name in {*WITH_BACKWARD} | backward | without_backward}
