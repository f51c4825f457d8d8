"""The router: logits, scores, the K best experts, their weights, and the sums that the losses need.

Forward in two launches: each program takes a span of tokens and leaves its sums over them, then one program adds these
up in order and forms the losses. Backward is one launch: the gradient of the logits from that of everything else, with
the scores computed anew. Where that is as fast (`multiplies`) both kernels form the logits themselves, and the second
the gradient of x: three products less for the host, and no logits in memory. Elsewhere they are given the logits.
Formulas and letters are those of `router.py` and `losses.py`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_moe.constants import on_device
from triton_moe.kernels.config import cdiv, rows_contiguous
from triton_moe.kernels.launch import Launcher
from triton_moe.kernels.tiles import accumulate
from triton_moe.layout import ExpertLayout

_TILE = 2048
"""Scores of a program at once."""
_MAX_H, _MAX_EEH = 2048, 2**22
"""Largest H and E^2 H of which the kernels multiply. A program reads the whole weight for every tile of tokens, and has
fewer tokens the more experts there are. Measured: dev/LOG.md, 2026-11-26."""
_FINISH_TILE = 16384
"""Sums that the one program of the second kernel adds up at once, in 16 warps."""
_MAX_PROGRAMS = 512

_LOWEST: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def load_logits(logits, tokens, experts, end, NUM_EXPERTS: tl.constexpr):
    exists = (tokens < end)[:, None] & (experts < NUM_EXPERTS)[None, :]
    places = tokens.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
    return tl.load(logits + places, mask=exists, other=0)


@triton.jit
def multiply(
    x, weight, tokens, experts, end, H, stride_xt, stride_we, NUM_EXPERTS: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """-> (tokens, experts) of `x @ weight^T`, operands in x's dtype."""
    z = tl.zeros([tokens.shape[0], experts.shape[0]], tl.float32)
    x_rows = x + tokens.to(tl.int64)[:, None] * stride_xt
    weight_rows = weight + experts.to(tl.int64)[None, :] * stride_we
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        a = tl.load(x_rows + h[None, :], mask=(tokens < end)[:, None] & (h < H)[None, :], other=0)
        b = tl.load(weight_rows + h[:, None], mask=(experts < NUM_EXPERTS)[None, :] & (h < H)[:, None], other=0)
        z = tl.dot(a, b.to(a.dtype), z)
    return z


