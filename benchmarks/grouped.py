"""PyTorch's own grouped GEMM as contestants: over all experts, padded to the widest, or once for each width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from layers import CannotRun, Layer, State
from stacked import Form, Stacked, activation_of, stacked_layer
from torch import Tensor

from triton_moe import MoEConfig
from triton_moe.activations import is_gated


class _Reorder(torch.autograd.Function):
    """Rows `index` of a matrix. Every row is taken `copies` times, and `inverse (rows * copies)` says where each copy
    went, so that backward is another selection and a sum: without atomic additions, and repeatable."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        rows = dout.index_select(0, inverse)
        return rows if ctx.copies == 1 else rows.view(-1, ctx.copies, rows.shape[1]).sum(1), None, None, None


class GroupedMM:
    """Sort the slots, gather, multiply, activate, multiply, and put the rows back.

    Gate and up are one GEMM. A grouped GEMM takes one width, so each of `groups` has its own, narrower experts padded
    with zeros. With more groups than one, where each begins is read back to the host.
    """

    def __init__(self, config: MoEConfig, state: State, groups: Sequence[Sequence[int]]) -> None:
        self.config = config
        self.weights = [Stacked(config, state, Form(), experts) for experts in groups]
        order = torch.tensor([expert for experts in groups for expert in experts], device=state["w1"].device)
        self.place = order.argsort().int() if len(groups) > 1 else None  # of each expert in the order of the groups
        self.places = torch.arange(len(order), dtype=torch.int32, device=order.device)

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        K = self.config.num_active_experts
        ids = topk_ids.int().flatten() if self.place is None else self.place[topk_ids.flatten()]
        sorted_ids, row_to_slot = ids.sort(stable=True)
        offsets = torch.searchsorted(sorted_ids, self.places, right=True, out_int32=True)
        slot_to_row = torch.empty_like(row_to_slot)
        slot_to_row[row_to_slot] = torch.arange(row_to_slot.numel(), device=x.device)

        rows: Tensor = _Reorder.apply(x, row_to_slot // K, slot_to_row, K)  # type: ignore[assignment]
        y = self._experts(self.weights[0], rows, offsets) if self.place is None else self._by_group(rows, offsets)
        y: Tensor = _Reorder.apply(y, slot_to_row, row_to_slot, 1)  # type: ignore[assignment]
        return torch.bmm(topk_weights[:, None], y.view(-1, K, y.shape[1])).squeeze(1)

    def _by_group(self, rows: Tensor, offsets: Tensor) -> Tensor:
        row_ends, parts, first, row = offsets.tolist(), [], 0, 0
        for weights in self.weights:
            end = first + len(weights.experts)
            row_end = row_ends[end - 1]
            if row_end > row:
                parts.append(self._experts(weights, rows[row:row_end], offsets[first:end] - row))
            first, row = end, row_end
        return torch.cat(parts)

    def _experts(self, weights: Stacked, rows: Tensor, offsets: Tensor) -> Tensor:
        h = F.grouped_mm(rows, weights.up, offs=offsets)
        act = activation_of(self.config)
        if is_gated(self.config.activation):
            gate, up = h.chunk(2, dim=1)
            a = act(gate) * up
        else:
            a = act(h)
        return F.grouped_mm(a, weights.down, offs=offsets)


def _grouped_mm(config: MoEConfig, state: State, groups: Sequence[Sequence[int]]) -> Layer:
    weight = state["w1"]
    if weight.is_cuda and weight.dtype != torch.bfloat16:
        raise CannotRun(f"PyTorch's grouped GEMM has a kernel for bfloat16 alone, and this is {weight.dtype}.")
    experts = GroupedMM(config, state, groups)
    return stacked_layer(config, state, experts.weights, experts)


def grouped_mm(config: MoEConfig, state: State) -> Layer:
    """All experts padded to the widest: nothing is read back. Raises CannotRun where PyTorch has no kernel."""
    return _grouped_mm(config, state, [range(config.layout.num_experts)])


def grouped_mm_by_width(config: MoEConfig, state: State) -> Layer:
    """A pair of grouped GEMMs for each width, without padding. Raises CannotRun as `grouped_mm`, and for one width."""
    classes = config.layout.width_classes
    if len(classes) == 1:
        raise CannotRun("With one width this is grouped_mm.")
    return _grouped_mm(config, state, list(classes.values()))
