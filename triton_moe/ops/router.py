"""The router on the kernels: two launches forward; one backward, and a product for the weight's gradient. The logits,
which would be T E numbers to keep, are formed again there.

Where the kernels do not multiply (see `kernels/router.py`) PyTorch does: once forward, twice more backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_moe.kernels.replay import replayed
from triton_moe.kernels.router import RouterOptions, multiplies, router_bwd, router_fwd
from triton_moe.layout import ExpertLayout
from triton_moe.ops.library import Operator, layout_of

_OPTIONS = (
    "int[] widths, int num_active_experts, bool softmax, bool normalize_weights, float weights_scale, bool aux_losses"
)


@functools.lru_cache(maxsize=256)
def _options(widths: tuple[int, ...], num_active_experts: int, *options: Any) -> RouterOptions:
    return RouterOptions(layout_of(widths), num_active_experts, *options)


def _out_of_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, without autocast, which would round what its products take and give."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        device_type = next(argument.device.type for argument in arguments if isinstance(argument, Tensor))
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(*arguments)
        return function(*arguments)

    return call


def _logits(x: Tensor, weight: Tensor) -> Tensor | None:
    """`x @ weight^T`: operands in x's dtype, result in fp32; None where the kernels form it."""
    if multiplies(x, weight.shape[0]):
        return None
    weight = weight.to(x.dtype).t()
    if x.dtype == torch.float32:
        return torch.mm(x, weight)
    if x.is_cuda:
        return torch.mm(x, weight, out_dtype=torch.float32)
    return torch.mm(x.float(), weight.float())


@replayed
@_out_of_autocast
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int], num_active_experts: int, *options: Any
) -> tuple[Tensor, ...]:
    """-> what `router_fwd` returns."""
    return router_fwd(_logits(x, weight), x, weight, bias, _options(tuple(widths), num_active_experts, *options))


def forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int], num_active_experts: int, *options: Any
) -> tuple[Tensor, ...]:
    num_tokens, num_experts, fp32 = x.shape[0], len(widths), torch.float32
    return (
        x.new_empty(num_tokens, num_active_experts),
        x.new_empty(num_tokens, num_active_experts, dtype=torch.int32),
        x.new_empty(num_experts),
        x.new_empty(num_experts, dtype=fp32),
        *(x.new_empty((), dtype=fp32) for _ in range(5)),
    )


def _dx_onto(dx: Tensor | None, dlogits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """dx plus `dlogits @ weight`, in place, or without a dx the product, in `dtype`."""
    weight = weight.to(dtype).to(dlogits.dtype)  # as the forward pass had it
    if dx is None:
        return torch.mm(dlogits, weight).to(dtype)
    if dx.dtype == dlogits.dtype:
        return dx.addmm_(dlogits, weight)
    return dx.add_(torch.mm(dlogits, weight).to(dtype))


@replayed
@_out_of_autocast
def gradients_onto(
    dx: Tensor | None, x: Tensor, weight: Tensor, topk_ids: Tensor, load: Tensor, dweights: Tensor | None,
    dz_loss: Tensor | None, dbalance: Tensor | None, dcompute: Tensor | None, needs: Sequence[bool],
    widths: Sequence[int], num_active_experts: int, *options: Any,
) -> list[Tensor]:  # fmt: skip
    """-> those of dx and dweight that are needed; where there is a dx already, what is needed of it is added to it."""
    options = _options(tuple(widths), num_active_experts, *options)
    # The losses' share of a logit's gradient goes like 1 / T, and float16 would lose it.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    need_x, need_weight = needs
    logits, total = _logits(x, weight), None
    if need_x and logits is None:
        total = x.new_empty(x.shape) if dx is None else dx
    dlosses = dz_loss, dbalance, dcompute
    dlogits = router_bwd(logits, x, weight, topk_ids, load, dweights, *dlosses, dtype, options, total, dx)
    if need_x and logits is not None:
        total = _dx_onto(dx, dlogits, weight, x.dtype)
    grads = [total] if dx is None and total is not None else []
    return [*grads, torch.mm(dlogits.t(), x.to(dtype)).to(weight.dtype)] if need_weight else grads


def gradients(*arguments: Any) -> list[Tensor]:
    """`gradients_onto` nothing, with the other arguments."""
    return gradients_onto(None, *arguments)


def gradients_fake(x: Tensor, weight: Tensor, *rest) -> list[Tensor]:
    need_x, need_weight = rest[6]
    return [x.new_empty(x.shape)] * need_x + [weight.new_empty(weight.shape)] * need_weight


_route_tokens_backward = Operator(
    "route_tokens_backward(Tensor x, Tensor weight, Tensor topk_ids, Tensor load, Tensor? dweights, Tensor? dz_loss, "
    f"Tensor? dbalance, Tensor? dcompute, bool[] needs, {_OPTIONS}) -> Tensor[]",
    gradients,
    gradients_fake,
)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, _, *ctx.options = inputs
    _, topk_ids, f, load, _, _, _, logits_abs_max, logits_mean = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(topk_ids, f, load, logits_abs_max, logits_mean)
    ctx.save_for_backward(x, weight, topk_ids, load)


def _backward(ctx, dweights, _dids, _df, _dload, dz_loss, dbalance, dcompute, *_):
    needs, aux_losses = ctx.needs_input_grad[:2], ctx.options[-1]
    dlosses = (dz_loss, dbalance, dcompute) if aux_losses else (None,) * 3
    grads = iter(_route_tokens_backward(*ctx.saved_tensors, dweights, *dlosses, needs, *ctx.options))
    return *(next(grads) if needed else None for needed in needs), *(None,) * 7


_route_tokens = Operator(
    f"route_tokens(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward,
    forward_fake,
    _setup_context,
    _backward,
)


def route_tokens(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: ExpertLayout, num_active_experts: int, router: str,
    normalize_weights: bool, weights_scale: float, aux_losses: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`triton_moe.router.route_tokens` on checked arguments: the fields of its result."""
    choice = router == "softmax", normalize_weights, float(weights_scale)
    return _route_tokens(x, weight, bias, layout.widths, num_active_experts, *choice, aux_losses)
