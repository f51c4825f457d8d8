"""The public functions: `moe_mlp`, the whole expert layer behind any router, and the building blocks it is made of.

Everything is checked here, before anything is launched; a bad argument raises a ValueError that names it. A building
block runs where its `routing` was made: with the kernels if `route` ran on them, in plain PyTorch otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from triton_moe import torch_backend
from triton_moe.activations import is_gated
from triton_moe.layout import ExpertLayout, Routing

BACKENDS = ("auto", "hopper", "triton", "torch")
ACTIVATION_MEMORY = ("bounded", "exact")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)
_MAX_SLOTS = 2**30
"""Numbered in int32, with room for what all programs take at once."""
_MAX_STRIDE = 2**24 - 1
"""Of weights: kernels step through up to 128 of their rows in int32."""


Function = TypeVar("Function", bound=Callable[..., Any])


def _fail(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def _check_type(value: object, kind: type, argument: str, expected: str) -> None:
    if not isinstance(value, kind):
        _fail(argument, expected, type(value).__name__)


def positive_int(value: object, argument: str) -> int:
    """The integer, NumPy's too, as Python's."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        _fail(argument, "an integer of 1 or more", repr(value))
    return int(value)


def check_choice(value: object, argument: str, choices: Sequence[object]) -> None:
    if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):  # 1 == True
        _fail(argument, f"one of {', '.join(map(str, choices))}", repr(value))


def _check_device(tensor: Tensor, argument: str, device: torch.device) -> None:
    if tensor.device != device:
        _fail(argument, f"a tensor on {device}", tensor.device)


def _check_operand(tensor: Tensor, argument: str, shape: tuple[int, ...], like: Tensor) -> None:
    _check_type(tensor, Tensor, argument, "a tensor")
    if tensor.shape != shape:
        _fail(argument, f"shape {shape}", tuple(tensor.shape))
    if tensor.dtype != like.dtype or tensor.device != like.device:
        _fail(argument, f"{like.dtype} on {like.device} as x", f"{tensor.dtype} on {tensor.device}")


def _check_floats(tensor: Tensor, argument: str, shape: tuple[int, ...], device: torch.device) -> None:
    _check_type(tensor, Tensor, argument, "a tensor")
    if tensor.shape != shape or not tensor.is_floating_point():
        _fail(argument, f"floats of shape {shape}", f"{tensor.dtype} of shape {tuple(tensor.shape)}")
    _check_device(tensor, argument, device)


def _check_weight(tensor: Tensor, argument: str, shape: tuple[int, ...], like: Tensor) -> None:
    _check_operand(tensor, argument, shape, like)
    if max(tensor.stride()) > _MAX_STRIDE:
        _fail(argument, f"strides of at most {_MAX_STRIDE}", tensor.stride())


def _check_weights(
    w1: Tensor, w2: Tensor | None, w3: Tensor | None, like: Tensor, hidden_size: int, layout: ExpertLayout, gated: bool
) -> None:
    shape = (hidden_size, layout.total_width)
    _check_weight(w1, "w1", shape, like)
    if w2 is not None:
        _check_weight(w2, "w2", (layout.total_width, hidden_size), like)
    if gated:
        if w3 is None:
            _fail("w3", "the up weights of a gated activation", None)
        _check_weight(w3, "w3", shape, like)
    elif w3 is not None:
        _fail("w3", "None with an activation that is not gated", "a tensor")


def _check_biases(
    b1: Tensor | None, b2: Tensor | None, b3: Tensor | None, like: Tensor, hidden_size: int, layout: ExpertLayout,
    gated: bool,
) -> None:  # fmt: skip
    if b3 is not None and not gated:
        _fail("b3", "None with an activation that is not gated", "a tensor")
    if b1 is not None:
        _check_operand(b1, "b1", (layout.total_width,), like)
    if b2 is not None:
        _check_operand(b2, "b2", (layout.num_experts, hidden_size), like)
    if b3 is not None:
        _check_operand(b3, "b3", (layout.total_width,), like)


