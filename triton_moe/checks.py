"""What arguments must be: each check raises a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from triton_moe.activations import is_gated
from triton_moe.layout import ExpertLayout, Routing

BACKENDS = ("auto", "hopper", "triton", "torch")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)
MAX_SLOTS = 2**30
"""Numbered in int32, with room for what all programs take at once."""
_MAX_STRIDE = 2**24 - 1
"""Of weights: kernels step through up to 128 of their rows in int32."""


Function = TypeVar("Function", bound=Callable[..., Any])


def fail(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def check_type(value: object, kind: type, argument: str, expected: str) -> None:
    if not isinstance(value, kind):
        fail(argument, expected, type(value).__name__)


def check_device(tensor: Tensor, argument: str, device: torch.device) -> None:
    if tensor.device != device:
        fail(argument, f"a tensor on {device}", tensor.device)


def check_operand(tensor: Tensor, argument: str, shape: tuple[int, ...], like: Tensor) -> None:
    check_type(tensor, Tensor, argument, "a tensor")
    if tensor.shape != shape:
        fail(argument, f"shape {shape}", tuple(tensor.shape))
    if tensor.dtype != like.dtype or tensor.device != like.device:
        fail(argument, f"{like.dtype} on {like.device} as x", f"{tensor.dtype} on {tensor.device}")


def check_floats(tensor: Tensor, argument: str, shape: tuple[int, ...], device: torch.device) -> None:
    check_type(tensor, Tensor, argument, "a tensor")
    if tensor.shape != shape or not tensor.is_floating_point():
        fail(argument, f"floats of shape {shape}", f"{tensor.dtype} of shape {tuple(tensor.shape)}")
    check_device(tensor, argument, device)


def check_weight(tensor: Tensor, argument: str, shape: tuple[int, ...], like: Tensor) -> None:
    check_operand(tensor, argument, shape, like)
    if max(tensor.stride()) > _MAX_STRIDE:
        fail(argument, f"strides of at most {_MAX_STRIDE}", tensor.stride())


def check_weights(
    w1: Tensor, w2: Tensor | None, w3: Tensor | None, like: Tensor, hidden_size: int, total_width: int, gated: bool
) -> None:
    shape = (hidden_size, total_width)
    check_weight(w1, "w1", shape, like)
    if w2 is not None:
        check_weight(w2, "w2", (total_width, hidden_size), like)
    if gated:
        if w3 is None:
            fail("w3", "the up weights of a gated activation", None)
        check_weight(w3, "w3", shape, like)
    elif w3 is not None:
        fail("w3", "None with an activation that is not gated", "a tensor")


def check_biases(
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, like: Tensor, hidden_size: int, num_experts: int,
    total_width: int, gated: bool,
) -> None:  # fmt: skip
    if b3 is not None and not gated:
        fail("b3", "None with an activation that is not gated", "a tensor")
    if b1 is not None:
        check_operand(b1, "b1", (total_width,), like)
    if b2 is not None:
        check_operand(b2, "b2", (num_experts, hidden_size), like)
    if b3 is not None:
        check_operand(b3, "b3", (total_width,), like)


def check_ids(topk_ids: Tensor, layout: ExpertLayout) -> None:
    check_type(topk_ids, Tensor, "topk_ids", "a tensor")
    if topk_ids.dim() != 2:
        fail("topk_ids", "shape (T, K)", tuple(topk_ids.shape))
    if topk_ids.dtype not in (torch.int32, torch.int64):
        fail("topk_ids", "int32 or int64", topk_ids.dtype)
    if not 1 <= topk_ids.shape[1] <= layout.num_experts:
        fail("topk_ids", f"1 <= K <= E = {layout.num_experts}", f"K = {topk_ids.shape[1]}")
    if topk_ids.numel() > MAX_SLOTS:
        fail("topk_ids", f"at most {MAX_SLOTS} slots", topk_ids.numel())
    if "TRITON_MOE_CHECK_IDS" in os.environ and os.environ["TRITON_MOE_CHECK_IDS"] == "1":  # faster than get
        wrong = topk_ids[(topk_ids < 0) | (topk_ids > layout.num_experts)].unique().tolist()
        if wrong:
            fail("topk_ids", f"0 <= id <= E = {layout.num_experts}", wrong[:16])


def check_topk_weights(topk_weights: Tensor, topk_ids: Tensor, like: Tensor) -> None:
    check_type(topk_weights, Tensor, "topk_weights", "a tensor")
    if topk_weights.shape != topk_ids.shape:
        fail("topk_weights", f"shape {tuple(topk_ids.shape)} as topk_ids", tuple(topk_weights.shape))
    if topk_weights.dtype not in (torch.float32, like.dtype):
        fail("topk_weights", f"float32 or {like.dtype}", topk_weights.dtype)
    check_device(topk_weights, "topk_weights", like.device)


def check_tokens(x: Tensor, routing: Routing) -> None:
    if x.dim() != 2 or x.shape[0] != routing.num_tokens:
        fail("x", f"shape ({routing.num_tokens}, H)", tuple(x.shape))


def _assume_constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which itself takes seconds to import all of torch.compile."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: a CUDA one, or the CPU under Triton's interpreter."""
    return _look_for_kernels(device)


