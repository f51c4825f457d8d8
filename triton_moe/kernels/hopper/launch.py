"""When the Hopper kernels run, and their launches: the functions of `triton_moe.kernels.grouped_gemm` and `_bwd`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_moe.activations import GATE_ACTIVATION, is_gated
from triton_moe.kernels.config import (
    BLOCK_M,
    INTERPRETED,
    LayoutTables,
    capability,
    cdiv,
    divides_widths,
    layout_tables,
    with_strides_of,
)
from triton_moe.kernels.hopper.grouped_gemm import grouped_gemm_down_hopper_kernel, grouped_gemm_up_hopper_kernel
from triton_moe.kernels.hopper.grouped_gemm_bwd import grouped_gemm_dh_hopper_kernel, grouped_gemm_dw_hopper_kernel
from triton_moe.kernels.hopper.pipeline import BLOCK_K, HALF_M, PIECE_N
from triton_moe.kernels.launch import RELEASE, Launcher
from triton_moe.kernels.transpose import is_worth_a_copy, transposed
from triton_moe.kernels.tuning import PipelineConfig, cached_launcher, tuned
from triton_moe.layout import PANEL_WIDTH, RAGGED_ALIGNMENT, ROW_ALIGNMENT, ExpertLayout, Routing, TileLists

BLOCK_N = 256
_BLOCK_K = BLOCK_K.value
_WORTH_IT = 2**35 if RELEASE is None else 2**32
"""Rows times H times mean width from which `backend="auto"` comes here. Below it the host is the bottleneck of an eager
step, and these launches, where their descriptors are encoded at each, cost it more; smaller products gain nothing."""
assert INTERPRETED or 2 * HALF_M.value == BLOCK_M
assert RAGGED_ALIGNMENT % PANEL_WIDTH == 0
assert PANEL_WIDTH == PIECE_N.value == _BLOCK_K


@functools.lru_cache(maxsize=256)
def fits(hidden_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels exist for a layer: compute capability 9.0, 16 bits, H a multiple of 64."""
    return (
        not INTERPRETED
        and device.type == "cuda"
        and capability(device) == (9, 0)
        and dtype.itemsize == 2
        and hidden_size % _BLOCK_K == 0
    )


def _aligned(matrix: Tensor) -> bool:
    """Whether rows or columns are contiguous and each starts at 16 bytes."""
    outer, inner = max(matrix.stride()), min(matrix.stride())
    return inner == 1 and outer % 8 == 0 and matrix.data_ptr() % 16 == 0


def _in_boxes(w: Tensor, layout: ExpertLayout) -> bool:
    """Whether TMA reads and writes an expert's part of `w (H, S)`: not only rows or columns, but in a row of S the
    experts too start at 16 bytes."""
    return _aligned(w) and (w.stride(1) != 1 or divides_widths(ROW_ALIGNMENT, layout))


def takes(num_rows: int, layout: ExpertLayout, backend: str, w1: Tensor, *biases: Tensor | None) -> bool:
    """Whether a layer runs here, all of its products or none: it has rows and no biases, and that was asked for; or the
    choice is ours, the products are large, and worth copies of weights if the widths ask for these. Weights that lie
    where TMA cannot read are copied in any case (`_boxable`).

    Asked again in the backward pass, which must get the same answer, for the buffers in between have another form here
    (`Routing.panels`). So it looks neither at addresses nor at strides, which hooks on saved tensors may change.
    """
    if backend != "hopper":
        if backend != "auto" or num_rows * w1.numel() < _WORTH_IT * layout.num_experts:
            return False
        if not divides_widths(ROW_ALIGNMENT, layout) and not is_worth_a_copy(num_rows, layout):
            return False
    return num_rows > 0 and all(b is None for b in biases) and fits(w1.shape[0], w1.dtype, w1.device)


