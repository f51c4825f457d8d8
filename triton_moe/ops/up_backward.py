"""What the layer and the up block have in common: gradients behind the pre-activation."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd
from triton_moe.kernels.grouped_gemm_bwd import grouped_gemm_dw
from triton_moe.kernels.replay import give_back
from triton_moe.kernels.scatter import scatter_fwd
from triton_moe.layout import Routing


def up_backward(
    dpre: Tensor, x: Tensor, w1: Tensor, w3: Tensor | None, routing: Routing, need_x: bool, need_w1: bool,
    need_w3: bool, consume: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradient of the pre-activation (ragged) -> those of x `(T, H)`, w1 and w3 `(H, S)`, as far as they are needed.

    `consume`: dpre's memory is given back once it has been used, whoever else holds the tensor.
    """
    dx = None
    dw1 = torch.empty_like(w1) if need_w1 else None
    dw3 = torch.empty_like(w1) if need_w3 else None
    if need_w1 or need_w3:
        grouped_gemm_dw(x, dpre, (dw1,) if w3 is None else (dw1, dw3), routing)
    if need_x:
        dx_rows = x.new_empty(routing.num_rows, x.shape[1])
        grouped_gemm_down_fwd(dpre, w1.t(), None if w3 is None else w3.t(), dx_rows, routing)
        if consume:
            give_back(dpre)
        dx = scatter_fwd(dx_rows, None, routing)
    return dx, dw1, dw3