@functools.cache
def _look_for_kernels(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def runs_kernels(device: torch.device, dtype: torch.dtype | None, backend: str) -> bool:
    """Whether the Triton kernels run a call. Raises ValueError if they were asked for and cannot."""
    if backend not in BACKENDS:
        fail("backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    supported = dtype is None or dtype in KERNEL_DTYPES
    if backend in ("hopper", "triton"):
        if not _has_kernels(device):
            fail("backend", f"CUDA tensors (compute capability 8.0 or later) for {backend!r}", f"tensors on {device}")
        if not supported:
            fail("x", f"float32, bfloat16 or float16 for backend {backend!r}", dtype)
        return True
    return backend == "auto" and device.type == "cuda" and supported and _has_kernels(device)


@_assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _check_hopper(x: Tensor) -> None:
    """Raise ValueError if there are no Hopper kernels, which were asked for, for this input."""
    if not _is_hopper(x.device):
        fail("backend", "a device of compute capability 9.0 for 'hopper'", f"tensors on {x.device}")
    if x.element_size() != 2:
        fail("x", "bfloat16 or float16 for backend 'hopper'", x.dtype)
    if x.shape[-1] % 64:
        fail("x", "H a multiple of 64 for backend 'hopper'", x.shape[-1])


def check_router_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_experts: int, num_active_experts: int
) -> None:
    """Raise ValueError unless `route_tokens` can take these."""
    check_type(x, Tensor, "x", "a tensor")
    if not x.is_floating_point() or x.dim() != 2:
        fail("x", "a float tensor (T, H)", f"{x.dtype} of shape {tuple(x.shape)}")
    check_floats(weight, "weight", (num_experts, x.shape[1]), x.device)
    if bias is not None:
        check_floats(bias, "bias", (num_experts,), x.device)
    if type(num_active_experts) is not int or not 1 <= num_active_experts <= num_experts:
        fail("num_active_experts", f"1 <= K <= E = {num_experts}", num_active_experts)


def _is_captured(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def check_kernels(x: Tensor, backend: str, exact: bool) -> None:
    if exact and _is_captured(x):
        fail("activation_memory", "'bounded' while a CUDA graph is captured", "'exact'")
    if backend == "hopper":
        _check_hopper(x)


def check_layer(
    x: Tensor, router_weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, w3: Tensor | None,
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, widths: Sequence[int], num_active_experts: int,
    activation: str, exact: bool, backend: str,
) -> None:  # fmt: skip
    """Raise ValueError unless the kernels can take these, of a router and its experts. It looks at nothing but what
    makes a kind of call for `kernels.replay`, and at what such a call does not repeat."""
    check_router_input(x, router_weight, bias, len(widths), num_active_experts)
    if x.shape[0] * num_active_experts > MAX_SLOTS:
        fail("x", f"at most {MAX_SLOTS} slots", x.shape[0] * num_active_experts)
    hidden_size, total_width, gated = x.shape[1], sum(widths), is_gated(activation)
    check_weights(w1, w2, w3, x, hidden_size, total_width, gated)
    check_biases(b1, b2, b3, x, hidden_size, len(widths), total_width, gated)
    check_kernels(x, backend, exact)
