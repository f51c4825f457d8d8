"""The router's maths: logits, scores, which experts each token goes to, and what the auxiliary losses need of it.

`route_tokens` is the whole; `router_logits`, `router_scores`, `select_experts` and `weigh_experts` are its pieces, for
a router of one's own. A softmax over the chosen experts alone is "softmax" with normalised weights. Letters as in
`layout.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from triton_moe.functional import check_router_input, positive_int, runs_kernels
from triton_moe.layout import ExpertLayout
from triton_moe.losses import (
    check_sequence_length,
    compute_loss,
    load_balance_loss,
    mean_over_tokens,
    router_z_loss,
    sequence_load_balance_loss,
)

ROUTERS = ("sigmoid", "softmax")
"""How logits become scores: each expert on its own, or all experts against each other."""
_MAX_FUSED_EXPERTS = 512
"""Up to here one kernel holds a token's scores; beyond, PyTorch's operators do."""


@dataclass(frozen=True)
class GroupLimit:
    """Experts in groups of equal size, in order; a token chooses within its best groups (arXiv:2412.19437, 2.1.2)."""

    num_groups: int
    num_active_groups: int
    num_scores: int = 2
    """A group counts by the sum of its so many best scores, with the bias: 2 as DeepSeek-V3, 1 as DeepSeek-V2."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, positive_int(getattr(self, field.name), field.name))

    def check(self, num_experts: int, num_active_experts: int) -> None:
        """Raise ValueError unless so many experts can be chosen in these groups."""
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups: expected a divisor of E = {num_experts}, got {self.num_groups}")
        size = num_experts // self.num_groups
        if not -(-num_active_experts // size) <= self.num_active_groups <= self.num_groups:
            raise ValueError(
                f"num_active_groups: expected room for K = {num_active_experts} experts in at most {self.num_groups} "
                f"groups of {size}, got {self.num_active_groups}"
            )
        if not 1 <= self.num_scores <= size:
            raise ValueError(f"num_scores: expected 1 to {size}, a group's size, got {self.num_scores}")


class Choice(NamedTuple):
    """Which experts the tokens go to, by `choose_experts`."""

    logits: Tensor
    """(T, E) fp32 (fp64 if x is)"""
    probs: Tensor
    """(T, E) likewise: the scores"""
    topk_weights: Tensor
    """(T, K) x's dtype"""
    topk_ids: Tensor
    """(T, K) int64, distinct within a token"""


class RouterOutput(NamedTuple):
    """What a layer needs of its router. The scalars are fp32 (fp64 if x is), and 0 without `aux_losses` or tokens."""

    topk_weights: Tensor
    """(T, K) x's dtype"""
    topk_ids: Tensor
    """(T, K) int32 or int64, distinct within a token"""
    f: Tensor
    """(E) x's dtype: the fraction of the T*K slots that went to each expert; no gradient"""
    load: Tensor
    """(E) fp32 (fp64 if x is): the same before it was rounded"""
    router_z_loss: Tensor
    load_balance_loss: Tensor
    compute_loss: Tensor
    router_logits_abs_max: Tensor
    """no gradient"""
    router_logits_mean: Tensor
    """no gradient"""


class _RouterLogits(torch.autograd.Function):
    """`x @ weight^T` in fp32 (fp64 if x is). Saves x itself, where autograd would save an upcast copy."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # apart from forward, as torch.func wants it
        ctx.save_for_backward(*inputs)

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) @ weight.t().to(wide)

    @staticmethod
    def backward(ctx, dlogits: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
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


def select_experts(
    scores: Tensor, num_active_experts: int, bias: Tensor | None = None, groups: GroupLimit | None = None
) -> Tensor:
    """The K highest of `scores (T, E)`, plus `bias (E)`, within each token's best groups -> ids `(T, K)` int64.

    Raises ValueError if there are not so many to choose.
    """
    if not 1 <= num_active_experts <= scores.shape[-1]:
        raise ValueError(f"num_active_experts: expected 1 to E = {scores.shape[-1]}, got {num_active_experts}")
    scores = scores.detach() if bias is None else scores.detach() + bias.detach()
    if groups is not None:
        groups.check(scores.shape[-1], num_active_experts)
        by_group = scores.unflatten(-1, (groups.num_groups, -1))
        best = by_group.topk(groups.num_scores, dim=-1).values.sum(-1).topk(groups.num_active_groups, dim=-1).indices
        active = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, True)
        scores = by_group.masked_fill(~active[..., None], -torch.inf).flatten(-2)
    return scores.topk(num_active_experts, dim=-1).indices


def weigh_experts(
    scores: Tensor, topk_ids: Tensor, normalize_weights: bool = True, weights_scale: float = 1.0
) -> Tensor:
    """The chosen of `scores (T, E)`, divided by a token's sum of them + 1e-20 if so, times the scale -> `(T, K)`."""
    chosen = scores.gather(-1, topk_ids)
    if normalize_weights:
        chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return chosen if weights_scale == 1 else chosen * weights_scale


def expand_null_row(weight: Tensor, layout: ExpertLayout) -> Tensor:
    """The weight `(E', H)` of a router whose null experts share one logit -> `(E, H)`.

    It has a row for each expert wider than 0, in order, and a last one, which goes to the place of each null expert;
    its gradient is the sum of theirs. Raises ValueError on another number of rows.
    """
    num_rows = layout.num_experts - layout.widths.count(0) + 1
    if weight.shape[0] != num_rows:
        raise ValueError(f"weight: expected {num_rows} rows, the last for all null experts, got {weight.shape[0]}")
    runs: list[list[int]] = []  # [is real, count]; itertools.groupby breaks torch.compile's graph
    for width in layout.widths:
        if runs and runs[-1][0] == (width > 0):
            runs[-1][1] += 1
        else:
            runs.append([width > 0, 1])
    rows, real = [], 0
    for is_real, count in runs:
        rows.append(weight[real : real + count] if is_real else weight[-1:].expand(count, -1))
        real += count * is_real
    return torch.cat(rows)


def choose_experts(
    x: Tensor,
    weight: Tensor,
    *,
    num_active_experts: int,
    router: str = "sigmoid",
    normalize_weights: bool = True,
    bias: Tensor | None = None,
    weights_scale: float = 1.0,
    groups: GroupLimit | None = None,
) -> Choice:
    """The choice of `route_tokens`, whose arguments these are, in PyTorch's operators, with the scores behind it.

    Among equal scores the choice is `torch.topk`'s, which differs between devices.
    """
    logits = router_logits(x, weight)
    probs = router_scores(logits, router)
    topk_ids = select_experts(probs, num_active_experts, bias, groups)
    chosen = weigh_experts(probs, topk_ids, normalize_weights, weights_scale)
    return Choice(logits, probs, chosen.to(x.dtype), topk_ids)


def _route_tokens(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: ExpertLayout, num_active_experts: int, router: str,
    normalize_weights: bool, weights_scale: float, aux_losses: bool, groups: GroupLimit | None,
    sequence_length: int | None,
) -> RouterOutput:  # fmt: skip
    """`route_tokens` in PyTorch's operators."""
    logits, probs, topk_weights, topk_ids = choose_experts(
        x, weight, num_active_experts=num_active_experts, router=router, normalize_weights=normalize_weights, bias=bias,
        weights_scale=weights_scale, groups=groups,
    )  # fmt: skip
    chosen = torch.zeros(layout.num_experts, dtype=probs.dtype, device=x.device)
    ids = topk_ids.flatten()
    f = chosen.scatter_add_(0, ids, torch.ones_like(ids, dtype=probs.dtype)) / max(ids.numel(), 1)
    raw, p = logits.detach(), mean_over_tokens(probs)
    losses, statistics = (raw.new_zeros(()),) * 3, (raw.new_zeros(()),) * 2
    if aux_losses:
        balance = load_balance_loss(p, f, layout)
        if sequence_length is not None:
            balance = sequence_load_balance_loss(probs, topk_ids, sequence_length, layout)
        losses = router_z_loss(logits), balance, compute_loss(p, layout)
    if aux_losses and raw.numel():
        statistics = torch.linalg.vector_norm(raw, torch.inf), raw.mean()
    return RouterOutput(topk_weights, topk_ids, f.to(x.dtype), f, *losses, *statistics)


def is_fused(layout: ExpertLayout, groups: GroupLimit | None, sequence_length: int | None) -> bool:
    """Whether one kernel does all of the routing, where kernels run."""
    return groups is None and sequence_length is None and layout.num_experts <= _MAX_FUSED_EXPERTS


def route_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: ExpertLayout,
    num_active_experts: int,
    router: str = "sigmoid",
    normalize_weights: bool = True,
    aux_losses: bool = True,
    weights_scale: float = 1.0,
    groups: GroupLimit | None = None,
    sequence_length: int | None = None,
    backend: str = "auto",
) -> RouterOutput:
    """Choose the K = `num_active_experts` highest-scoring experts of every token and weigh them by their scores.

    Args:
        x: `(T, H)`.
        weight: `(E, H)`; cast to x's dtype for the product.
        bias: `(E)`, added to the scores for the choice alone; the weights come from the scores without it, and no
            gradient reaches it.
        layout: of the experts, whose widths the losses know.
        router: one of `ROUTERS`.
        normalize_weights: divide a token's K weights by their sum + 1e-20.
        aux_losses: whether the losses (see `losses.py`) and the logits' statistics are computed.
        weights_scale: factor of the weights, after they are normalised: a constant, for another one compiles the
            kernels anew.
        groups: limits each token's choice to its best groups of experts.
        sequence_length: the load-balance loss is `sequence_load_balance_loss`, of sequences of so many tokens; None: it
            is `load_balance_loss`, of all of them.
        backend: as in `moe_mlp`.

    Differentiable in x and weight. Among equal scores the kernel chooses the lowest id, PyTorch (more than 512 experts,
    groups, a sequence_length, the CPU) what `torch.topk` does there; NaN counts as the highest score.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
    """
    check_router_input(x, weight, bias, layout, num_active_experts)
    if router not in ROUTERS:
        raise ValueError(f"router: expected one of {', '.join(ROUTERS)}, got {router!r}")
    for argument, flag in (("normalize_weights", normalize_weights), ("aux_losses", aux_losses)):
        if not isinstance(flag, bool):
            raise ValueError(f"{argument}: expected True or False, got {flag!r}")
    if not isinstance(weights_scale, (int, float)) or not abs(weights_scale) < math.inf:  # of a traced number too
        raise ValueError(f"weights_scale: expected a finite number, got {weights_scale!r}")
    if sequence_length is not None:
        check_sequence_length(sequence_length, x.shape[0])
    if groups is not None:
        if not isinstance(groups, GroupLimit):
            raise ValueError(f"groups: expected a GroupLimit or None, got {groups!r}")
        groups.check(layout.num_experts, num_active_experts)
    options = layout, num_active_experts, router, normalize_weights, weights_scale, aux_losses
    if not (runs_kernels(x.device, x.dtype, backend) and is_fused(layout, groups, sequence_length)):
        return _route_tokens(x, weight, bias, *options, groups, sequence_length)
    from triton_moe.ops.router import route_tokens as run

    return RouterOutput(*run(x, weight, bias, *options))