def _check_ids(topk_ids: Tensor, layout: ExpertLayout) -> None:
    _check_type(topk_ids, Tensor, "topk_ids", "a tensor")
    if topk_ids.dim() != 2:
        _fail("topk_ids", "shape (T, K)", tuple(topk_ids.shape))
    if topk_ids.dtype not in (torch.int32, torch.int64):
        _fail("topk_ids", "int32 or int64", topk_ids.dtype)
    if not 1 <= topk_ids.shape[1] <= layout.num_experts:
        _fail("topk_ids", f"1 <= K <= E = {layout.num_experts}", f"K = {topk_ids.shape[1]}")
    if topk_ids.numel() > _MAX_SLOTS:
        _fail("topk_ids", f"at most {_MAX_SLOTS} slots", topk_ids.numel())
    if "TRITON_MOE_CHECK_IDS" in os.environ and os.environ["TRITON_MOE_CHECK_IDS"] == "1":  # faster than get
        wrong = topk_ids[(topk_ids < 0) | (topk_ids > layout.num_experts)].unique().tolist()
        if wrong:
            _fail("topk_ids", f"0 <= id <= E = {layout.num_experts}", wrong[:16])


def _check_topk_weights(topk_weights: Tensor, topk_ids: Tensor, like: Tensor) -> None:
    _check_type(topk_weights, Tensor, "topk_weights", "a tensor")
    if topk_weights.shape != topk_ids.shape:
        _fail("topk_weights", f"shape {tuple(topk_ids.shape)} as topk_ids", tuple(topk_weights.shape))
    if topk_weights.dtype not in (torch.float32, like.dtype):
        _fail("topk_weights", f"float32 or {like.dtype}", topk_weights.dtype)
    _check_device(topk_weights, "topk_weights", like.device)


def _check_tokens(x: Tensor, routing: Routing) -> None:
    if x.dim() != 2 or x.shape[0] != routing.num_tokens:
        _fail("x", f"shape ({routing.num_tokens}, H)", tuple(x.shape))


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
        _fail("backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    supported = dtype is None or dtype in _KERNEL_DTYPES
    if backend in ("hopper", "triton"):
        if not _has_kernels(device):
            _fail("backend", f"CUDA tensors (compute capability 8.0 or later) for {backend!r}", f"tensors on {device}")
        if not supported:
            _fail("x", f"float32, bfloat16 or float16 for backend {backend!r}", dtype)
        return True
    return backend == "auto" and device.type == "cuda" and supported and _has_kernels(device)


@_assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _check_hopper(x: Tensor) -> None:
    """Raise ValueError if there are no Hopper kernels, which were asked for, for this input."""
    if not _is_hopper(x.device):
        _fail("backend", "a device of compute capability 9.0 for 'hopper'", f"tensors on {x.device}")
    if x.element_size() != 2:
        _fail("x", "bfloat16 or float16 for backend 'hopper'", x.dtype)
    if x.shape[-1] % 64:
        _fail("x", "H a multiple of 64 for backend 'hopper'", x.shape[-1])


def check_router_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: ExpertLayout, num_active_experts: int
) -> None:
    """Raise ValueError unless `route_tokens` can take these."""
    _check_type(layout, ExpertLayout, "layout", "an ExpertLayout")
    _check_type(x, Tensor, "x", "a tensor")
    if not x.is_floating_point() or x.dim() != 2:
        _fail("x", "a float tensor (T, H)", f"{x.dtype} of shape {tuple(x.shape)}")
    _check_floats(weight, "weight", (layout.num_experts, x.shape[1]), x.device)
    if bias is not None:
        _check_floats(bias, "bias", (layout.num_experts,), x.device)
    if type(num_active_experts) is not int or not 1 <= num_active_experts <= layout.num_experts:
        _fail("num_active_experts", f"1 <= K <= E = {layout.num_experts}", num_active_experts)


