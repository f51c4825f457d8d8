"""Device helpers of the GEMM kernels: where a tile's rows and columns are, and the product itself.

Inside kernels M, N, K are tile sizes and loop bounds (the number of experts a token is spelled TOP_K).
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_moe.layout import ROW_ALIGNMENT as _ROW_ALIGNMENT

ROW_ALIGNMENT: tl.constexpr = tl.constexpr(_ROW_ALIGNMENT)


@triton.jit
def block_rows(expert, block, row_offsets, BLOCK_M: tl.constexpr):
    """A row block's first row, its first place within the expert (int64), the rows' places within the block, which
    exist.

    Rows past the expert's last repeat the last: their loads are safe and never masked, their stores are. Addresses are
    a 64-bit start and 32-bit places within the block: half the registers of 64-bit offsets.
    """
    first = tl.load(row_offsets + expert)
    count = tl.load(row_offsets + expert + 1) - first
    start = block * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    exists = local < count - start
    return first + start, start.to(tl.int64), tl.minimum(local, count - start - 1), exists


@triton.jit
def expert_columns(expert, widths, offsets, WIDTH_ALIGN: tl.constexpr):
    """The expert's width, its `row_stride` in ragged buffers, and its first column in the packed weights, with what is
    known of their divisibility."""
    width = tl.multiple_of(tl.load(widths + expert), WIDTH_ALIGN)
    pitch = width
    if ROW_ALIGNMENT > WIDTH_ALIGN:
        pitch = tl.cdiv(width, ROW_ALIGNMENT) * ROW_ALIGNMENT
    offset = tl.multiple_of(tl.load(offsets + expert), WIDTH_ALIGN)
    return width, pitch, offset.to(tl.int64)


@triton.jit
def ragged_start(buffer, expert, start, pitch, ragged_offsets, PARTS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointer to row `start` of the expert's `(n_e, PARTS, pitch)` block of a ragged buffer."""
    return buffer + PARTS * (tl.multiple_of(tl.load(ragged_offsets + expert), ALIGNMENT) + start * pitch)


@triton.jit
def accumulator(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    return tl.zeros([BLOCK_M, BLOCK_N], tl.float64 if INPUT_PRECISION == "fp64" else tl.float32)


@triton.jit
def as_tf32(x):
    """x rounded to the 10 bits of fraction that tensor cores read of it. They would drop the others, which errs twice
    as much, always towards zero. Ties go away from zero; infinities and NaN stay."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)


@triton.jit
def accumulate(acc, lost, a, b, INPUT_PRECISION: tl.constexpr):
    """acc + a b, and what its rounding lost. INPUT_PRECISION: that of `config.input_precision`.

    One chain of fp32 roundings over a whole reduction errs several times more than PyTorch. So fp32 operands are
    multiplied in fp64 where that is as fast; elsewhere a block's own sum is formed first and added as Kahan does (1965,
    doi:10.1145/363707.363723). In 16 bits nobody could tell.
    """
    if INPUT_PRECISION == "fp64":
        return tl.dot(a.to(tl.float64), b.to(tl.float64), acc, out_dtype=tl.float64), lost
    elif a.dtype == tl.float32:
        if INPUT_PRECISION == "tf32":
            a, b = as_tf32(a), as_tf32(b)
        part = tl.dot(a, b, input_precision=INPUT_PRECISION) - lost
        total = acc + part
        return total, (total - acc) - part
    else:
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION), lost


@triton.jit
def tile_dot(
    acc, acc_up, a_rows, b_cols, b_up_cols, col_mask, size, a_size, stride_bk,
    PAIR: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc[m, n] += sum over k < size of a_rows[m][k] * b_cols[n][k * stride_bk], all vectors of pointers.

    a is read up to `a_size`, where it must be finite: a rounder bound than size makes wider loads.
    PAIR: also acc_up from b_up_cols, with a loaded once; otherwise acc_up comes back as it was. Both are of
    `accumulator`, and the caller's to round.
    """
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_rows[:, None] + offs_k[None, :]
    b_ptrs = b_cols[None, :] + offs_k[:, None] * stride_bk
    b_up_ptrs = b_up_cols[None, :] + offs_k[:, None] * stride_bk
    lost = tl.zeros_like(acc)
    lost_up = tl.zeros_like(acc)
    for k in range(0, size, BLOCK_K):
        a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=offs_k[None, :] < a_size - k, other=0)
        acc, lost = accumulate(
            acc, lost, a, load_b(b_ptrs, offs_k, size - k, col_mask, EVEN_K, EVEN_N), INPUT_PRECISION
        )
        if PAIR:
            b_up = load_b(b_up_ptrs, offs_k, size - k, col_mask, EVEN_K, EVEN_N)
            acc_up, lost_up = accumulate(acc_up, lost_up, a, b_up, INPUT_PRECISION)
            b_up_ptrs += BLOCK_K * stride_bk
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    return acc, acc_up


@triton.jit
def chained_dot(
    acc, a_rows, a_pitch, b, b_up, b_cols, col_mask, size, a_size, stride_bk,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """`tile_dot` of a_rows and b, then of a_rows + a_pitch and b_up, in one loop: between two the pipeline would run
    empty. b and b_up are pointers, and b_cols 64-bit places from either."""
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_rows[:, None] + offs_k[None, :]
    b_places = b_cols[None, :] + offs_k[:, None] * stride_bk
    lost = tl.zeros_like(acc)
    num_blocks = tl.cdiv(size, BLOCK_K)
    for block in range(0, 2 * num_blocks):
        k = tl.where(block < num_blocks, block, block - num_blocks) * BLOCK_K
        a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=offs_k[None, :] < a_size - k, other=0)
        b_ptrs = tl.where(block < num_blocks, b, b_up) + b_places
        acc, lost = accumulate(
            acc, lost, a, load_b(b_ptrs, offs_k, size - k, col_mask, EVEN_K, EVEN_N), INPUT_PRECISION
        )
        back = tl.where(block + 1 == num_blocks, num_blocks * BLOCK_K, 0)
        a_ptrs += BLOCK_K - back + tl.where(block + 1 == num_blocks, a_pitch, 0)
        b_places += (BLOCK_K - back).to(tl.int64) * stride_bk
    return acc


@triton.jit
def piece_of(tile, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """One of PIECES equal spans of the tile's columns, a power of two of them."""
    if PIECES == 1:
        return tile
    else:
        left, right = tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), (0, 2, 1)))
        HALF: tl.constexpr = PIECES // 2
        return piece_of(left, PIECE, HALF) if PIECE < HALF else piece_of(right, PIECE - HALF, HALF)


@triton.jit
def load_b(b_ptrs, offs_k, size, col_mask, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    if EVEN_K and EVEN_N:
        return tl.load(b_ptrs)
    elif EVEN_K:
        return tl.load(b_ptrs, mask=col_mask[None, :], other=0)
    else:
        return tl.load(b_ptrs, mask=(offs_k[:, None] < size) & col_mask[None, :], other=0)
