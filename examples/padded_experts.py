"""The same layer with PyTorch's grouped GEMM for the experts, padded to the widest one: what ours is compared with.

Letters as in `triton_moe.layout`; `I` is the widest expert's width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_moe import ExpertLayout, MoEConfig, MoEMLP
from triton_moe.activations import is_gated
from triton_moe.experts import Experts
from triton_moe.torch_backend import activate


def stack(packed: Tensor, layout: ExpertLayout) -> Tensor:
    """`(H, S)` -> `(E, H, I)`, narrower experts padded with zeros."""
    columns = (packed[:, layout.columns(e)] for e in range(layout.num_experts))
    return torch.stack([F.pad(expert, (0, layout.max_width - expert.shape[1])) for expert in columns])


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


def through_experts(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, places: Tensor, experts: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Sort the slots of `topk_ids (T, K)`, gather, let the experts work, and put the rows back, weighted.

    Args:
        places: `0, 1, ... E - 1`, int32.
        experts: `(rows (T*K, H) in expert order, where each expert's end (E) int32)` -> as many rows.
    """
    K = topk_ids.shape[1]
    sorted_ids, row_to_slot = topk_ids.int().flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, places, right=True, out_int32=True)
    slot_to_row = torch.empty_like(row_to_slot)
    slot_to_row[row_to_slot] = torch.arange(row_to_slot.numel(), device=x.device)
    rows: Tensor = _Reorder.apply(x, row_to_slot // K, slot_to_row, K)  # type: ignore[assignment]
    y: Tensor = _Reorder.apply(experts(rows, ends), slot_to_row, row_to_slot, 1)  # type: ignore[assignment]
    return torch.bmm(topk_weights[:, None], y.view(-1, K, y.shape[1])).squeeze(1)


def grouped_mm_mlp(rows: Tensor, ends: Tensor, w_up: Tensor, w_down: Tensor, activation: str) -> Tensor:
    """Two grouped GEMMs and the activation between them, without reading anything back to the host.

    Args:
        rows, ends: as `through_experts` has them.
        w_up: `(E, H, I)`, or `(E, H, 2 I)` of a gated activation: gate, then up.
        w_down: `(E, I, H)`.
    """
    h = F.grouped_mm(rows, w_up, offs=ends)
    gate, up = h.chunk(2, dim=1) if is_gated(activation) else (h, None)
    return F.grouped_mm(activate(gate, up, activation), w_down, offs=ends)


class PaddedExperts(Experts):
    """`Experts` whose weights are `w1 (E, H, I)`, or `(E, H, 2 I)` if gated, and `w2 (E, I, H)`, padded with zeros.

    The padding stays zero in training: an activation of 0 is 0, so its gradients are.
    """

    def _register_experts(
        self,
        layout: ExpertLayout,
        hidden_size: int,
        activation: str,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        options: dict[str, str | bool],
    ) -> None:
        if bias:
            raise ValueError("bias: expected False, these experts have none, got True")
        self.layout, self.activation = layout, activation
        E, width, ups = layout.num_experts, layout.max_width, 2 if is_gated(activation) else 1
        self.w1 = nn.Parameter(torch.zeros(E, hidden_size, ups * width, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.zeros(E, width, hidden_size, device=device, dtype=dtype))
        self.register_parameter("w3", None)

    @torch.no_grad()
    def init_params(self) -> None:
        H, widest = self.w1.shape[1], self.layout.max_width
        for e, width in enumerate(self.layout.widths):
            for up in self.w1[e].split(widest, dim=1):
                up[:, :width].normal_(std=H**-0.5)
            if width:
                self.w2[e, :width].normal_(std=width**-0.5)

    @torch.no_grad()
    def load_packed(self, experts: Experts) -> None:
        """Take the weights of experts as this project packs them."""
        ups = [stack(w, self.layout) for w in (experts.w1, experts.w3) if w is not None]
        self.w1.copy_(torch.cat(ups, dim=2))
        self.w2.copy_(stack(experts.w2.t(), self.layout).transpose(1, 2))

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        places = torch.arange(self.layout.num_experts, dtype=torch.int32, device=x.device)
        experts = partial(
            grouped_mm_mlp, w_up=self.w1.to(x.dtype), w_down=self.w2.to(x.dtype), activation=self.activation
        )
        with torch.autocast(x.device.type, enabled=False):  # which would take the square of relu squared to fp32
            return through_experts(x, topk_weights.to(x.dtype), topk_ids, places, experts)


class PaddedMoEMLP(MoEMLP, PaddedExperts):
    """`MoEMLP`, its router, losses and balancing included, with the experts of `PaddedExperts`.

    Raises ValueError on an option of the configuration that concerns our experts alone.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if config.recompute or config.activation_memory != "bounded":
            raise ValueError("config: expected no recompute and activation_memory='bounded', got other options")
        super().__init__(config, device=device, dtype=dtype)
