"""Router and experts in one operator: `ops/router.py` and `ops/moe_mlp.py`, one after the other and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from triton_moe.kernels.replay import owns_its_memory, replayed
from triton_moe.ops import moe_mlp as experts
from triton_moe.ops import router
from triton_moe.ops.library import Operator, is_eager

_OF_ROUTER = 5
"""Options that are the router's; the others are the experts'."""
_WEIGHTS = "Tensor router_weight, Tensor? bias, Tensor w1, Tensor w2, Tensor? w3, Tensor? b1, Tensor? b2, Tensor? b3"
_OPTIONS_BUT_LAST = (
    "int[] widths, int num_active_experts, bool softmax, bool normalize_weights, float weights_scale, "
    "bool aux_losses, str activation, bool exact, "
)
_OPTIONS = f"{_OPTIONS_BUT_LAST} bool keep_pre, str backend"


@replayed
def _inference(
    x: Tensor, router_weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, w3: Tensor | None,
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, widths: Sequence[int], *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> output, what the router returns."""
    routed = router.forward(x, router_weight, bias, widths, *options[:_OF_ROUTER])
    weights = w1, w2, w3, b1, b2, b3
    return experts.inference(x, routed[0], routed[1], *weights, widths, *options[_OF_ROUTER:]), *routed


