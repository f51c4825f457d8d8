"""The building blocks on the kernels, each differentiable by itself. `moe_mlp` fuses more; these compose freely.

As operators they take a routing apart: ids, packed tensor, widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triton_moe.kernels.activation import activation_bwd
from triton_moe.kernels.gather import gather_fwd
from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd, grouped_gemm_up_fwd
from triton_moe.kernels.grouped_gemm_bwd import grouped_gemm_dw
from triton_moe.kernels.route import packed_numel, trimmed, unpack
from triton_moe.kernels.route import route as route_fwd
from triton_moe.kernels.scatter import scatter_bwd_weights, scatter_fwd
from triton_moe.layout import ExpertLayout, Routing, ragged_numel
from triton_moe.ops.library import Operator, layout_of
from triton_moe.ops.up_backward import up_backward

_ROUTING = "Tensor topk_ids, Tensor packed, int[] widths"


def _apart(routing: Routing) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    assert routing.packed is not None
    return routing.topk_ids, routing.packed, routing.layout.widths


def _whole(topk_ids: Tensor, packed: Tensor, widths: Sequence[int]) -> Routing:
    """A routing for the portable kernels alone: of the Hopper kernels only one at a time may run on a routing, and who
    holds one may use it on two streams."""
    return unpack(packed, topk_ids, layout_of(tuple(widths)))


def _save_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.widths = inputs
    ctx.save_for_backward(*tensors)


def _backward_of(operator: Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward pass of an operator of two tensors and a routing, which has `_save_inputs`; `operator` returns those
    of the two gradients that are needed."""

    def backward(ctx, dout: Tensor):
        needs = ctx.needs_input_grad[:2]
        grads = iter(operator(dout, *ctx.saved_tensors, needs, ctx.widths))
        return *(next(grads) if needed else None for needed in needs), None, None, None

    return backward


# route


def _route(topk_ids: Tensor, widths: Sequence[int]) -> Tensor:
    packed = route_fwd(topk_ids, layout_of(tuple(widths))).packed
    assert packed is not None
    return packed


def _route_fake(topk_ids: Tensor, widths: Sequence[int]) -> Tensor:
    return topk_ids.new_empty(packed_numel(topk_ids.numel(), layout_of(tuple(widths))), dtype=torch.int32)


_route_op = Operator("route(Tensor topk_ids, int[] widths) -> Tensor", _route, _route_fake)


def route(topk_ids: Tensor, layout: ExpertLayout) -> Routing:
    return trimmed(_route_op(topk_ids, layout.widths), topk_ids, layout)


# gather


def _gather_setup(ctx, inputs: tuple, output: Tensor) -> None:
    _, topk_ids, packed, ctx.widths = inputs
    ctx.save_for_backward(topk_ids, packed)


def _gather_backward(ctx, drows: Tensor):
    return _gather_backward_op(drows, *ctx.saved_tensors, ctx.widths), None, None, None


_gather_backward_op = Operator(
    f"gather_backward(Tensor drows, {_ROUTING}) -> Tensor",
    lambda drows, *routing: scatter_fwd(drows, None, _whole(*routing)),
    lambda drows, topk_ids, *_: drows.new_empty(topk_ids.shape[0], drows.shape[1]),
)
_gather_op = Operator(
    f"gather(Tensor x, {_ROUTING}) -> Tensor",
    lambda x, *routing: gather_fwd(x, None, _whole(*routing)),
    lambda x, topk_ids, *_: x.new_empty(topk_ids.numel(), x.shape[1]),
    _gather_setup,
    _gather_backward,
)


def gather(x: Tensor, *, routing: Routing) -> Tensor:
    return _gather_op(x, *_apart(routing))


# scatter


