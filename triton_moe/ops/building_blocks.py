"""The building blocks on the kernels, each differentiable by itself. `moe_mlp` fuses more; these compose freely."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_moe.kernels.activation import activation_bwd
from triton_moe.kernels.gather import gather_fwd
from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd, grouped_gemm_up_fwd
from triton_moe.kernels.grouped_gemm_bwd import grouped_gemm_dw
from triton_moe.kernels.scatter import scatter_bwd_weights, scatter_fwd
from triton_moe.layout import Routing
from triton_moe.ops.first_order import first_order


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, routing: Routing):
        ctx.routing = routing
        return gather_fwd(x, None, routing)

    @staticmethod
    @first_order
    def backward(ctx, drows):
        return scatter_fwd(drows, None, ctx.routing), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, topk_weights, routing: Routing):
        ctx.save_for_backward(y, topk_weights)
        ctx.routing = routing
        return scatter_fwd(y, topk_weights, routing)

    @staticmethod
    @first_order
    def backward(ctx, dout):
        y, topk_weights = ctx.saved_tensors
        need_y, need_weights, _ = ctx.needs_input_grad
        dy = gather_fwd(dout, topk_weights, ctx.routing) if need_y else None
        dweights = scatter_bwd_weights(dout, y, ctx.routing, topk_weights.dtype) if need_weights else None
        return dy, dweights, None


class _GroupedGemmUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w3, routing: Routing, activation: str):
        out = x.new_zeros(routing.ragged_numel())
        pre = x.new_empty(routing.ragged_numel(1 if w3 is None else 2))
        grouped_gemm_up_fwd(x, w1, w3, out, pre, routing, activation)
        ctx.save_for_backward(x, w1, w3, pre)
        ctx.routing, ctx.activation = routing, activation
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        x, w1, w3, pre = ctx.saved_tensors
        need_x, need_w1, need_w3 = ctx.needs_input_grad[:3]
        dpre = activation_bwd(pre, dout, ctx.routing, ctx.activation)
        dx = dw1 = dw3 = None
        if need_w1 or need_w3:
            dw1 = torch.empty_like(w1)
            dw3 = None if w3 is None else torch.empty_like(w1)
            grouped_gemm_dw(x, dpre, dw1, dw3, ctx.routing)
        if need_x:
            dx_rows = x.new_empty(ctx.routing.num_rows, x.shape[1])
            grouped_gemm_down_fwd(dpre, w1.t(), None if w3 is None else w3.t(), dx_rows, ctx.routing)
            dx = scatter_fwd(dx_rows, None, ctx.routing)
        return dx, dw1, dw3, None, None


class _GroupedGemmDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_up, w2, routing: Routing):
        ctx.save_for_backward(x_up, w2)
        ctx.routing = routing
        y = x_up.new_zeros(routing.num_rows, w2.shape[1])
        grouped_gemm_down_fwd(x_up.contiguous(), w2, None, y, routing)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x_up, w2 = ctx.saved_tensors
        dx_up = dw2 = None
        if ctx.needs_input_grad[0]:
            dx_up = torch.zeros_like(x_up)
            grouped_gemm_up_fwd(dy, w2.t(), None, dx_up, None, ctx.routing, "none", gathered=False)
        if ctx.needs_input_grad[1]:
            dw2 = torch.empty_like(w2)
            grouped_gemm_dw(dy, x_up.contiguous(), dw2.t(), None, ctx.routing, gathered=False)
        return dx_up, dw2, None


def gather(x: Tensor, *, routing: Routing) -> Tensor:
    return _Gather.apply(x, routing)  # type: ignore[return-value]


def scatter(y: Tensor, topk_weights: Tensor, *, routing: Routing) -> Tensor:
    return _Scatter.apply(y, topk_weights, routing)  # type: ignore[return-value]


def grouped_gemm_up(x: Tensor, w1: Tensor, w3: Tensor | None = None, *, routing: Routing, activation: str) -> Tensor:
    return _GroupedGemmUp.apply(x, w1, w3, routing, activation)  # type: ignore[return-value]


def grouped_gemm_down(x_up: Tensor, w2: Tensor, *, routing: Routing) -> Tensor:
    return _GroupedGemmDown.apply(x_up, w2, routing)  # type: ignore[return-value]
