"""The layer on the kernels: three launches after the routing's two, one autograd node, no gradient nobody asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd, grouped_gemm_up_fwd
from triton_moe.kernels.grouped_gemm_bwd import grouped_gemm_dh, grouped_gemm_dw
from triton_moe.kernels.scatter import scatter_fwd
from triton_moe.layout import Routing
from triton_moe.ops.first_order import first_order


def _forward(
    x: Tensor, topk_weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, routing: Routing, activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """-> output `(T, H)` and, if kept, the pre-activation (ragged)."""
    pre = x.new_empty(routing.ragged_numel(1 if w3 is None else 2)) if keep_pre else None
    act = x.new_empty(routing.ragged_numel())
    grouped_gemm_up_fwd(x, w1, w3, act, pre, routing, activation)
    y = x.new_empty(routing.num_rows, x.shape[1])
    grouped_gemm_down_fwd(act, w2, None, y, routing)
    return scatter_fwd(y, topk_weights, routing), pre


class _MoEMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_weights, w1, w2, w3, routing: Routing, activation: str):
        out, pre = _forward(x, topk_weights, w1, w2, w3, routing, activation, keep_pre=True)
        ctx.save_for_backward(x, topk_weights, w1, w2, w3, pre, routing.topk_ids)
        ctx.routing, ctx.activation = routing, activation
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        x, topk_weights, w1, w2, w3, pre, _ = ctx.saved_tensors  # raises if the ids were changed in place
        routing = ctx.routing
        need_x, _, need_w1, need_w2, need_w3 = ctx.needs_input_grad[:5]
        dpre, act_weighted, dweights = grouped_gemm_dh(dout, w2, pre, topk_weights, routing, ctx.activation)
        dx = dw1 = dw2 = dw3 = None
        if need_w2:
            dw2 = torch.empty_like(w2)
            grouped_gemm_dw(dout, act_weighted, dw2.t(), None, routing)
        del act_weighted
        if need_w1 or need_w3:
            dw1 = torch.empty_like(w1)
            dw3 = None if w3 is None else torch.empty_like(w1)
            grouped_gemm_dw(x, dpre, dw1, dw3, routing)
        if need_x:
            dx_rows = x.new_empty(routing.num_rows, x.shape[1])
            grouped_gemm_down_fwd(dpre, w1.t(), None if w3 is None else w3.t(), dx_rows, routing)
            dx = scatter_fwd(dx_rows, None, routing)
        return dx, dweights, dw1, dw2, dw3, None, None


def moe_mlp(
    x: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor | None = None,
    *,
    routing: Routing,
    activation: str,
) -> Tensor:
    """`triton_moe.functional.moe_mlp` on checked arguments with `x (T, H)` and the routing made."""
    operands = (x, topk_weights, w1, w2, w3)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        return _MoEMLP.apply(*operands, routing, activation)  # type: ignore[return-value]
    return _forward(*operands, routing, activation, keep_pre=False)[0]
