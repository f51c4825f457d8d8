"""The block-sparse baseline itself: products by `stanford-stk`, and around them MegaBlocks' operators, if installed.

    uv sync --group baseline

installs stk. MegaBlocks is built on the machine that runs it; without it gather and scatter are PyTorch's.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from reference.moe import MoEMLP, PaddedRows
from reference.topology_var import Topology
from triton_moe.functional import runs_kernels
from triton_moe.moe import MoEConfig

BLOCK_SIZE = 128
"""stk's kernels have no other."""


def _import_stk() -> ModuleType:
    try:
        importlib.import_module("stk.ops")
        return importlib.import_module("stk")
    except ImportError as error:
        raise ImportError(
            "The block-sparse baseline needs stanford-stk, which the dependency group `baseline` installs "
            f"(uv sync --group baseline): {error}."
        ) from error


def _import_megablocks() -> ModuleType | None:
    """MegaBlocks' operators; None if it is not installed, or installed without its extension. That it lacks another
    library, as it warns, is of no account here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("megablocks.ops")
    except ImportError:
        return None


class StkMoEMLP(MoEMLP):
    """`reference.moe.MoEMLP` on stk's kernels.

    Raises:
        ImportError: stk is not installed.
        ValueError: a shape that its kernels do not take.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        historical: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._stk, self._megablocks = _import_stk(), _import_megablocks()
        if config.block_size != BLOCK_SIZE:
            raise ValueError(f"block_size: expected {BLOCK_SIZE} for stk, got {config.block_size}")
        if config.hidden_size % BLOCK_SIZE:
            raise ValueError(f"hidden_size: expected a multiple of {BLOCK_SIZE} for stk, got {config.hidden_size}")
        super().__init__(config, historical=historical, device=device, dtype=dtype)

    @property
    def library(self) -> str:
        """Whose operators run: "stk+megablocks", or "stk" where gather and scatter are PyTorch's."""
        return "stk" if self._megablocks is None else "stk+megablocks"

    def experts(self, tokens: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> dict:
        """As `MoEMLP.experts`. Raises ValueError on a device that does not run Triton kernels."""
        try:
            runs_kernels(tokens.device, None, "triton")
        except ValueError as error:
            raise ValueError(f"device: expected a CUDA device for stk, got {tokens.device}") from error
        return super().experts(tokens, topk_weights, topk_ids)

    def sdd(self, a: Tensor, b: Tensor, topology: Topology) -> Tensor:
        return self._stk.ops.sdd(a, b, self._matrix(None, topology, a.dtype)).data

    def dsd(self, blocks: Tensor, b: Tensor, topology: Topology) -> Tensor:
        return self._stk.ops.dsd(self._matrix(blocks, topology, blocks.dtype), b)

    def gather(self, x: Tensor, rows: PaddedRows) -> Tensor:
        if self._megablocks is None:
            return super().gather(x, rows)
        return self._megablocks.padded_gather(x.contiguous(), *self._bins(rows), self.config.num_active_experts)

    def scatter(self, down: Tensor, topk_weights: Tensor, rows: PaddedRows) -> Tensor:
        if self._megablocks is None:
            return super().scatter(down, topk_weights, rows)
        slots, experts, bins, padded_bins = self._bins(rows)
        weights, K = topk_weights.to(down.dtype).flatten(), self.config.num_active_experts
        return self._megablocks.padded_scatter(down, slots, experts, weights, bins, padded_bins, K)

    def _bins(self, rows: PaddedRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """MegaBlocks' four index arguments, int32."""
        ends = (rows.tokens_per_expert.cumsum(0), (rows.block_rows * BLOCK_SIZE).cumsum(0))
        slots, experts, bins, padded_bins = (index.int() for index in (rows.slots, rows.experts, *ends))
        return slots, experts, bins, padded_bins

    def _matrix(self, blocks: Tensor | None, topology: Topology, dtype: torch.dtype):
        """An `stk.Matrix`; without blocks a pattern alone. Its indices are int32: 16 bits, which stk's own topologies
        have, overflow in the newer Triton's products of them."""
        if blocks is None:
            shape = (topology.row_indices.numel(), BLOCK_SIZE, BLOCK_SIZE)
            blocks = torch.empty(shape, dtype=dtype, device="meta")
        return self._stk.Matrix(
            topology.shape,
            blocks,
            topology.row_indices,
            topology.column_indices,
            topology.offsets,
            topology.column_indices_t,
            topology.offsets_t,
            topology.block_offsets_t,
        )