@triton.jit
def logits_of(
    logits, x, weight, tokens, experts, end, H, stride_xt, stride_we, NUM_EXPERTS: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """-> (tokens, experts) logits, those given or the product's: -inf where there is no expert, 0 where there is no
    token."""
    if logits is None:
        z = multiply(x, weight, tokens, experts, end, H, stride_xt, stride_we, NUM_EXPERTS, BLOCK_H)
    else:
        z = load_logits(logits, tokens, experts, end, NUM_EXPERTS)
    return tl.where((experts < NUM_EXPERTS)[None, :], z, float("-inf"))


@triton.jit
def store_dx(
    dx, other_dx, dlogits, weight, tokens, experts, end, H, stride_we, NUM_EXPERTS: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """dx = dlogits @ weight, plus other_dx unless that is None. fp32 is rounded to tf32, which holds float16's bits."""
    rows = tokens.to(tl.int64)[:, None] * H
    weight_rows = weight + experts.to(tl.int64)[:, None] * stride_we
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        inside = (tokens < end)[:, None] & (h < H)[None, :]
        w = tl.load(weight_rows + h[None, :], mask=(experts < NUM_EXPERTS)[:, None] & (h < H)[None, :], other=0)
        w = w.to(dx.dtype.element_ty).to(dlogits.dtype)
        acc = tl.zeros([tokens.shape[0], BLOCK_H], tl.float32)
        acc, _ = accumulate(acc, acc, dlogits, w, "tf32")
        if other_dx is not None:
            acc += tl.load(other_dx + rows + h[None, :], mask=inside, other=0).to(tl.float32)
        tl.store(dx + rows + h[None, :], acc.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def softmax(z):
    """-> softmax over the last axis, and the logarithm of its denominator."""
    top = tl.max(z, 1)
    e = tl.exp(z - top[:, None])
    total = tl.sum(e, 1)
    return e / total[:, None], top + tl.log(total)


@triton.jit
def scores(z, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        probs, _ = softmax(z)
        return probs
    else:
        return tl.sigmoid(z)


@triton.jit
def selection_keys(score, experts, NUM_EXPERTS: tl.constexpr):
    """int32 in the order of scores, NaN above all; the lowest where there is no expert."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    keys = tl.where(score != score, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return tl.where((experts < NUM_EXPERTS)[None, :], keys, _LOWEST)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def router_fwd_kernel(
    topk_weights, topk_ids, partials, bias, logits, x, weight, H, stride_xt, stride_we, num_tokens, span,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RANKS: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr, WEIGHTS_SCALE: tl.constexpr, AUX: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """partials[p] = sums over the p-th span of tokens: choices (E), scores (E), z-loss, logits; largest |logit|."""
    experts, ranks = tl.arange(0, EXPERTS), tl.arange(0, RANKS)
    counts, probs_sum = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.float32)
    z_loss, logits_sum = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    largest = tl.zeros([TOKENS], tl.float32)
    first_token = tl.program_id(0) * span
    end = tl.minimum(first_token + span, num_tokens)
    for first in range(first_token, end, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        exists = (tokens < end)[:, None] & (experts < NUM_EXPERTS)[None, :]
        z = logits_of(logits, x, weight, tokens, experts, end, H, stride_xt, stride_we, NUM_EXPERTS, BLOCK_H)
        probs = scores(z, SOFTMAX)
        if AUX:
            _, log_total = softmax(z)
            z_loss += tl.where(tokens < end, log_total * log_total, 0.0)
            probs_sum += tl.sum(tl.where(exists, probs, 0.0), 0)
            logits_sum += tl.sum(tl.where(exists, z, 0.0), 1)
            largest = tl.maximum(largest, tl.max(tl.where(exists, tl.abs(z), 0.0), 1))
        keys = selection_keys(probs, experts, NUM_EXPERTS)
        if bias is not None:
            score = probs + tl.load(bias + experts, mask=experts < NUM_EXPERTS, other=0).to(tl.float32)[None, :]
            keys = selection_keys(score, experts, NUM_EXPERTS)
        ids = tl.zeros([TOKENS, RANKS], tl.int32)
        weights = tl.zeros([TOKENS, RANKS], tl.float32)
        for k in range(TOP_K):
            best = tl.max(keys, 1)
            expert = tl.min(tl.where(keys == best[:, None], experts[None, :], EXPERTS), 1)
            chosen = experts[None, :] == expert[:, None]
            keys = tl.where(chosen, _LOWEST, keys)
            # Without a bias no score is negative, and then its bits are its key.
            of_best = best.to(tl.float32, bitcast=True) if bias is None else tl.sum(tl.where(chosen, probs, 0.0), 1)
            ids = tl.where((ranks == k)[None, :], expert[:, None], ids)
            weights = tl.where((ranks == k)[None, :], of_best[:, None], weights)
        counts += tl.sum((exists & (keys == _LOWEST)).to(tl.int32), 0)
        if NORMALIZE:
            weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)
        weights = weights * WEIGHTS_SCALE
        places = tokens.to(tl.int64)[:, None] * TOP_K + ranks[None, :]
        mask = (tokens < end)[:, None] & (ranks < TOP_K)[None, :]
        tl.store(topk_ids + places, ids, mask=mask)
        tl.store(topk_weights + places, weights.to(topk_weights.dtype.element_ty), mask=mask)
    row = partials + tl.program_id(0) * (2 * EXPERTS + 4)
    tl.store(row + experts, counts.to(tl.float32))
    if AUX:
        tl.store(row + EXPERTS + experts, probs_sum)
        tl.store(row + 2 * EXPERTS, tl.sum(z_loss))
        tl.store(row + 2 * EXPERTS + 1, tl.sum(logits_sum))
        tl.store(row + 2 * EXPERTS + 2, tl.max(largest))


@triton.jit(do_not_specialize=["num_programs", "num_tokens"])
def router_finish_kernel(
    partials, balance_scale, compute_scale, f, load, z_loss, load_balance_loss, compute_loss, logits_abs_max,
    logits_mean, num_programs, num_tokens, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    AUX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """f (E), the same in fp32, three losses, the logits' statistics. All but the first two are 0 unless AUX."""
    experts = tl.arange(0, EXPERTS)
    real = experts < NUM_EXPERTS
    counts = tl.zeros([ROWS, EXPERTS], tl.float32)  # summed over rows at the end: that takes a barrier
    probs_sum = tl.zeros([ROWS, EXPERTS], tl.float32)
    squares, logits_sum = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_programs, ROWS):
        programs = first + tl.arange(0, ROWS)
        exists = programs < num_programs
        rows = partials + programs * (2 * EXPERTS + 4)
        of_expert = rows[:, None] + experts[None, :]
        counts += tl.load(of_expert, mask=exists[:, None], other=0)
        if AUX:
            probs_sum += tl.load(of_expert + EXPERTS, mask=exists[:, None], other=0)
            squares += tl.load(rows + 2 * EXPERTS, mask=exists, other=0)
            logits_sum += tl.load(rows + 2 * EXPERTS + 1, mask=exists, other=0)
            largest = tl.maximum(largest, tl.load(rows + 2 * EXPERTS + 2, mask=exists, other=0))
    tokens = tl.maximum(num_tokens, 1).to(tl.float32)
    fraction = tl.sum(counts, 0) / (tokens * TOP_K)
    tl.store(f + experts, fraction.to(f.dtype.element_ty), mask=real)
    tl.store(load + experts, fraction, mask=real)
    p = tl.sum(probs_sum, 0) / tokens
    mean_logit = tl.sum(logits_sum) / (tokens * NUM_EXPERTS)
    tl.store(z_loss, tl.sum(squares) / tokens)
    tl.store(load_balance_loss, tl.sum(tl.load(balance_scale + experts, mask=real, other=0) * fraction * p))
    tl.store(compute_loss, tl.sum(tl.load(compute_scale + experts, mask=real, other=0) * p))
    tl.store(logits_abs_max, tl.where(mean_logit == mean_logit, tl.max(largest), mean_logit))
    tl.store(logits_mean, mean_logit)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def router_bwd_kernel(
    topk_ids, dweights, dz_loss, dbalance, dcompute, balance_scale, compute_scale, load, dlogits, dx, other_dx, logits,
    x, weight, H, stride_xt, stride_we, num_tokens, span, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHTS_SCALE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dlogits from the gradients of the weights and of the three losses, any of them None; dx from these unless that is
    None."""
    experts = tl.arange(0, EXPERTS)
    real = experts < NUM_EXPERTS
    dprobs_all = tl.zeros([EXPERTS], tl.float32)
    if dbalance is not None:
        f = tl.load(load + experts, mask=real, other=0)
        scale = tl.load(balance_scale + experts, mask=real, other=0) * f
        dprobs_all += tl.load(dbalance).to(tl.float32) / num_tokens * scale
    if dcompute is not None:
        scale = tl.load(compute_scale + experts, mask=real, other=0)
        dprobs_all += tl.load(dcompute).to(tl.float32) / num_tokens * scale
    first_token = tl.program_id(0) * span
    end = tl.minimum(first_token + span, num_tokens)
    for first in range(first_token, end, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        inside = tokens < end
        z = logits_of(logits, x, weight, tokens, experts, end, H, stride_xt, stride_we, NUM_EXPERTS, BLOCK_H)
        probs = scores(z, SOFTMAX)
        dprobs = tl.zeros([TOKENS, EXPERTS], tl.float32) + dprobs_all[None, :]
        if dweights is not None:
            places = tokens.to(tl.int64) * TOP_K
            total, weighted = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
            if NORMALIZE:
                for k in range(TOP_K):
                    expert = tl.load(topk_ids + places + k, mask=inside, other=0)
                    score = tl.sum(tl.where(experts[None, :] == expert[:, None], probs, 0.0), 1)
                    total += score
                    weighted += score * tl.load(dweights + places + k, mask=inside, other=0).to(tl.float32)
                total += 1e-20
                weighted = weighted / total
            for k in range(TOP_K):
                expert = tl.load(topk_ids + places + k, mask=inside, other=0)
                dscore = tl.load(dweights + places + k, mask=inside, other=0).to(tl.float32)
                if NORMALIZE:
                    dscore = (dscore - weighted) / total
                dscore = dscore * WEIGHTS_SCALE
                dprobs += tl.where(experts[None, :] == expert[:, None], dscore[:, None], 0.0)
        if SOFTMAX:
            dz = probs * (dprobs - tl.sum(tl.where(real[None, :], dprobs * probs, 0.0), 1)[:, None])
        else:
            dz = dprobs * probs * tl.sigmoid(-z)
        if dz_loss is not None:
            normalized, log_total = softmax(z)
            dz += (tl.load(dz_loss).to(tl.float32) * 2 / num_tokens * log_total)[:, None] * normalized
        dz = dz.to(dlogits.dtype.element_ty)
        places = tokens.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
        tl.store(dlogits + places, dz, mask=inside[:, None] & real[None, :])
        if dx is not None:
            store_dx(dx, other_dx, dz, weight, tokens, experts, end, H, stride_we, NUM_EXPERTS, BLOCK_H)


class RouterOptions(NamedTuple):
    """What of a router is known before any token comes."""

    layout: ExpertLayout
    num_active_experts: int
    softmax: bool
    normalize_weights: bool
    weights_scale: float
    aux_losses: bool


class _Launchers(NamedTuple):
    forward: Launcher
    finish: Launcher
    backward: Launcher
    balance_scale: Tensor
    """(E) fp32: `load_balance_loss = sum(balance_scale * f * p)`"""
    compute_scale: Tensor
    """(E) fp32: `compute_loss = sum(compute_scale * p)`"""
    experts: int
    """E, padded to a power of 2."""
    tokens: int
    """Tokens of a program at once."""


@functools.cache  # for good: a captured graph keeps the tables' addresses
def _launchers(options: RouterOptions, multiply: bool, device: torch.device) -> _Launchers:
    layout, top_k, softmax, normalize, weights_scale, aux = options
    num_experts = layout.num_experts
    experts = triton.next_power_of_2(num_experts)
    tile: dict[str, int] = {"TOKENS": max(1, min(32, _TILE // experts)), "BLOCK_H": 1}
    backward = tile | {"num_warps": 8}
    if multiply:
        experts = max(16, experts)  # the least that tensor cores take
        tile = {"TOKENS": 64 if experts <= 64 else 32, "BLOCK_H": 64, "num_warps": 4 if experts <= 64 else 8}
        backward = tile | {"BLOCK_H": 128, "num_stages": 2}
    shared = {"NUM_EXPERTS": num_experts, "EXPERTS": experts, "TOP_K": top_k}
    choice = {"SOFTMAX": softmax, "NORMALIZE": normalize, "WEIGHTS_SCALE": weights_scale}
    num_classes = sum(len(members) > 1 for members in layout.width_classes.values())
    scales = (
        [rivals / max(num_classes, 1) for rivals in layout.num_rivals],
        [width * num_experts / layout.total_width for width in layout.widths],
    )
    balance_scale, compute_scale = on_device(scales, torch.float32, device)
    return _Launchers(
        Launcher(router_fwd_kernel, **shared, RANKS=triton.next_power_of_2(top_k), **choice, AUX=aux, **tile),
        Launcher(router_finish_kernel, **shared, AUX=aux, ROWS=max(1, _FINISH_TILE // experts), num_warps=16),
        Launcher(router_bwd_kernel, **shared, **choice, **backward),
        balance_scale,
        compute_scale,
        experts,
        tile["TOKENS"],
    )


def _spans(num_tokens: int, tokens: int) -> tuple[int, int]:
    """-> programs, and tokens of each: a multiple of what it takes at once."""
    span = tokens * max(1, cdiv(num_tokens, tokens * _MAX_PROGRAMS))
    return cdiv(num_tokens, span), span


def multiplies(x: Tensor, num_experts: int) -> bool:
    """Whether the kernels form the logits of `x (T, H)` themselves, as fast as PyTorch does or faster."""
    H = x.shape[1]
    return x.element_size() == 2 and H <= _MAX_H and num_experts**2 * H <= _MAX_EEH


def _of_logits(logits: Tensor | None, x: Tensor, weight: Tensor) -> tuple[Tensor | int | None, ...]:
    """What the kernels take for them: the logits, or x and the weight, H and two strides."""
    if logits is not None:
        return logits, None, None, 0, 0, 0
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    return None, x, weight, x.shape[1], x.stride(0), weight.stride(0)


def router_fwd(
    logits: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, options: RouterOptions
) -> tuple[Tensor, ...]:
    """`x (T, H)`, `weight (E, H)`, bias `(E)` or None -> weights `(T, K)`, ids `(T, K)` int32, f `(E)`, that in fp32,
    three losses, the largest absolute logit, the mean logit.

    logits: `x @ weight^T (T, E)` fp32, or None where the kernels multiply. Weights and f are of x's dtype.
    """
    num_tokens, num_experts, top_k = x.shape[0], weight.shape[0], options.num_active_experts
    launchers = _launchers(options, logits is None, x.device)
    num_programs, span = _spans(num_tokens, launchers.tokens)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    topk_weights = x.new_empty(num_tokens, top_k)
    topk_ids = empty(num_tokens, top_k, dtype=torch.int32)
    partials = empty(num_programs * (2 * launchers.experts + 4))
    f, load, scalars = x.new_empty(num_experts), empty(num_experts), tuple(empty(()) for _ in range(5))
    launchers.forward(
        (num_programs,), topk_weights, topk_ids, partials, None if bias is None else bias.contiguous(),
        *_of_logits(logits, x, weight), num_tokens, span,
    )  # fmt: skip
    launchers.finish(
        (1,), partials, launchers.balance_scale, launchers.compute_scale, f, load, *scalars, num_programs, num_tokens
    )
    return topk_weights, topk_ids, f, load, *scalars


def router_bwd(
    logits: Tensor | None, x: Tensor, weight: Tensor, topk_ids: Tensor, load: Tensor, dweights: Tensor | None,
    dz_loss: Tensor | None, dbalance: Tensor | None, dcompute: Tensor | None, dtype: torch.dtype,
    options: RouterOptions, dx: Tensor | None = None, other_dx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """-> gradient of the logits `(T, E)` in `dtype`, from those of the weights `(T, K)` and of the three losses.

    logits: as in `router_fwd`. Where the kernels multiply `dx (T, H)`, contiguous, is filled with the gradient of x
    from these, plus other_dx unless that is None, which may be dx itself.
    """
    num_tokens = x.shape[0]
    launchers = _launchers(options, logits is None, x.device)
    num_programs, span = _spans(num_tokens, launchers.tokens)
    dlogits = torch.empty(num_tokens, weight.shape[0], dtype=dtype, device=x.device)
    dweights = None if dweights is None else dweights.contiguous()
    launchers.backward(
        (num_programs,), topk_ids, dweights, dz_loss, dbalance, dcompute, launchers.balance_scale,
        launchers.compute_scale, load, dlogits, dx, other_dx, *_of_logits(logits, x, weight), num_tokens, span,
    )  # fmt: skip
    return dlogits
