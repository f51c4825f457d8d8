"""The layer on the kernels: one autograd node, no gradient that nobody asked for, and for inference nothing kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_moe.kernels.bias import down_bias_bwd, up_bias_bwd, up_bias_partials
from triton_moe.kernels.decode import is_few, route_few
from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd, grouped_gemm_up_fwd
from triton_moe.kernels.grouped_gemm_bwd import grouped_gemm_dh, grouped_gemm_dw
from triton_moe.kernels.hopper import launch as hopper
from triton_moe.kernels.replay import give_back, owns_its_memory, replayed
from triton_moe.kernels.route import packed_numel, route, unpack
from triton_moe.kernels.scatter import scatter_fwd
from triton_moe.layout import ExpertLayout, Routing, ragged_numel
from triton_moe.ops.library import Operator, is_eager, layout_of
from triton_moe.ops.up_backward import up_backward


def _parts(w3: Tensor | None) -> int:
    """Values of a pre-activation for each of an activation."""
    return 1 if w3 is None else 2


def _output(
    x: Tensor, topk_weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None,
    b3: Tensor | None, routing: Routing, activation: str, act: Tensor, pre: Tensor | None,
) -> Tensor:  # fmt: skip
    """-> `(T, H)`. Fills act, and pre unless that is None."""
    grouped_gemm_up_fwd(x, w1, w3, act, pre, routing, activation, b1=b1, b3=b3)
    y = x.new_empty(routing.num_rows, x.shape[1])
    grouped_gemm_down_fwd(act, w2, None, y, routing, b=b2)
    return scatter_fwd(y, topk_weights, routing)


@replayed
def inference(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None,
    b2: Tensor | None, b3: Tensor | None, widths: Sequence[int], activation: str, exact: bool, backend: str,
) -> Tensor:  # fmt: skip
    """-> output `(T, H)`."""
    layout = layout_of(tuple(widths))
    panels = hopper.takes(topk_ids.numel(), layout, backend, w1, b1, b2, b3)
    few = not panels and is_few(topk_ids.numel(), layout)
    routing = route_few(topk_ids, layout) if few else route(topk_ids, layout, panels)
    act = x.new_empty(routing.read_ragged_numel() if exact and not few else routing.ragged_numel())
    return _output(x, topk_weights, w1, w2, w3, b1, b2, b3, routing, activation, act, None)


_moe_mlp_inference = Operator(
    "moe_mlp_inference(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w1, Tensor w2, Tensor? w3, Tensor? b1, "
    "Tensor? b2, Tensor? b3, int[] widths, str activation, bool exact, str backend) -> Tensor",
    inference,
    lambda x, *_: x.new_empty(x.shape),
)


@replayed
def forward(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None,
    b2: Tensor | None, b3: Tensor | None, widths: Sequence[int], activation: str, exact: bool, keep_pre: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> output `(T, H)`, the pre-activation (ragged; empty unless kept), the packed routing."""
    layout = layout_of(tuple(widths))
    routing = route(topk_ids, layout, hopper.takes(topk_ids.numel(), layout, backend, w1, b1, b2, b3))
    size = routing.read_ragged_numel() if exact else routing.ragged_numel()
    pre = x.new_empty(_parts(w3) * size) if keep_pre else None
    act = x.new_empty(size)
    out = _output(x, topk_weights, w1, w2, w3, b1, b2, b3, routing, activation, act, pre)
    assert routing.packed is not None
    return out, x.new_empty(0) if pre is None else pre, routing.packed


