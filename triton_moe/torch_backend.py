"""Plain PyTorch twins of the kernels, for CPU tensors and for devices without Triton.

Same names and arguments as the kernels' operators, differentiable by autograd. Their number of launches grows with the
number of experts and they read the row counts back to the host; the oracle is `reference.py`, not this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_moe.activations import GATE_ACTIVATION
from triton_moe.layout import RAGGED_ALIGNMENT, ROW_ALIGNMENT, ExpertLayout, Routing, row_stride

ACTIVATION = {
    "relu_squared": lambda z: F.relu(z).square(),
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "none": lambda z: z,
}


def activate(h: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """`act(h)`, of a gated activation `act(h) * up`."""
    a = ACTIVATION[GATE_ACTIVATION.get(activation, activation)](h)
    return a if up is None else a * up


def route(topk_ids: Tensor, layout: ExpertLayout) -> Routing:
    """`topk_ids (T, K)` int32 or int64 -> a `Routing` without a tile schedule."""
    num_experts, ids = layout.num_experts, topk_ids.reshape(-1).long()
    widths = torch.tensor(layout.widths, device=ids.device)
    ids = torch.where((ids < 0) | (ids > num_experts), num_experts, ids)
    chosen = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device)
    counts = chosen.scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]
    rows = counts * (widths > 0)
    owner = torch.where(F.pad(widths, (0, 1))[ids] > 0, ids, num_experts)
    owner, row_to_slot = owner.sort(stable=True)
    row = torch.arange(ids.numel(), device=ids.device)
    slot_to_row = torch.empty_like(row).scatter_(0, row_to_slot, torch.where(owner < num_experts, row, -1))
    strides = (widths + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    blocks = (rows * strides + RAGGED_ALIGNMENT - 1) // RAGGED_ALIGNMENT * RAGGED_ALIGNMENT
    return Routing(
        layout=layout,
        topk_ids=topk_ids,
        counts=counts.int(),
        row_offsets=F.pad(rows.cumsum(0), (1, 0)).int(),
        ragged_offsets=F.pad(blocks.cumsum(0), (1, 0)),
        row_to_slot=torch.where(owner < num_experts, row_to_slot, -1).int(),
        slot_to_row=slot_to_row.view(topk_ids.shape).int(),
        row_blocks=torch.empty(0, 2, dtype=torch.int32, device=ids.device),
        expert_order=rows.argsort(stable=True, descending=True).int(),
        block_m=0,
    )


def gather(x: Tensor, *, routing: Routing) -> Tensor:
    """`x (T, H)` -> `(R, H)`, rows in expert order, zeros past the last row."""
    slot = routing.row_to_slot[:, None].long()
    rows = x[slot[:, 0].clamp_min(0) // routing.top_k]
    return rows.masked_fill(slot < 0, 0)


def _rows_per_expert(routing: Routing) -> list[int]:
    """Sizes that split a `(R, ...)` tensor by expert; the last one is the rows past the end."""
    sizes = routing.row_offsets.diff().tolist()
    return [*sizes, routing.num_rows - sum(sizes)]


def _pack(blocks: list[Tensor], routing: Routing) -> Tensor:
    """`(n_e, I_e)` blocks, one an expert -> a ragged buffer, zeros elsewhere."""
    rows = [F.pad(block, (0, -block.shape[1] % ROW_ALIGNMENT)).reshape(-1) for block in blocks]
    padded = [F.pad(block, (0, -block.numel() % RAGGED_ALIGNMENT)) for block in rows]
    tail = routing.ragged_numel() - sum(block.numel() for block in padded)
    return torch.cat([*padded, padded[0].new_zeros(tail)])


def _unpack(buffer: Tensor, routing: Routing, sizes: list[int]) -> list[Tensor]:
    """A ragged buffer -> its `(n_e, I_e)` blocks."""
    widths = routing.layout.widths
    shapes = [(rows, row_stride(width)) for rows, width in zip(sizes, widths, strict=False)]
    numels = [-(-rows * stride // RAGGED_ALIGNMENT) * RAGGED_ALIGNMENT for rows, stride in shapes]
    pieces = buffer.split([*numels, buffer.numel() - sum(numels)])
    return [
        piece[: rows * stride].view(rows, stride)[:, :width]
        for piece, (rows, stride), width in zip(pieces, shapes, widths, strict=False)
    ]


def _products(rows: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> list[Tensor]:
    """An expert's rows times its matrix, plus its bias."""
    if biases is None:
        return [a @ w for a, w in zip(rows, weights, strict=True)]
    return [torch.addmm(b, a, w) for a, w, b in zip(rows, weights, biases, strict=True)]


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
    """`act(x w1_e + b1_e)`, gated `act(x w1_e + b1_e) * (x w3_e + b3_e)`, of each expert's rows, as a ragged buffer."""
    widths = list(routing.layout.widths)
    *rows, _ = gather(x, routing=routing).split(_rows_per_expert(routing))

    def product(w: Tensor, b: Tensor | None) -> list[Tensor]:
        return _products(rows, w.split(widths, dim=1), None if b is None else b.split(widths))

    ups = [None] * len(widths) if w3 is None else product(w3, b3)
    return _pack([activate(h, up, activation) for h, up in zip(product(w1, b1), ups, strict=True)], routing)


def grouped_gemm_down(x_up: Tensor, w2: Tensor, b2: Tensor | None = None, *, routing: Routing) -> Tensor:
    """`x_up_e w2_e + b2_e` of the ragged buffer's blocks -> `(R, H)`, zeros past the last row."""
    sizes = _rows_per_expert(routing)
    blocks = _unpack(x_up, routing, sizes)
    rows = _products(blocks, w2.split(list(routing.layout.widths)), None if b2 is None else b2.unbind())
    return torch.cat([*rows, x_up.new_zeros(sizes[-1], w2.shape[1])])


def scatter(y: Tensor, topk_weights: Tensor, *, routing: Routing) -> Tensor:
    """`out[t] = sum_k topk_weights[t, k] * y[slot_to_row[t, k]]`, summed in fp32 or wider: `(R, H)` -> `(T, H)`."""
    wide = torch.promote_types(y.dtype, torch.float32)
    row = routing.slot_to_row.long()
    chosen = y[row.clamp_min(0)]
    chosen = chosen.masked_fill((row < 0)[..., None], 0)
    weights = topk_weights.masked_fill(row < 0, 0)
    return (weights.to(wide)[..., None] * chosen.to(wide)).sum(1, dtype=wide).to(y.dtype)


def moe_mlp(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None,
    b2: Tensor | None, b3: Tensor | None, layout: ExpertLayout, activation: str, activation_memory: str,
    recompute: bool,
) -> Tensor:  # fmt: skip
    """The whole layer on `x (T, H)`: route, up, down, scatter. Its memory is exact in either case."""
    if recompute and torch.is_grad_enabled():
        operands = (x, topk_weights, topk_ids, w1, w2, w3, b1, b2, b3, layout, activation, activation_memory, False)
        return checkpoint(moe_mlp, *operands, use_reentrant=False, preserve_rng_state=False)  # type: ignore
    routing = route(topk_ids, layout)
    x_up = grouped_gemm_up(x, w1, w3, b1, b3, routing=routing, activation=activation)
    return scatter(grouped_gemm_down(x_up, w2, b2, routing=routing), topk_weights, routing=routing)