def _inference_fake(
    x: Tensor, router_weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, w3: Tensor | None,
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, widths: Sequence[int], *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return x.new_empty(x.shape), *router.forward_fake(x, router_weight, bias, widths, *options[:_OF_ROUTER])


moe_layer_inference = Operator(
    f"moe_layer_inference(Tensor x, {_WEIGHTS}, {_OPTIONS_BUT_LAST} str backend) -> ("
    + ", ".join(["Tensor"] * 10)
    + ")",
    _inference,
    _inference_fake,
)
"""Arguments, checked: see the schema. -> output, the fields of a `RouterOutput`."""


@replayed
def _forward(
    x: Tensor, router_weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, w3: Tensor | None,
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, widths: Sequence[int], *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> output, what the router returns, the pre-activation, the packed routing."""
    routed = router.forward(x, router_weight, bias, widths, *options[:_OF_ROUTER])
    weights = w1, w2, w3, b1, b2, b3
    activation, exact, keep_pre, backend = options[_OF_ROUTER:]
    out, pre, packed = experts.forward(x, routed[0], routed[1], *weights, widths, activation, exact, keep_pre, backend)
    return out, *routed, pre, packed


def _forward_fake(
    x: Tensor, router_weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, w3: Tensor | None,
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, widths: Sequence[int], *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    routed = router.forward_fake(x, router_weight, bias, widths, *options[:_OF_ROUTER])
    weights = w1, w2, w3, b1, b2, b3
    activation, exact, keep_pre, backend = options[_OF_ROUTER:]
    out, pre, packed = experts.forward_fake(
        x, routed[0], routed[1], *weights, widths, activation, exact, keep_pre, backend
    )
    return out, *routed, pre, packed


@replayed
def _gradients(
    dout: Tensor | None, dz_loss: Tensor | None, dbalance: Tensor | None, dcompute: Tensor | None, x: Tensor,
    router_weight: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None,
    b3: Tensor | None, topk_weights: Tensor, topk_ids: Tensor, load: Tensor, pre: Tensor, packed: Tensor,
    needs: Sequence[bool], widths: Sequence[int], *options: Any, consume_pre: bool = False,
) -> list[Tensor]:  # fmt: skip
    """-> those of dx, drouter_weight, dw1, dw2, dw3, db1, db2 and db3 that are needed; without dout, of the first two.

    `consume_pre` as in `moe_mlp.gradients`.
    """
    need_x, need_router, *need_weights = needs
    dx = dweights = None
    of_experts: list[Tensor] = []
    if dout is not None:
        needed = need_x, need_x or need_router, *need_weights
        operands = x, topk_weights, topk_ids, w1, w2, w3, b1, b2, b3, pre, packed
        activation, exact, keep_pre, backend = options[_OF_ROUTER:]
        of_experts = experts.gradients(
            dout, *operands, needed, widths, activation, exact, keep_pre, backend, consume_pre
        )
        dx = of_experts.pop(0) if need_x else None
        dweights = of_experts.pop(0) if need_x or need_router else None
    of_router: list[Tensor] = []
    if need_x or need_router:
        scores = x, router_weight, topk_ids, load
        needed = need_x, need_router
        losses = dz_loss, dbalance, dcompute
        of_router = router.gradients_onto(dx, *scores, dweights, *losses, needed, widths, *options[:_OF_ROUTER])
    return ([] if dx is None else [dx]) + of_router + of_experts


def _gradients_fake(
    dout: Tensor | None, dz_loss: Tensor | None, dbalance: Tensor | None, dcompute: Tensor | None, x: Tensor,
    router_weight: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None,
    b3: Tensor | None, topk_weights: Tensor, topk_ids: Tensor, load: Tensor, pre: Tensor, packed: Tensor,
    needs: Sequence[bool], *_: Any,
) -> list[Tensor]:  # fmt: skip
    need_x, need_router, *need_weights = needs
    grads = [x.new_empty(x.shape)] * need_x + [router_weight.new_empty(router_weight.shape)] * need_router
    if dout is None:
        return grads
    operands = x, topk_weights, topk_ids, w1, w2, w3, b1, b2, b3, pre, packed
    return grads + experts.gradients_fake(dout, *operands, (False, False, *need_weights))


_moe_layer_backward = Operator(
    "moe_layer_backward(Tensor? dout, Tensor? dz_loss, Tensor? dbalance, Tensor? dcompute, Tensor x, Tensor "
    "router_weight, Tensor w1, Tensor w2, Tensor? w3, Tensor? b1, Tensor? b2, Tensor? b3, Tensor topk_weights, "
    f"Tensor topk_ids, Tensor load, Tensor pre, Tensor packed, bool[] needs, {_OPTIONS}) -> Tensor[]",
    _gradients,
    _gradients_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, router_weight, _, *weights = inputs[:9]
    ctx.widths, *ctx.options = inputs[9:]
    _, topk_weights, topk_ids, f, load, *losses, logits_abs_max, logits_mean, pre, packed = output
    ctx.consumed = False
    ctx.set_materialize_grads(False)
    saved = topk_weights, topk_ids, load, pre, packed
    constant = () if any(ctx.needs_input_grad[:2]) else losses
    ctx.mark_non_differentiable(f, logits_abs_max, logits_mean, *saved, *constant)
    ctx.save_for_backward(x, router_weight, *weights, *saved)


def _backward(ctx: Any, dout: Tensor | None, *dothers: Tensor | None) -> tuple[Tensor | None, ...]:
    """As `moe_mlp`'s: the first consumes the pre-activation, another (`retain_graph=True`) computes it anew."""
    *router, activation, exact, keep_pre, backend = ctx.options
    aux_losses = router[-1]
    dlosses = dothers[4:7] if aux_losses else (None,) * 3
    need_x, need_router, _, *need_weights = ctx.needs_input_grad[:9]
    if dout is None:
        need_weights = [False] * len(need_weights)
        if all(dloss is None for dloss in dlosses):
            return (None,) * 19
    saved = ctx.saved_tensors
    consume_pre = is_eager(ctx) and dout is not None and owns_its_memory(saved[-2])
    options = *router, activation, exact, keep_pre and not ctx.consumed, backend
    ctx.consumed |= consume_pre
    needs = (need_x, need_router, *need_weights)
    operands = dout, *dlosses, *saved
    grads = iter(_moe_layer_backward(*operands, needs, ctx.widths, *options, consume_pre=consume_pre))
    dx, drouter, *dweights = (next(grads) if needed else None for needed in needs)
    return dx, drouter, None, *dweights, *(None,) * 10


moe_layer = Operator(
    f"moe_layer(Tensor x, {_WEIGHTS}, {_OPTIONS}) -> (" + ", ".join(["Tensor"] * 12) + ")",
    _forward,
    _forward_fake,
    _setup_context,
    _backward,
)
"""Arguments, checked: see the schema. -> output, the fields of a `RouterOutput`, and what is kept for backward. The
output and the three losses are differentiable."""