def forward_fake(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None,
    b2: Tensor | None, b3: Tensor | None, widths: Sequence[int], activation: str, exact: bool, keep_pre: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout, num_rows = layout_of(tuple(widths)), topk_ids.numel()
    size = _parts(w3) * ragged_numel(num_rows, layout)
    if exact and keep_pre:
        size = torch.library.get_ctx().new_dynamic_size(min=0)
    return (
        x.new_empty(x.shape),
        x.new_empty(size if keep_pre else 0),
        x.new_empty(packed_numel(num_rows, layout), dtype=torch.int32),
    )


def _is_largest(
    pre: Tensor, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, routing: Routing, needs: Sequence[bool]
) -> bool:
    """Whether the pre-activation beside its own gradient would be a backward's peak, not the rows of dx and all dw that
    are needed.

    Then the gradient takes its place: dh is 40% slower so (dev/LOG-2026-11-24.md, Hopper).
    """
    need_x, _, need_w1, need_w2, need_w3, *_ = needs
    behind_pre = pre.numel() + pre.numel() // _parts(w3)
    weights = (need_w1 + need_w3) * w1.numel() + need_w2 * w2.numel()
    return behind_pre > need_x * routing.num_rows * x.shape[1] + weights


@replayed
def gradients(
    dout: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None,
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, pre: Tensor, packed: Tensor, needs: Sequence[bool],
    widths: Sequence[int], activation: str, exact: bool, keep_pre: bool, backend: str, consume_pre: bool = False,
) -> list[Tensor]:  # fmt: skip
    """-> those of dx, dweights, dw1, dw2, dw3, db1, db2 and db3 that are needed. Unless it was kept, pre is computed
    once more.

    With `consume_pre` its memory is given back as soon as its gradient is known, and that gradient's before dx exists:
    less at the peak, and nothing left for a second backward.
    """
    layout = layout_of(tuple(widths))
    panels = hopper.takes(topk_ids.numel(), layout, backend, w1, b1, b2, b3)
    routing = unpack(packed, topk_ids, layout, panels=panels)
    if not keep_pre:
        pre = x.new_empty(_parts(w3) * (routing.read_ragged_numel() if exact else routing.ragged_numel()))
        grouped_gemm_up_fwd(x, w1, w3, None, pre, routing, activation, b1=b1, b3=b3)
    need_x, _, need_w1, need_w2, need_w3, need_b1, need_b2, need_b3 = needs
    consume_pre |= not keep_pre
    dpre = pre if consume_pre and _is_largest(pre, x, w1, w2, w3, routing, needs) else torch.empty_like(pre)
    partials = up_bias_partials(routing, _parts(w3), x.dtype) if need_b1 or need_b3 else None
    act_weighted, dweights = grouped_gemm_dh(dout, w2, pre, topk_weights, routing, activation, dpre, b2, partials)
    if consume_pre and dpre is not pre:
        give_back(pre)
    dw2 = None
    if need_w2:
        dw2 = torch.empty_like(w2)
        grouped_gemm_dw(dout, act_weighted, (dw2.t(),), routing)
    del act_weighted
    db1 = db3 = None
    if partials is not None:
        db1, db3 = up_bias_bwd(partials, routing, _parts(w3), x.dtype, need_b1, need_b3)
    db2 = down_bias_bwd(dout, topk_weights, routing) if need_b2 else None
    dx, dw1, dw3 = up_backward(dpre, x, w1, w3, routing, need_x, need_w1, need_w3, consume=True)
    grads = (dx, dweights, dw1, dw2, dw3, db1, db2, db3)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed and grad is not None]


def gradients_fake(
    dout: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None,
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, pre: Tensor, packed: Tensor, needs: Sequence[bool], *_,
) -> list[Tensor]:  # fmt: skip
    S, H = w2.shape
    grads = (
        lambda: x.new_empty(x.shape),
        lambda: topk_weights.new_empty(topk_weights.shape),
        lambda: torch.empty_like(w1),
        lambda: torch.empty_like(w2),
        lambda: torch.empty_like(w1),
        lambda: x.new_empty(S),
        lambda: x.new_empty(b2.shape[0], H),  # type: ignore[union-attr]
        lambda: x.new_empty(S),
    )
    return [grad() for grad, needed in zip(grads, needs, strict=True) if needed]


_moe_mlp_backward = Operator(
    "moe_mlp_backward(Tensor dout, Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w1, Tensor w2, Tensor? w3, "
    "Tensor? b1, Tensor? b2, Tensor? b3, Tensor pre, Tensor packed, bool[] needs, int[] widths, str activation, "
    "bool exact, bool keep_pre, str backend) -> Tensor[]",
    gradients,
    gradients_fake,
)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ctx.widths, ctx.activation, ctx.exact, ctx.keep_pre, ctx.backend = inputs
    _, pre, packed = output
    ctx.consumed = False
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre, packed)
    ctx.save_for_backward(*operands, pre, packed)


def _backward(ctx, dout, _dpre, _dpacked):
    """In eager calls the first one consumes the pre-activation, another (`retain_graph=True`) computes it anew."""
    if dout is None:
        return (None,) * 14
    saved = ctx.saved_tensors
    consume_pre = is_eager(ctx) and owns_its_memory(saved[-2])
    x, weights, _, *of_experts = ctx.needs_input_grad[:9]
    needs = (x, weights, *of_experts)
    options = ctx.widths, ctx.activation, ctx.exact, ctx.keep_pre and not ctx.consumed, ctx.backend
    ctx.consumed |= consume_pre
    grads = iter(_moe_mlp_backward(dout, *saved, needs, *options, consume_pre=consume_pre))
    dx, dweights, *of_experts = (next(grads) if needed else None for needed in needs)
    return dx, dweights, None, *of_experts, *(None,) * 5


_moe_mlp = Operator(
    "moe_mlp(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w1, Tensor w2, Tensor? w3, Tensor? b1, Tensor? b2, "
    "Tensor? b3, int[] widths, str activation, bool exact, bool keep_pre, str backend) -> (Tensor, Tensor, Tensor)",
    forward,
    forward_fake,
    _setup_context,
    _backward,
)


def moe_mlp(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None,
    b2: Tensor | None, b3: Tensor | None, layout: ExpertLayout, activation: str, activation_memory: str,
    recompute: bool, backend: str,
) -> Tensor:  # fmt: skip
    """`triton_moe.functional.moe_mlp` on checked arguments with `x (T, H)`."""
    operands = (x, topk_weights, topk_ids, w1, w2, w3, b1, b2, b3)
    exact = activation_memory == "exact"
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)):
        return _moe_mlp_inference(*operands, layout.widths, activation, exact, backend)
    return _moe_mlp(*operands, layout.widths, activation, exact, not recompute, backend)[0]