def _is_captured(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_kernels(x: Tensor, backend: str, exact: bool) -> None:
    if exact and _is_captured(x):
        _fail("activation_memory", "'bounded' while a CUDA graph is captured", "'exact'")
    if backend == "hopper":
        _check_hopper(x)


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product takes a tensor: autocast's where that is on, but for float64, or its own."""
    casts = _autocasts(tensor.device) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if casts else tensor.dtype


def moe_mlp(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor | None = None,
    *,
    layout: ExpertLayout,
    activation: str = "relu_squared",
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    b3: Tensor | None = None,
    backend: str = "auto",
    activation_memory: str = "bounded",
    recompute: bool = False,
) -> Tensor:
    """Mixture of experts of any width: `out[t] = sum_k topk_weights[t, k] * expert[topk_ids[t, k]](x[t])`.

    Expert e is `act(x w1_e + b1_e) w2_e + b2_e`, or `(act(x w1_e + b1_e) * (x w3_e + b3_e)) w2_e + b2_e` for a gated
    activation, with `w1_e` its columns of the packed weights (`layout.columns(e)`). An expert of width 0 adds nothing,
    not its bias either.

    Args:
        x: `(T, H)` or `(..., H)` of any strides; float32, bfloat16 or float16 (any float dtype in plain PyTorch).
        topk_weights: `(T, K)`, float32 or x's dtype; its gradient has its own dtype.
        topk_ids: `(T, K)` int32 or int64. An id may repeat within a token. Id E means "no expert": the slot adds
            nothing; so does any other id out of range, which raises if the environment has TRITON_MOE_CHECK_IDS=1.
        w1, w3: `(H, S)`, x's dtype, either orientation in memory. w3 only with a gated activation; w1 is the gate.
        w2: `(S, H)`, likewise.
        b1, b3: `(S)`, x's dtype, or None for none; b3 only with a gated activation.
        b2: `(E, H)`, likewise.
        layout: the experts' widths and offsets.
        activation: one of `triton_moe.activations.ACTIVATIONS`.
        backend: "hopper" (compute capability 9.0, 16 bits, H a multiple of 64), "triton" (CUDA, compute capability 8.0
            or later), "torch" (any device), or "auto": the fastest that can. That is "hopper" from
            `T K * H * mean width` of 2^32 on, or of 2^35 with another Triton than 3.6 and 3.9; below, an eager call
            waits for the host, to which it costs more. With biases "hopper" is "triton". With widths that are no
            multiples of 64 a weight that is NaN or infinite may on "hopper" reach the experts packed before its own.
        activation_memory: "bounded" sizes what is kept for backward by the widest expert, from what the host knows;
            "exact" by the routing, for which it reads one number back, not while a CUDA graph is captured.
        recompute: keep x and the routing alone, and compute the pre-activation once more in backward. Without it, an
            eager backward pass frees the pre-activation once its gradient is known; one under torch.compile keeps it to
            its own end.

    Returns:
        x's shape and dtype; under autocast its dtype, to which x and the weights are cast first, as by nn.Linear, but
        anew in each call: autocast remembers casts for PyTorch's own operators alone. Differentiable in all tensors but
        topk_ids. The same inputs give the same bits; but a few tokens without gradients, as in decoding, have tiles of
        their own, and may differ in the last bit from those with. On CUDA nothing is read back to the host, but for
        activation_memory="exact" one number.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
    """
    if activation_memory not in ACTIVATION_MEMORY:
        _fail("activation_memory", f"one of {', '.join(ACTIVATION_MEMORY)}", repr(activation_memory))
    _check_type(recompute, bool, "recompute", "True or False")
    _check_type(layout, ExpertLayout, "layout", "an ExpertLayout")
    gated = is_gated(activation)
    _check_type(x, Tensor, "x", "a tensor")
    if not x.is_floating_point() or x.dim() == 0:
        _fail("x", "a float tensor (..., H)", f"{x.dtype} of {x.dim()} dimensions")
    if _autocasts(x.device):
        x, w1, w2 = (t.to(matmul_dtype(t)) if isinstance(t, Tensor) else t for t in (x, w1, w2))
        w3, b1, b2, b3 = (t.to(matmul_dtype(t)) if isinstance(t, Tensor) else t for t in (w3, b1, b2, b3))
    hidden_size = x.shape[-1]
    _check_type(w2, Tensor, "w2", "a tensor")
    _check_weights(w1, w2, w3, x, hidden_size, layout, gated)
    _check_biases(b1, b2, b3, x, hidden_size, layout, gated)
    _check_ids(topk_ids, layout)
    _check_device(topk_ids, "topk_ids", x.device)
    _check_topk_weights(topk_weights, topk_ids, x)
    num_tokens = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    if topk_ids.shape[0] != num_tokens:
        _fail("topk_ids", f"T = {num_tokens} rows as x", topk_ids.shape[0])
    if runs_kernels(x.device, x.dtype, backend):
        _check_kernels(x, backend, activation_memory == "exact")
        from triton_moe.ops.moe_mlp import moe_mlp as on_kernels

        run = functools.partial(on_kernels, backend=backend)
    else:
        run = torch_backend.moe_mlp
    tokens = x if x.dim() == 2 else x.reshape(num_tokens, hidden_size)
    operands = (tokens, topk_weights, topk_ids, w1, w2, w3, b1, b2, b3)
    out = run(*operands, layout, activation, activation_memory, recompute)
    return out if x.dim() == 2 else out.view(x.shape)


def moe_layer(
    x: Tensor,
    router_weight: Tensor,
    bias: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor | None,
    b1: Tensor | None,
    b2: Tensor | None,
    b3: Tensor | None,
    *,
    layout: ExpertLayout,
    num_active_experts: int,
    router: str,
    normalize_weights: bool,
    weights_scale: float,
    aux_losses: bool,
    activation: str,
    backend: str = "auto",
    activation_memory: str = "bounded",
    recompute: bool = False,
) -> tuple[Tensor, ...] | None:
    """A router and its experts as one operator, one node in autograd's graph, which costs the host less than two.

    `x (T, H)`, under autocast in its dtype; the router as in `route_tokens`, the experts as in `moe_mlp`. Returns the
    output, then the fields of a `RouterOutput`, of which only the losses are differentiable here; None where the
    kernels do not run.
    """
    if not runs_kernels(x.device, x.dtype, backend):
        return None
    if _autocasts(x.device):
        w1, w2 = (t.to(matmul_dtype(t)) if isinstance(t, Tensor) else t for t in (w1, w2))
        w3, b1, b2, b3 = (t.to(matmul_dtype(t)) if isinstance(t, Tensor) else t for t in (w3, b1, b2, b3))
    check_router_input(x, router_weight, bias, layout, num_active_experts)
    if x.shape[0] * num_active_experts > _MAX_SLOTS:
        _fail("x", f"at most {_MAX_SLOTS} slots", x.shape[0] * num_active_experts)
    hidden_size, gated = x.shape[1], is_gated(activation)
    _check_type(w2, Tensor, "w2", "a tensor")
    _check_weights(w1, w2, w3, x, hidden_size, layout, gated)
    _check_biases(b1, b2, b3, x, hidden_size, layout, gated)
    exact = activation_memory == "exact"
    _check_kernels(x, backend, exact)
    from triton_moe.ops.moe_layer import moe_layer as run
    from triton_moe.ops.moe_layer import moe_layer_inference

    operands = (x, router_weight, bias, w1, w2, w3, b1, b2, b3)
    choice = router == "softmax", normalize_weights, float(weights_scale)
    options = layout.widths, num_active_experts, *choice, aux_losses, activation, exact
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)):
        return moe_layer_inference(*operands, *options, backend)
    return run(*operands, *options, not recompute, backend)


