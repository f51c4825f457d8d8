"""PyTorch's own grouped GEMM as contestants: over all experts, padded to the widest, or once for each width."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from layers import CannotRun, Layer, State
from results import ROOT
from stacked import Form, Stacked, stacked_layer
from torch import Tensor

sys.path.append(str(ROOT / "examples"))
from padded_experts import grouped_mm_mlp, through_experts

from triton_moe import MoEConfig


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
        if self.place is None:
            return through_experts(x, topk_weights, topk_ids, self.places, partial(self._experts, self.weights[0]))
        return through_experts(x, topk_weights, self.place[topk_ids], self.places, self._by_group)

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
        return grouped_mm_mlp(rows, offsets, weights.up, weights.down, self.config.activation)


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