def _straight(x: Tensor) -> Tensor:
    """Rows that start at 16 bytes: the matrix itself, or a copy."""
    return x if _aligned(x) and x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _boxable(w: Tensor, layout: ExpertLayout, like: Tensor | None = None) -> Tensor:
    """`w (H, S)` itself, or a copy that TMA can read (`_in_boxes`); in memory as `like`, which it can, if given."""
    if not _in_boxes(w, layout):
        w = transposed(w) if w.stride(1) == 1 else w.t().clone(memory_format=torch.contiguous_format).t()
    return w if like is None else with_strides_of(w, like)


@functools.lru_cache(maxsize=64)
def _shared_layout(box: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.float16 if dtype == torch.float16 else gl.bfloat16)


def _boxes(w: Tensor, columns: int, by_k: bool) -> TensorDescriptor:
    """`w (reduction, columns)` in boxes of 64 x `columns`, as it lies in memory: `by_k` along the reduction."""
    box = (columns, _BLOCK_K) if by_k else (_BLOCK_K, columns)
    return TensorDescriptor.from_tensor(w.t() if by_k else w, list(box), _shared_layout(box, w.dtype))


def _piece_boxes(matrix: Tensor) -> TensorDescriptor:
    """A matrix, of contiguous rows, in boxes of what a consumer stores at a time."""
    piece = HALF_M.value, PIECE_N.value
    return TensorDescriptor.from_tensor(matrix, list(piece), _shared_layout(piece, matrix.dtype))


