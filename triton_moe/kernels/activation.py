"""Activations and their derivatives: device helpers of the GEMMs' epilogues, and kernels over ragged buffers.

gelu is z * Phi(z) with the exact erf, gelu_tanh its tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415);
the gated forms are those of Shazeer 2020, arXiv:2002.05202. relu and relu_squared have derivative 0 at 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.activations import GATE_ACTIVATION, is_gated
from triton_moe.kernels.config import BLOCK_M, LayoutTables, cdiv, layout_tables, tile_config
from triton_moe.kernels.launch import Launcher
from triton_moe.kernels.tiles import block_rows, expert_columns, ragged_start
from triton_moe.kernels.tuning import cached_launcher
from triton_moe.layout import RAGGED_ALIGNMENT, ExpertLayout, Routing

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)
_TANH_SCALE: tl.constexpr = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_TANH_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    """FAST: an inverse root squared for a quotient, a third of the instructions; for results of 16 bits."""
    if FAST:
        root = tl.rsqrt(1 + tl.exp2(z * -_LOG2_E))
        return root * root
    else:
        return tl.sigmoid(z)


@triton.jit
def gelu_tanh_gate(z, FAST: tl.constexpr):
    """(1 + tanh(u)) / 2 = sigmoid(2 u), u gelu_tanh's odd cubic: without the cancellation of 1 + tanh(u)."""
    return sigmoid(2 * (z + z * z * z * _TANH_CUBIC) * _TANH_SCALE, FAST)


@triton.jit
def act_fwd(z, ACTIVATION: tl.constexpr, FAST: tl.constexpr = False):
    """act(z), fp32. A NaN stays one: `maximum` would drop it."""
    if ACTIVATION == "none":
        return z
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "relu_squared":
        return tl.where(z <= 0, 0.0, z * z)
    elif ACTIVATION == "silu":
        return z * sigmoid(z, FAST)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * _SQRT_HALF))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return z * gelu_tanh_gate(z, FAST)


@triton.jit
def act_bwd(z, act, ACTIVATION: tl.constexpr, FAST: tl.constexpr = False):
    """act'(z), fp32, where `act` is act(z)."""
    if ACTIVATION == "none":
        return tl.where(z <= 0, 1.0, 1.0)  # ones of z's shape and, in Gluon, layout
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu_squared":
        return tl.where(z <= 0, 0.0, 2 * z)
    elif ACTIVATION == "silu":
        s = sigmoid(z, FAST)
        return s + act * (1 - s)
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(z * _SQRT_HALF)) + z * _INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        s = gelu_tanh_gate(z, FAST)
        rest = gelu_tanh_gate(-z, FAST)  # 1 - s, whose rounding the polynomial below would multiply
        return s + 2 * act * rest * (1 + z * z * 3 * _TANH_CUBIC) * _TANH_SCALE


@triton.jit
def load_pre(pre_ptrs, pitch, mask, GATED: tl.constexpr):
    """Gate (or only) half and up half of a pre-activation tile, fp32; the up half is 1 without a gate."""
    gate = tl.load(pre_ptrs, mask=mask, other=0).to(tl.float32)
    up = tl.load(pre_ptrs + pitch, mask=mask, other=0).to(tl.float32) if GATED else 1.0
    return gate, up


@triton.jit
def store_dpre(dpre_ptrs, pitch, mask, gate, up, act, dact, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Gradient of a pre-activation tile from `dact`, that of its activation; `act` is act(gate). -> both its halves in
    fp32, the second of which is nobody's without a gate."""
    element = dpre_ptrs.dtype.element_ty
    dgate, dup = dact * up * act_bwd(gate, act, ACTIVATION), dact * act
    tl.store(dpre_ptrs, dgate.to(element), mask=mask)
    if GATED:
        tl.store(dpre_ptrs + pitch, dup.to(element), mask=mask)
    return dgate, dup


@triton.jit
def activation_bwd_kernel(
    pre, dact, dpre, widths, offsets, row_offsets, ragged_offsets, row_blocks, num_tiles_n,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, WIDTH_ALIGN: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dpre = act'(pre) * dact, over one (rows, width) tile of the ragged buffers."""
    PARTS: tl.constexpr = 2 if GATED else 1
    entry = row_blocks + 2 * (tl.program_id(0) // num_tiles_n)
    expert = tl.load(entry)
    first_col = tl.program_id(0) % num_tiles_n * BLOCK_N
    if expert < 0:
        return
    width, pitch, _ = expert_columns(expert, widths, offsets, WIDTH_ALIGN)
    if first_col >= pitch:
        return
    _, start, local, exists = block_rows(expert, tl.load(entry + 1), row_offsets, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = exists[:, None] & (cols < pitch)[None, :]
    inner = local[:, None] * (PARTS * pitch) + cols[None, :]
    pre_start = ragged_start(pre, expert, start, pitch, ragged_offsets, PARTS, ALIGNMENT)
    gate, up = load_pre(pre_start + inner, pitch, mask, GATED)
    dact_start = ragged_start(dact, expert, start, pitch, ragged_offsets, 1, ALIGNMENT)
    given = exists[:, None] & (cols < width)[None, :]  # past the width a caller's gradient may be anything
    d = tl.load(dact_start + local[:, None] * pitch + cols[None, :], mask=given, other=0).to(tl.float32)
    dpre_ptrs = ragged_start(dpre, expert, start, pitch, ragged_offsets, PARTS, ALIGNMENT) + inner
    store_dpre(dpre_ptrs, pitch, mask, gate, up, act_fwd(gate, ACTIVATION), d, ACTIVATION, GATED)


@cached_launcher
def _activation_bwd_launcher(
    layout: ExpertLayout, dtype: torch.dtype, device: torch.device, **options: Any
) -> tuple[Launcher, LayoutTables, int]:
    """-> launcher, the layout's tables, column tiles of the widest expert."""
    config, tables = tile_config("activation", dtype, device), layout_tables(layout, device)
    launch = Launcher(
        activation_bwd_kernel, **options, WIDTH_ALIGN=tables.width_align, ALIGNMENT=RAGGED_ALIGNMENT, BLOCK_M=BLOCK_M,
        BLOCK_N=config.BLOCK_N, num_warps=config.num_warps,
    )  # fmt: skip
    return launch, tables, cdiv(layout.max_width, config.BLOCK_N)


def activation_bwd(pre: Tensor, dact: Tensor, routing: Routing, activation: str) -> Tensor:
    """Ragged buffers: pre-activation (2 parts if gated) and gradient of the activation -> gradient of the former."""
    dpre = torch.empty_like(pre)
    launch, tables, num_tiles_n = _activation_bwd_launcher(
        routing.layout, pre.dtype, pre.device,
        ACTIVATION=GATE_ACTIVATION.get(activation, activation), GATED=is_gated(activation),
    )  # fmt: skip
    launch(
        (routing.num_row_blocks * num_tiles_n,), pre, dact.contiguous(), dpre, tables.widths, tables.offsets,
        routing.row_offsets, routing.ragged_offsets, routing.row_blocks, num_tiles_n,
    )  # fmt: skip
    return dpre
