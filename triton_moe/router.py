"""The router's maths: logits, scores, and which experts each token goes to. Letters as in `layout.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUTERS = ("sigmoid", "softmax")
"""How logits become scores: each expert on its own, or all experts against each other."""


class RouterOutput(NamedTuple):
    logits: Tensor
    """(T, E) fp32 (fp64 if x is)"""
    probs: Tensor
    """(T, E) likewise: the scores"""
    topk_weights: Tensor
    """(T, K) x's dtype"""
    topk_ids: Tensor
    """(T, K) int64, distinct within a token"""


class _RouterLogits(torch.autograd.Function):
    """`x @ weight^T` in fp32 (fp64 if x is). Saves x itself, where autograd would save an upcast copy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) @ weight.t().to(wide)

    @staticmethod
    def backward(ctx, dlogits: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = (dlogits @ weight.to(dlogits.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dweight = (dlogits.t() @ x.to(dlogits.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """`x (T, H) @ weight (E, H)^T`: operands in x's dtype, accumulation and result in fp32 (fp64 if x is).

    Autocast would round the result, and is kept out.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return router_logits(x, weight)
    return _RouterLogits.apply(x, weight.to(x.dtype))  # type: ignore[return-value]


def router_scores(logits: Tensor, router: str) -> Tensor:
    """Scores in `logits`' shape and dtype. Raises ValueError on an unknown router."""
    if router == "sigmoid":
        return torch.sigmoid(logits)
    if router == "softmax":
        return torch.softmax(logits, dim=-1)
    raise ValueError(f"router: expected one of {', '.join(ROUTERS)}, got {router!r}")


def route_tokens(
    x: Tensor,
    weight: Tensor,
    *,
    num_active_experts: int,
    router: str = "sigmoid",
    normalize_weights: bool = True,
    bias: Tensor | None = None,
) -> RouterOutput:
    """Choose the K = `num_active_experts` highest-scoring experts of every token and weigh them by their scores.

    Args:
        x: `(T, H)`.
        weight: `(E, H)`.
        router: one of `ROUTERS`.
        normalize_weights: divide a token's K weights by their sum + 1e-20.
        bias: `(E)`, added to the scores for the choice alone; the weights come from the scores without it, and no
            gradient reaches it.

    Among equal scores the choice is `torch.topk`'s, which differs between devices.
    """
    logits = router_logits(x, weight)
    probs = router_scores(logits, router)
    if bias is None:
        chosen, topk_ids = probs.topk(num_active_experts, dim=-1)
    else:
        topk_ids = (probs.detach() + bias.detach()).topk(num_active_experts, dim=-1).indices
        chosen = probs.gather(-1, topk_ids)
    if normalize_weights:
        chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return RouterOutput(logits, probs, chosen.to(x.dtype), topk_ids)