def _panels(buffer: Tensor, rows: int) -> TensorDescriptor:
    """A ragged buffer of panels as one matrix of their columns, in boxes of so many rows."""
    box = rows, PANEL_WIDTH
    matrix = buffer.as_strided((buffer.numel() // PANEL_WIDTH, PANEL_WIDTH), (PANEL_WIDTH, 1))
    return TensorDescriptor.from_tensor(matrix, list(box), _shared_layout(box, buffer.dtype))


def _tiles(routing: Routing) -> TileLists:
    assert routing.tiles is not None
    return routing.tiles


@functools.lru_cache(maxsize=64)
def _num_programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cached_launcher
def _launcher(
    kernel: Any, name: str, layout: ExpertLayout, device: torch.device, **options: Any
) -> tuple[Launcher, LayoutTables, int]:
    """-> launcher, the layout's tables, programs. `name`: the kernel's in the tuning table."""
    config = tuned(f"hopper_{name}", (9, 0), PipelineConfig)
    launch = Launcher(
        kernel, **options, EVEN=divides_widths(_BLOCK_K, layout), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **config._asdict(),
        num_warps=4,
    )  # fmt: skip
    return launch, layout_tables(layout, device), _num_programs(device)


def up_fwd(
    x: Tensor, w1: Tensor, w3: Tensor | None, out: Tensor | None, pre: Tensor | None, routing: Routing,
    activation: str,
) -> None:  # fmt: skip
    x, layout, gated = _straight(x), routing.layout, w3 is not None
    w1 = _boxable(w1, layout)
    w3, by_k = None if w3 is None else _boxable(w3, layout, w1), w1.stride(1) != 1
    launch, tables, programs = _launcher(
        grouped_gemm_up_hopper_kernel, "up", layout, x.device, TOP_K=routing.top_k,
        ACTIVATION=GATE_ACTIVATION.get(activation, activation), GATED=gated, KEEP_PRE=pre is not None,
        KEEP_ACT=out is not None, B_BY_K=by_k,
    )  # fmt: skip
    columns = BLOCK_N // 2 if gated else BLOCK_N
    tiles = _tiles(routing)
    w = _boxes(w1, columns, by_k)
    kept = [buffer for buffer in (pre, out) if buffer is not None]
    boxes = [_panels(buffer, HALF_M.value) for buffer in kept]
    launch(  # of two that are not both kept, the kernel touches one
        (programs,), x, w, w if w3 is None else _boxes(w3, columns, by_k), kept[0], boxes[0], kept[-1], boxes[-1],
        tables.widths, tables.offsets, routing.row_offsets, tiles.numbers, tiles.ragged[columns], routing.row_to_slot,
        routing.ragged_offsets, x.shape[1], x.stride(0),
    )  # fmt: skip


def down_fwd(a: Tensor, w: Tensor, w_up: Tensor | None, y: Tensor, routing: Routing) -> None:
    w = _boxable(w.t(), routing.layout).t()
    w_up = None if w_up is None else _boxable(w_up.t(), routing.layout, w.t()).t()
    hidden_size, by_k = w.shape[1], w.stride(1) != 1
    launch, tables, programs = _launcher(
        grouped_gemm_down_hopper_kernel, "down", routing.layout, a.device, PARTS=1 if w_up is None else 2,
        B_BY_K=by_k,
    )  # fmt: skip
    boxes = _boxes(w, BLOCK_N, by_k)
    up_boxes = boxes if w_up is None else _boxes(w_up, BLOCK_N, by_k)
    launch(
        (programs,), a, _panels(a, BLOCK_M), boxes, up_boxes, y, _piece_boxes(y), tables.widths, tables.offsets,
        routing.row_offsets, _tiles(routing).numbers, routing.row_blocks, routing.ragged_offsets, hidden_size,
        cdiv(hidden_size, BLOCK_N),
    )  # fmt: skip


def dh(
    dout: Tensor, w2: Tensor, pre: Tensor, topk_weights: Tensor, routing: Routing, activation: str, dpre: Tensor,
    act_weighted: Tensor, dweights_partial: Tensor,
) -> None:  # fmt: skip
    """`dweights_partial (R, tiles)`: a partial sum for each tile of BLOCK_N columns."""
    dout, w2, gated = _straight(dout), _boxable(w2.t(), routing.layout).t(), is_gated(activation)
    by_k = w2.stride(1) == 1
    launch, tables, programs = _launcher(
        grouped_gemm_dh_hopper_kernel, "dh_gated" if gated else "dh", routing.layout, dout.device,
        TOP_K=routing.top_k, ACTIVATION=GATE_ACTIVATION.get(activation, activation), GATED=gated, B_BY_K=by_k,
    )  # fmt: skip
    tiles = _tiles(routing)
    launch(
        (programs,), dout, _boxes(w2.t(), BLOCK_N, by_k), pre, topk_weights, dpre, act_weighted, dweights_partial,
        tables.widths, tables.offsets, routing.row_offsets, tiles.numbers, tiles.ragged[BLOCK_N], routing.row_to_slot,
        routing.ragged_offsets, dout.shape[1], dout.stride(0), cdiv(routing.layout.max_width, BLOCK_N),
    )  # fmt: skip


def dw(x: Tensor, d: Tensor, grads: Sequence[Tensor], routing: Routing, num_parts: int, first_part: int) -> None:
    """`grads`: of d's parts, of which there are `num_parts`, from `first_part` on."""
    x, layout, hidden_size = _straight(x), routing.layout, x.shape[1]
    ragged_m = grads[0].stride(1) != 1
    boxed = all(_in_boxes(grad, layout) for grad in grads)
    launch, tables, programs = _launcher(
        grouped_gemm_dw_hopper_kernel, "dw", layout, x.device, PARTS=num_parts, FIRST=first_part, WANTED=len(grads),
        RAGGED_M=ragged_m, TOP_K=routing.top_k, BOXED=boxed,
    )  # fmt: skip
    columns = BLOCK_M if ragged_m else BLOCK_N // len(grads)
    num_tiles_h = cdiv(hidden_size, BLOCK_N if ragged_m else BLOCK_M)
    num_tiles = layout.num_column_blocks(columns) * (len(grads) if ragged_m else 1) * num_tiles_h
    boxes = [_piece_boxes(grad.t() if ragged_m else grad) if boxed else grad for grad in grads]
    panels = _panels(d, _BLOCK_K) if divides_widths(_BLOCK_K, layout) else d
    launch(
        (programs,), x, d, panels, grads[0], grads[-1], boxes[0], boxes[-1], tables.widths, tables.offsets,
        routing.row_offsets, _tiles(routing).weights[columns], routing.row_to_slot, routing.ragged_offsets, hidden_size,
        x.stride(0), *grads[0].stride(), num_tiles, num_tiles_h,
    )  # fmt: skip
