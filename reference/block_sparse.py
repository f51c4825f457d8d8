"""The two products of a block-sparse MLP and their gradients, in plain PyTorch, driven by the topology alone.

Every index that a block-sparse kernel would follow is followed here, in backward too: a wrong topology gives wrong
numbers on any device and in any float dtype. Blocks are `(N, b, b)`, in the topology's order; letters as in
`topology_var.py`. Named as in `stk.ops`: s sparse, d dense; first the result, then the operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.topology_var import Topology


def _bands(matrix: Tensor, block_size: int) -> Tensor:
    """`(P, M)` -> `(P / b, b, M)`"""
    return matrix.reshape(-1, block_size, matrix.shape[1])


def _sum_bands(products: Tensor, offsets: Tensor) -> Tensor:
    """Sum `(N, b, M)` between neighbouring offsets, in fp32 or wider, and stack the sums: `(P, M)`."""
    wide = torch.promote_types(products.dtype, torch.float32)
    sums = torch.segment_reduce(products.to(wide), "sum", offsets=offsets.long(), axis=0, initial=0)
    return sums.to(products.dtype).flatten(0, 1)


def _sample(a: Tensor, b: Tensor, topology: Topology) -> Tensor:
    """The topology's blocks of `a (P, M) @ b (S, M)^T`."""
    rows, columns = (_bands(matrix, topology.block_size) for matrix in (a, b))
    return torch.bmm(rows[topology.row_indices], columns[topology.column_indices].mT)


def _times(blocks: Tensor, b: Tensor, topology: Topology) -> Tensor:
    """`blocks @ b (S, M)`, row by row: `(P, M)`."""
    bands = _bands(b, topology.block_size)[topology.column_indices]
    return _sum_bands(torch.bmm(blocks, bands), topology.offsets)


def _transposed_times(blocks: Tensor, a: Tensor, topology: Topology) -> Tensor:
    """`blocks^T @ a (P, M)`, column by column: `(S, M)`. The weights' gradients, and all that the transposed order is
    for."""
    bands = _bands(a, topology.block_size)[topology.column_indices_t]
    return _sum_bands(torch.bmm(blocks[topology.block_offsets_t].mT, bands), topology.offsets_t)


class _SDD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, topology: Topology) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.topology = topology
        return _sample(a, b.t(), topology)

    @staticmethod
    def backward(ctx, dblocks: Tensor):  # type: ignore[override]
        a, b = ctx.saved_tensors
        da = _times(dblocks, b.t(), ctx.topology) if ctx.needs_input_grad[0] else None
        db = _transposed_times(dblocks, a, ctx.topology).t() if ctx.needs_input_grad[1] else None
        return da, db, None


class _DSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks: Tensor, b: Tensor, topology: Topology) -> Tensor:
        ctx.save_for_backward(blocks, b)
        ctx.topology = topology
        return _times(blocks, b, topology)

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        blocks, b = ctx.saved_tensors
        dblocks = _sample(dout, b, ctx.topology) if ctx.needs_input_grad[0] else None
        db = _transposed_times(blocks, dout, ctx.topology) if ctx.needs_input_grad[1] else None
        return dblocks, db, None


def sdd(a: Tensor, b: Tensor, topology: Topology) -> Tensor:
    """The topology's blocks of `a (P, H) @ b (H, S)`: `(N, b, b)`. Differentiable in a and b."""
    return _SDD.apply(a, b, topology)  # type: ignore[return-value]


def dsd(blocks: Tensor, b: Tensor, topology: Topology) -> Tensor:
    """The block-sparse matrix `(P, S)` of `blocks (N, b, b)` times `b (S, H)`: `(P, H)`. Differentiable in both."""
    return _DSD.apply(blocks, b, topology)  # type: ignore[return-value]