def route(topk_ids: Tensor, layout: ExpertLayout, *, backend: str = "auto") -> Routing:
    """Sort the slots of `topk_ids (T, K)` by expert. Building blocks that get the result run on `backend`.

    Raises ValueError on ids that are not `(T, K)` integers with 1 <= K <= E, or a backend that cannot run there.
    """
    _check_type(layout, ExpertLayout, "layout", "an ExpertLayout")
    _check_ids(topk_ids, layout)
    if backend == "hopper":
        _fail("backend", "auto, triton or torch: the Hopper kernels are in moe_mlp alone", repr(backend))
    if not runs_kernels(topk_ids.device, None, backend):
        return torch_backend.route(topk_ids, layout)
    from triton_moe.ops.building_blocks import route as run

    return run(topk_ids, layout)


def _implementation(routing: Routing, tensor: Tensor, argument: str):
    """The module whose building blocks run with this routing."""
    _check_type(routing, Routing, "routing", "a Routing")
    _check_type(tensor, Tensor, argument, "a tensor")
    _check_device(tensor, argument, routing.row_to_slot.device)
    if not tensor.is_floating_point():
        _fail(argument, "a float tensor", tensor.dtype)
    if not routing.block_m:
        return torch_backend
    if tensor.dtype not in _KERNEL_DTYPES:
        _fail(argument, "float32, bfloat16 or float16", tensor.dtype)
    from triton_moe.ops import building_blocks

    return building_blocks