def _scatter_backward_impl(
    dout: Tensor, y: Tensor, topk_weights: Tensor, topk_ids: Tensor, packed: Tensor, needs: Sequence[bool],
    widths: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """-> those of dy and dweights that are needed."""
    routing, grads = _whole(topk_ids, packed, widths), []
    if needs[0]:
        grads.append(gather_fwd(dout, topk_weights, routing))
    if needs[1]:
        grads.append(scatter_bwd_weights(dout, y, routing, topk_weights.dtype))
    return grads


_scatter_backward_op = Operator(
    "scatter_backward(Tensor dout, Tensor y, Tensor topk_weights, Tensor topk_ids, Tensor packed, bool[] needs, "
    "int[] widths) -> Tensor[]",
    _scatter_backward_impl,
    lambda dout, y, topk_weights, topk_ids, packed, needs, widths: (
        [y.new_empty(y.shape)] * needs[0] + [topk_weights.new_empty(topk_weights.shape)] * needs[1]
    ),
)
_scatter_op = Operator(
    f"scatter(Tensor y, Tensor topk_weights, {_ROUTING}) -> Tensor",
    lambda y, topk_weights, *routing: scatter_fwd(y, topk_weights, _whole(*routing)),
    lambda y, topk_weights, *_: y.new_empty(topk_weights.shape[0], y.shape[1]),
    _save_inputs,
    _backward_of(_scatter_backward_op),
)


def scatter(y: Tensor, topk_weights: Tensor, *, routing: Routing) -> Tensor:
    return _scatter_op(y, topk_weights, *_apart(routing))


# grouped_gemm_up


def _up(
    x: Tensor, w1: Tensor, w3: Tensor | None, topk_ids: Tensor, packed: Tensor, widths: Sequence[int], activation: str
) -> tuple[Tensor, Tensor]:
    routing = _whole(topk_ids, packed, widths)
    out = x.new_zeros(routing.ragged_numel())
    pre = x.new_empty(routing.ragged_numel(1 if w3 is None else 2))
    grouped_gemm_up_fwd(x, w1, w3, out, pre, routing, activation)
    return out, pre


def _up_fake(
    x: Tensor, w1: Tensor, w3: Tensor | None, topk_ids: Tensor, packed: Tensor, widths: Sequence[int], activation: str
) -> tuple[Tensor, Tensor]:
    size = ragged_numel(topk_ids.numel(), layout_of(tuple(widths)))
    return x.new_empty(size), x.new_empty(size if w3 is None else 2 * size)


def _up_setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.widths, ctx.activation = inputs
    ctx.set_materialize_grads(False)  # of the pre-activation, which has none
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _up_backward(ctx, dout: Tensor, _):
    if dout is None:
        return (None,) * 7
    needs = ctx.needs_input_grad[:3]
    grads = iter(_up_backward_op(dout, *ctx.saved_tensors, needs, ctx.widths, ctx.activation))
    return *(next(grads) if needed else None for needed in needs), None, None, None, None


def _up_backward_impl(
    dout: Tensor, x: Tensor, w1: Tensor, w3: Tensor | None, topk_ids: Tensor, packed: Tensor, pre: Tensor,
    needs: Sequence[bool], widths: Sequence[int], activation: str,
) -> list[Tensor]:  # fmt: skip
    """-> those of dx, dw1 and dw3 that are needed."""
    routing = _whole(topk_ids, packed, widths)
    dpre = activation_bwd(pre, dout, routing, activation)
    grads = up_backward(dpre, x, w1, w3, routing, *needs)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed and grad is not None]


def _up_backward_fake(dout: Tensor, x: Tensor, w1: Tensor, *rest) -> list[Tensor]:
    needs = rest[4]
    grads = (lambda: x.new_empty(x.shape), lambda: torch.empty_like(w1), lambda: torch.empty_like(w1))
    return [grad() for grad, needed in zip(grads, needs, strict=True) if needed]


_up_backward_op = Operator(
    "grouped_gemm_up_backward(Tensor dout, Tensor x, Tensor w1, Tensor? w3, Tensor topk_ids, Tensor packed, "
    "Tensor pre, bool[] needs, int[] widths, str activation) -> Tensor[]",
    _up_backward_impl,
    _up_backward_fake,
)
_up_op = Operator(
    f"grouped_gemm_up(Tensor x, Tensor w1, Tensor? w3, {_ROUTING}, str activation) -> (Tensor, Tensor)",
    _up,
    _up_fake,
    _up_setup,
    _up_backward,
)


def grouped_gemm_up(x: Tensor, w1: Tensor, w3: Tensor | None = None, *, routing: Routing, activation: str) -> Tensor:
    return _up_op(x, w1, w3, *_apart(routing), activation)[0]


# grouped_gemm_down


def _down(x_up: Tensor, w2: Tensor, *routing) -> Tensor:
    whole = _whole(*routing)
    y = x_up.new_zeros(whole.num_rows, w2.shape[1])
    grouped_gemm_down_fwd(x_up.contiguous(), w2, None, y, whole, finite=False)
    return y


def _down_backward_impl(
    dy: Tensor, x_up: Tensor, w2: Tensor, topk_ids: Tensor, packed: Tensor, needs: Sequence[bool],
    widths: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """-> those of dx_up and dw2 that are needed."""
    routing, grads = _whole(topk_ids, packed, widths), []
    if needs[0]:
        dx_up = x_up.new_zeros(x_up.shape)
        grouped_gemm_up_fwd(dy, w2.t(), None, dx_up, None, routing, "none", gathered=False)
        grads.append(dx_up)
    if needs[1]:
        dw2 = torch.empty_like(w2)
        grouped_gemm_dw(dy, x_up.contiguous(), (dw2.t(),), routing, gathered=False)
        grads.append(dw2)
    return grads


_down_backward_op = Operator(
    "grouped_gemm_down_backward(Tensor dy, Tensor x_up, Tensor w2, Tensor topk_ids, Tensor packed, bool[] needs, "
    "int[] widths) -> Tensor[]",
    _down_backward_impl,
    lambda dy, x_up, w2, topk_ids, packed, needs, widths: (
        [x_up.new_empty(x_up.shape)] * needs[0] + [torch.empty_like(w2)] * needs[1]
    ),
)
_down_op = Operator(
    f"grouped_gemm_down(Tensor x_up, Tensor w2, {_ROUTING}) -> Tensor",
    _down,
    lambda x_up, w2, topk_ids, *_: x_up.new_empty(topk_ids.numel(), w2.shape[1]),
    _save_inputs,
    _backward_of(_down_backward_op),
)


def grouped_gemm_down(x_up: Tensor, w2: Tensor, *, routing: Routing) -> Tensor:
    return _down_op(x_up, w2, *_apart(routing))
