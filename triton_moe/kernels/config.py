"""What the launchers share: tile shapes, and tables of the layout on the device."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triton_moe.constants import on_device
from triton_moe.kernels.tuning import TileConfig, tuned
from triton_moe.layout import ExpertLayout

INTERPRETED = triton.knobs.runtime.interpret
"""Whether the kernels were made for the interpreter, which is slow and wants small tiles."""

BLOCK_M = 16 if INTERPRETED else 128
"""Rows of a row block: the tile height of every kernel that walks the routed rows."""
FEW_ROWS_BLOCK_M = 16
"""That of the forward GEMMs where rows are few (`kernels/decode.py`): the smallest that tensor cores take."""


_INTERPRETER_TILE = TileConfig(16, 16, 1, 1)
_FP32_TILE = TileConfig(64, 16, 8, 2)
_FP32_PAIR_TILE = TileConfig(32, 16, 8, 2)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def tile_config(kernel: str, dtype: torch.dtype, device: torch.device, block_m: int = BLOCK_M) -> TileConfig:
    """The one blessed configuration of a kernel for a dtype, device and height of row blocks."""
    if INTERPRETED:
        return _INTERPRETER_TILE
    if dtype.itemsize == 4:
        return _FP32_PAIR_TILE if kernel.endswith("gated") else _FP32_TILE
    return tuned(kernel if block_m == BLOCK_M else f"decode_{kernel}", capability(device), TileConfig)


_FP64_TENSOR_CORES = (8, 0), (9, 0)
"""Compute capabilities whose tensor cores multiply fp64 at the rate of fp32 without them."""


def allows_tf32() -> bool:
    """Whether the user lets fp32 be multiplied as tf32 on CUDA, by either of PyTorch's switches."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # PyTorch does not answer once `torch.backends.cuda.matmul.fp32_precision` has been set
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def input_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How a GEMM multiplies: "tf32" if the user allows it (`torch.set_float32_matmul_precision`) for fp32, which is
    multiplied exactly otherwise, and also summed so ("fp64") where the device has the means."""
    if dtype != torch.float32:
        return "ieee"
    if allows_tf32():
        return "tf32"
    return "fp64" if capability(device) in _FP64_TENSOR_CORES else "ieee"


class LayoutTables(NamedTuple):
    """The layout on the device, int32 `(E)` each, and what of it is fixed at compile time."""

    widths: Tensor
    offsets: Tensor
    width_rank: Tensor
    """Place of each expert in descending order of width: row blocks that cost most come first."""
    width_align: int
    """Largest power of two, 16 at most, that divides every width (and so every offset)."""


@functools.cache  # for good: a captured graph keeps the tables' addresses
def layout_tables(layout: ExpertLayout, device: torch.device) -> LayoutTables:
    by_width = sorted(range(layout.num_experts), key=lambda e: -layout.widths[e])
    rank = [0] * layout.num_experts
    for place, expert in enumerate(by_width):
        rank[expert] = place
    widths, offsets, width_rank = on_device((layout.widths, layout.offsets, rank), torch.int32, device)
    return LayoutTables(widths, offsets, width_rank, math.gcd(16, *layout.widths))


def cdiv(numerator: int, denominator: int) -> int:
    """Quotient, rounded up. Triton's own takes microseconds when the host calls it."""
    return -(-numerator // denominator)


@functools.lru_cache(maxsize=1024)
def divides_widths(block: int, layout: ExpertLayout) -> bool:
    """Whether no tile of `block` columns sticks out of an expert."""
    return math.gcd(block, *layout.widths) == block


_WIDE_N = 256
"""Columns of a tile that is worth its size where it leaves nothing over; elsewhere one of half of them is."""


def narrowed(config: TileConfig, *columns: int) -> TileConfig:
    """The configuration for products of so many columns, a number each: itself, or with half of a wide tile."""
    if config.BLOCK_N == _WIDE_N > math.gcd(_WIDE_N, *columns):
        return config._replace(BLOCK_N=_WIDE_N // 2)
    return config


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a copy: the kernels take any row stride."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def with_strides_of(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor itself if it lies in memory as `other` does, else a copy that does."""
    if tensor.stride() == other.stride():
        return tensor
    return torch.empty_strided(other.shape, other.stride(), dtype=other.dtype, device=other.device).copy_(tensor)