def gather_autograd(x: Tensor, *, routing: Routing) -> Tensor:
    """`x (T, H)` -> `(R, H)`: each slot's token, rows in expert order, zeros past the last row. Differentiable in x."""
    run = _implementation(routing, x, "x")
    _check_tokens(x, routing)
    return run.gather(x, routing=routing)


def scatter_autograd(y: Tensor, topk_weights: Tensor, *, routing: Routing) -> Tensor:
    """`out[t] = sum_k topk_weights[t, k] * y[slot_to_row[t, k]]`: `(R, H)` -> `(T, H)`, summed in fp32.

    Differentiable in y and topk_weights `(T, K)`, which is float32 or has y's dtype.
    """
    run = _implementation(routing, y, "y")
    if y.dim() != 2 or y.shape[0] != routing.num_rows:
        _fail("y", f"shape ({routing.num_rows}, H)", tuple(y.shape))
    _check_topk_weights(topk_weights, routing.topk_ids, y)
    return run.scatter(y, topk_weights, routing=routing)


def grouped_gemm_up_autograd(
    x: Tensor, w1: Tensor, w3: Tensor | None = None, *, routing: Routing, activation: str = "relu_squared"
) -> Tensor:
    """`act(x w1_e)`, gated `act(x w1_e) * (x w3_e)`, for every routed row of `x (T, H)`.

    Returns the flat ragged buffer (see `Routing`) of activations, not weighted; zeros between the blocks. x is gathered
    inside the kernel's loads. Differentiable in x, w1 and w3 `(H, S)`.
    """
    run = _implementation(routing, x, "x")
    gated = is_gated(activation)
    _check_tokens(x, routing)
    _check_weights(w1, None, w3, x, x.shape[1], routing.layout, gated)
    return run.grouped_gemm_up(x, w1, w3, routing=routing, activation=activation)


def grouped_gemm_down_autograd(x_up: Tensor, w2: Tensor, *, routing: Routing) -> Tensor:
    """`x_up_e w2_e`: the flat ragged buffer of activations -> `(R, H)`, rows in expert order, zeros past the last row.

    Differentiable in x_up and w2 `(S, H)`.
    """
    run = _implementation(routing, x_up, "x_up")
    size = routing.ragged_numel()
    if x_up.shape != (size,):
        _fail("x_up", f"a ragged buffer of shape ({size},)", tuple(x_up.shape))
    _check_type(w2, Tensor, "w2", "a tensor")
    if w2.dim() != 2:
        _fail("w2", "shape (S, H)", tuple(w2.shape))
    _check_weight(w2, "w2", (routing.layout.total_width, w2.shape[1]), x_up)
    return run.grouped_gemm_down(x_up, w2, routing=routing)


gather = torch.no_grad()(gather_autograd)
scatter = torch.no_grad()(scatter_autograd)
grouped_gemm_up = torch.no_grad()(grouped_gemm_up_autograd)
grouped_gemm_down = torch.no_grad()(grouped_gemm_down_autograd)
