"""The oracle: every operator as its definition, a loop over experts in plain PyTorch.

Any float dtype, any device, differentiable by autograd; run in float64 it is what the kernels are measured against, run
in their dtype it says what rounding alone costs. It shares nothing with them but `layout`, and reads back to the host
freely.

Letters: T tokens, H hidden size, E experts, K experts a token, R = T*K slots, I_e width of expert e, S = sum(I_e), n_e
rows of expert e. Operators have the names and the arguments of the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_moe.layout import RAGGED_ALIGNMENT, ExpertLayout, Routing

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_squared": lambda z: torch.relu(z) * torch.relu(z),  # Primer, So et al. 2021, arXiv:2109.08668
    "relu": torch.relu,
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),  # Hendrycks and Gimpel 2016, arXiv:1606.08415
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": lambda z: z * torch.sigmoid(z),
    "none": lambda z: z,
}
GATED = {  # Shazeer 2020, arXiv:2002.05202
    "swiglu": PLAIN["silu"],
    "geglu": PLAIN["gelu"],
    "geglu_tanh": PLAIN["gelu_tanh"],
    "reglu": PLAIN["relu"],
}


def route(topk_ids: Tensor, layout: ExpertLayout) -> Routing:
    """`topk_ids (T, K)` -> `Routing` without a tile schedule. Ids outside [0, E) drop their slots."""
    ids = topk_ids.flatten().tolist()
    counts = [0] * layout.num_experts
    slots: list[list[int]] = [[] for _ in layout.widths]
    for slot, e in enumerate(ids):
        if 0 <= e < layout.num_experts:
            counts[e] += 1
            if layout.widths[e]:
                slots[e].append(slot)
    row_to_slot = [slot for slots_e in slots for slot in slots_e]
    slot_to_row = [-1] * len(ids)
    for row, slot in enumerate(row_to_slot):
        slot_to_row[slot] = row
    row_offsets, ragged_offsets = [0], [0]
    for slots_e, width in zip(slots, layout.widths, strict=True):
        row_offsets.append(row_offsets[-1] + len(slots_e))
        blocks = -(-len(slots_e) * width // RAGGED_ALIGNMENT)
        ragged_offsets.append(ragged_offsets[-1] + blocks * RAGGED_ALIGNMENT)

    def table(values: list, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=topk_ids.device)

    return Routing(
        layout=layout,
        topk_ids=topk_ids,
        counts=table(counts),
        row_offsets=table(row_offsets),
        ragged_offsets=table(ragged_offsets, torch.int64),
        row_to_slot=table(row_to_slot + [-1] * (len(ids) - len(row_to_slot))),
        slot_to_row=table(slot_to_row).view(topk_ids.shape),
        row_blocks=table([]).view(0, 2),
        expert_order=table(sorted(range(layout.num_experts), key=lambda e: -len(slots[e]))),
        block_m=0,
    )


def gather(x: Tensor, *, routing: Routing) -> Tensor:
    """`x (T, H)` -> `(R, H)`: each row's token, zeros past the last row."""
    slots = [slot for slot in routing.row_to_slot.tolist() if slot >= 0]
    rows = x[torch.tensor(slots, dtype=torch.long, device=x.device) // routing.top_k]
    return F.pad(rows, (0, 0, 0, routing.num_rows - len(slots)))


def pre_activation(x: Tensor, w1: Tensor, w3: Tensor | None = None, *, routing: Routing) -> Tensor:
    """`x (T, H)`, w1 and w3 `(H, S)` -> ragged buffer of `[x_e w1_e | x_e w3_e]`, or of `x_e w1_e` without w3."""
    x_gathered = gather(x, routing=routing)
    blocks = []
    for e in range(routing.layout.num_experts):
        rows, columns = _rows(routing, e), routing.layout.columns(e)
        halves = [x_gathered[rows] @ w[:, columns] for w in (w1, w3) if w is not None]
        blocks.append(torch.cat(halves, dim=1))
    return _ragged(blocks, routing, parts=1 if w3 is None else 2)


def activation(pre: Tensor, *, routing: Routing, activation: str) -> Tensor:
    """Ragged pre-activation -> ragged activation: `act(h)`, gated `act(gate) * up`. ValueError on an unknown name."""
    if activation not in PLAIN and activation not in GATED:
        raise ValueError(f"activation: expected one of {', '.join([*PLAIN, *GATED])}, got {activation!r}")
    blocks = []
    for e, width in enumerate(routing.layout.widths):
        if activation in GATED:
            h = routing.ragged_block(pre, e, parts=2)
            blocks.append(GATED[activation](h[:, :width]) * h[:, width:])
        else:
            blocks.append(PLAIN[activation](routing.ragged_block(pre, e)))
    return _ragged(blocks, routing)


_act = activation  # the name is taken where it is also the argument's


def grouped_gemm_up(
    x: Tensor, w1: Tensor, w3: Tensor | None = None, *, routing: Routing, activation: str = "relu_squared"
) -> Tensor:
    """`x (T, H)`, w1 and w3 `(H, S)` -> ragged activation of every routed row."""
    pre = pre_activation(x, w1, w3, routing=routing)
    return _act(pre, routing=routing, activation=activation)


def grouped_gemm_down(x_up: Tensor, w2: Tensor, *, routing: Routing) -> Tensor:
    """Ragged activation, w2 `(S, H)` -> `(R, H)`, rows in expert order, zeros past the last row."""
    rows = [routing.ragged_block(x_up, e) @ w2[routing.layout.columns(e)] for e in range(routing.layout.num_experts)]
    y = torch.cat(rows)
    return F.pad(y, (0, 0, 0, routing.num_rows - len(y)))


def scatter(y: Tensor, topk_weights: Tensor, *, routing: Routing) -> Tensor:
    """`y (R, H)`, topk_weights `(T, K)` -> `(T, H)`: the weighted sum over k of the rows that a token's slots have."""
    row = routing.slot_to_row.long()
    has_row = row >= 0
    chosen = y.new_zeros(*row.shape, y.shape[1]).masked_scatter(has_row[..., None], y[row[has_row]])
    weights = topk_weights.masked_fill(~has_row, 0).to(y.dtype)
    return (weights[..., None] * chosen).sum(dim=1)


def moe_mlp(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None, *,
    layout: ExpertLayout, activation: str = "relu_squared",
) -> Tensor:  # fmt: skip
    """The whole layer on `x (T, H)`: route, up, down, scatter."""
    routing = route(topk_ids, layout)
    x_up = grouped_gemm_up(x, w1, w3, routing=routing, activation=activation)
    return scatter(grouped_gemm_down(x_up, w2, routing=routing), topk_weights, routing=routing)


def _rows(routing: Routing, expert: int) -> slice:
    return slice(*routing.row_offsets[expert : expert + 2].tolist())


def _ragged(blocks: list[Tensor], routing: Routing, parts: int = 1) -> Tensor:
    """Dense blocks, one an expert -> a ragged buffer, zeros between the blocks."""
    pieces, end = [], 0
    for e, block in enumerate(blocks):
        start = parts * int(routing.ragged_offsets[e])
        pieces += [block.new_zeros(start - end), block.flatten()]
        end = start + block.numel()
    return torch.cat([*pieces, blocks[0].new_zeros(routing.ragged_numel(parts) - end)])
