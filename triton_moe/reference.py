"""The oracle: every operator, and the whole function, as a loop over experts that reads like the definition.

Plain PyTorch in any float dtype on any device, differentiable by autograd. In fp64 it is the truth the kernels are
measured against; in their own dtype it is the plain computation whose error sets their budget. It is meant to be read,
not to be fast: the row counts come back to the host.

Letters: `T` tokens, `H` hidden size, `E` experts, `K` experts per token, `R = T*K` slots, `I_e` width of expert e,
`S = sum(I_e)`, `n_e` rows of expert e. Slots, rows and the ragged buffer are those of `triton_moe.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from triton_moe.layout import RAGGED_ALIGNMENT, ExpertLayout, Routing, row_stride

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_squared": lambda h: torch.relu(h).square(),
    "relu": torch.relu,
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "silu": lambda h: h * torch.sigmoid(h),
    "none": lambda h: h,
}
"""`a = act(h)`. relu_squared: So et al. 2021, "Primer"; gelu, its tanh form and silu: Hendrycks and Gimpel 2016,
"Gaussian Error Linear Units". relu and relu_squared have derivative 0 at 0."""

GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": PLAIN["silu"],
    "geglu": PLAIN["gelu"],
    "geglu_tanh": PLAIN["gelu_tanh"],
    "reglu": PLAIN["relu"],
}
"""`a = act(gate) * up`: Shazeer 2020, "GLU Variants Improve Transformer"."""


def _is_gated(activation: str) -> bool:
    if activation not in PLAIN and activation not in GATED:
        raise ValueError(f"activation: expected one of {', '.join((*PLAIN, *GATED))}, got {activation!r}")
    return activation in GATED


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a sum or an elementwise formula is evaluated in before its one rounding to `dtype`: fp32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def _rows_of(routing: Routing, expert: int) -> slice:
    first, last = routing.row_offsets[expert : expert + 2].tolist()
    return slice(first, last)


def route(topk_ids: Tensor, layout: ExpertLayout) -> Routing:
    """Sort the slots of `topk_ids (T, K)`, of any integer dtype, by expert: a `Routing` without a tile schedule.

    Ids outside `0 <= id < E` are dropped. A null expert's slots are counted, but have no rows.
    """
    num_experts, num_slots = layout.num_experts, topk_ids.numel()
    counts = [0] * num_experts
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(topk_ids.flatten().tolist()):
        if 0 <= expert < num_experts:
            counts[expert] += 1
            if layout.widths[expert] > 0:
                slots_of[expert].append(slot)

    row_offsets, ragged_offsets, row_to_slot = [0], [0], []
    for slots, width in zip(slots_of, layout.widths, strict=True):
        row_to_slot += slots
        row_offsets.append(len(row_to_slot))
        blocks = math.ceil(len(slots) * row_stride(width) / RAGGED_ALIGNMENT)
        ragged_offsets.append(ragged_offsets[-1] + blocks * RAGGED_ALIGNMENT)
    slot_to_row = [-1] * num_slots
    for row, slot in enumerate(row_to_slot):
        slot_to_row[slot] = row
    row_to_slot += [-1] * (num_slots - len(row_to_slot))

    def tensor(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=topk_ids.device)

    return Routing(
        layout=layout,
        topk_ids=topk_ids,
        counts=tensor(counts),
        row_offsets=tensor(row_offsets),
        ragged_offsets=tensor(ragged_offsets, torch.int64),
        row_to_slot=tensor(row_to_slot),
        slot_to_row=tensor(slot_to_row).view(topk_ids.shape),
        row_blocks=tensor([]).view(0, 2),
        expert_order=tensor(sorted(range(num_experts), key=lambda expert: -len(slots_of[expert]))),
        block_m=0,
    )


def gather(x: Tensor, *, routing: Routing) -> Tensor:
    """`x (T, H)` -> `(R, H)`: each slot's token, rows in expert order, zeros past the last row."""
    used = slice(0, int(routing.row_offsets[-1]))
    rows = x.new_zeros(routing.num_rows, x.shape[1])
    rows[used] = x[routing.row_to_slot[used].long() // routing.top_k]
    return rows


def pre_activation(
    x: Tensor,
    w1: Tensor,
    w3: Tensor | None = None,
    b1: Tensor | None = None,
    b3: Tensor | None = None,
    *,
    routing: Routing,
) -> Tensor:
    """`h = x w1_e + b1_e`, or the halves `(x w1_e + b1_e, x w3_e + b3_e)` of a gated MLP, for every row of an expert.

    `x (T, H)`, `w1` and `w3` `(H, S)`, `b1` and `b3` `(S)` or None for zeros -> the flat ragged buffer of 1 part, or of
    2 with w3: gate half, then up half, in each row. Zeros wherever there is no activation.
    """
    parts = 1 if w3 is None else 2
    rows = gather(x, routing=routing)
    pre = x.new_zeros(routing.ragged_numel(parts))
    for expert in range(routing.layout.num_experts):
        columns = routing.layout.columns(expert)
        x_e = rows[_rows_of(routing, expert)]
        for part, (w, b) in enumerate(((w1, b1), (w3, b3))[:parts]):
            h = x_e @ w[:, columns]  # type: ignore[index]
            routing.ragged_block(pre, expert, part, parts).copy_(h if b is None else h + b[columns])
    return pre


def activation(pre: Tensor, *, routing: Routing, activation: str) -> Tensor:
    """`act(h)`, or `act(gate) * up`, of the flat ragged buffer from `pre_activation` -> one of 1 part.

    Evaluated in fp32 or wider and rounded once, as PyTorch's own elementwise functions are. Zeros elsewhere.
    Raises ValueError on an unknown activation.
    """
    gated = _is_gated(activation)
    a = pre.new_zeros(routing.ragged_numel())
    parts = 2 if gated else 1
    for expert in range(routing.layout.num_experts):
        h, *up = (routing.ragged_block(pre, expert, part, parts).to(_wide(pre.dtype)) for part in range(parts))
        block = GATED[activation](h) * up[0] if gated else PLAIN[activation](h)
        routing.ragged_block(a, expert).copy_(block)
    return a


_activate = activation  # the operator, where an argument has its name


def grouped_gemm_up(
    x: Tensor,
    w1: Tensor,
    w3: Tensor | None = None,
    b1: Tensor | None = None,
    b3: Tensor | None = None,
    *,
    routing: Routing,
    activation: str = "relu_squared",
) -> Tensor:
    """`act(h)`, gated `act(gate) * up`, of `pre_activation`'s arguments: a flat ragged buffer.

    Raises ValueError on an unknown activation, or if w3 is missing for a gated one, or w3 or b3 given for another.
    """
    gated = _is_gated(activation)
    if gated != (w3 is not None):
        expected = "the up weights of a gated activation" if gated else "None with an activation that is not gated"
        raise ValueError(f"w3: expected {expected}, got {None if w3 is None else 'a tensor'}")
    if b3 is not None and not gated:
        raise ValueError("b3: expected None with an activation that is not gated, got a tensor")
    return _activate(pre_activation(x, w1, w3, b1, b3, routing=routing), routing=routing, activation=activation)


def grouped_gemm_down(x_up: Tensor, w2: Tensor, b2: Tensor | None = None, *, routing: Routing) -> Tensor:
    """`y = a w2_e + b2_e`: the flat ragged buffer of activations, `w2 (S, H)`, `b2 (E, H)` or None for zeros -> `(R,
    H)`, zeros past the last row."""
    y = x_up.new_zeros(routing.num_rows, w2.shape[1])
    for expert in range(routing.layout.num_experts):
        a = routing.ragged_block(x_up, expert)
        y_e = a @ w2[routing.layout.columns(expert)]
        y[_rows_of(routing, expert)] = y_e if b2 is None else y_e + b2[expert]
    return y


def scatter(y: Tensor, topk_weights: Tensor, *, routing: Routing) -> Tensor:
    """`out[t] = sum_k topk_weights[t, k] * y[slot_to_row[t, k]]`: `y (R, H)`, `topk_weights (T, K)` -> `(T, H)`.

    Summed in fp32 or wider, returned in y's dtype. A slot without a row contributes nothing, whatever its weight.
    """
    wide = _wide(y.dtype)
    out = y.new_zeros(routing.num_tokens, y.shape[1], dtype=wide)
    for k in range(routing.top_k):
        row = routing.slot_to_row[:, k].long()
        has_row = row >= 0
        out[has_row] += topk_weights[has_row, k, None].to(wide) * y[row[has_row]].to(wide)
    return out.to(y.dtype)


def moe_mlp(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor | None = None,
    *,
    layout: ExpertLayout,
    activation: str = "relu_squared",
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    b3: Tensor | None = None,
) -> Tensor:
    """`out[t] = sum_k topk_weights[t, k] * expert[topk_ids[t, k]](x[t])`, where expert e is `act(x w1_e + b1_e) w2_e +
    b2_e`.

    Args:
        x: `(T, H)`.
        topk_weights: `(T, K)`, any float dtype.
        topk_ids: `(T, K)` integers; ids outside `0 <= id < E` add nothing, an id may repeat within a token.
        w1, w3: `(H, S)`; w3 only with a gated activation, whose gate is w1.
        w2: `(S, H)`.
        layout: the experts' widths and offsets.
        activation: a name in `PLAIN` or `GATED`.
        b1, b3: `(S)` or None for zeros; b3 only with a gated activation.
        b2: `(E, H)` or None for zeros. A null expert's row adds nothing.

    Returns:
        `(T, H)` of x's dtype.

    Raises:
        ValueError: an unknown activation, or w3 missing or superfluous for it, or b3 superfluous.
    """
    routing = route(topk_ids, layout)
    x_up = grouped_gemm_up(x, w1, w3, b1, b3, routing=routing, activation=activation)
    y = grouped_gemm_down(x_up, w2, b2, routing=routing)
    return scatter(y, topk_weights, routing=routing)
