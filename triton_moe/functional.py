"""The public functions: `moe_mlp`, the whole expert layer behind any router, and the building blocks it is made of.

Everything is checked (`checks.py`) before anything is launched; a bad argument raises a ValueError that names it. A
building block runs where its `routing` was made: with the kernels if `route` ran on them, in plain PyTorch otherwise.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from triton_moe import torch_backend
from triton_moe.activations import is_gated
from triton_moe.checks import (
    KERNEL_DTYPES,
    check_biases,
    check_device,
    check_ids,
    check_kernels,
    check_tokens,
    check_topk_weights,
    check_type,
    check_weight,
    check_weights,
    fail,
    runs_kernels,
)
from triton_moe.layout import ExpertLayout, Routing

ACTIVATION_MEMORY = ("bounded", "exact")


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
            `T K * H * mean width` of 2^32 on, or of 2^35 with a Triton newer than 3.6; below, an eager call waits for
            the host, to which it costs more. With biases "hopper" is "triton". With widths that are no multiples of 64
            a weight that is NaN or infinite may on "hopper" reach the experts packed before its own.
        activation_memory: "bounded" sizes what is kept for backward by the widest expert, from what the host knows;
            "exact" by the routing, for which it reads one number back, not while a CUDA graph is captured.
        recompute: keep x and the routing alone, and compute the pre-activation once more in backward. Without it, an
            eager backward pass frees the pre-activation once its gradient is known; one under torch.compile keeps it to
            its own end.

    Returns:
        x's shape and dtype; under autocast its dtype, to which x and the weights are cast first, as by nn.Linear, but
        anew in each call: autocast remembers casts for PyTorch's own operators alone. Differentiable in all tensors but
        topk_ids. The same inputs give the same bits; but a few tokens without gradients, as in decoding, have tiles of
        their own, and may differ in the last bit from those with. On CUDA nothing is read back to the host.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
    """
    if activation_memory not in ACTIVATION_MEMORY:
        fail("activation_memory", f"one of {', '.join(ACTIVATION_MEMORY)}", repr(activation_memory))
    check_type(recompute, bool, "recompute", "True or False")
    check_type(layout, ExpertLayout, "layout", "an ExpertLayout")
    gated = is_gated(activation)
    check_type(x, Tensor, "x", "a tensor")
    if not x.is_floating_point() or x.dim() == 0:
        fail("x", "a float tensor (..., H)", f"{x.dtype} of {x.dim()} dimensions")
    if _autocasts(x.device):
        x, w1, w2 = (t.to(matmul_dtype(t)) if isinstance(t, Tensor) else t for t in (x, w1, w2))
        w3, b1, b2, b3 = (t.to(matmul_dtype(t)) if isinstance(t, Tensor) else t for t in (w3, b1, b2, b3))
    hidden_size = x.shape[-1]
    check_type(w2, Tensor, "w2", "a tensor")
    check_weights(w1, w2, w3, x, hidden_size, layout.total_width, gated)
    check_biases(b1, b2, b3, x, hidden_size, layout.num_experts, layout.total_width, gated)
    check_ids(topk_ids, layout)
    check_device(topk_ids, "topk_ids", x.device)
    check_topk_weights(topk_weights, topk_ids, x)
    num_tokens = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    if topk_ids.shape[0] != num_tokens:
        fail("topk_ids", f"T = {num_tokens} rows as x", topk_ids.shape[0])
    if runs_kernels(x.device, x.dtype, backend):
        check_kernels(x, backend, activation_memory == "exact")
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
    scale: float,
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
        w1, w2 = w1.to(matmul_dtype(w1)), w2.to(matmul_dtype(w2))
        w3, b1, b2, b3 = (None if t is None else t.to(matmul_dtype(t)) for t in (w3, b1, b2, b3))
    # The operators check the rest, where a call is of a new kind.
    from triton_moe.ops.moe_layer import moe_layer as run
    from triton_moe.ops.moe_layer import moe_layer_inference

    operands = (x, router_weight, bias, w1, w2, w3, b1, b2, b3)
    choice = router == "softmax", normalize_weights, float(scale)
    options = layout.widths, num_active_experts, *choice, aux_losses, activation, activation_memory == "exact"
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)):
        return moe_layer_inference(*operands, *options, backend)
    return run(*operands, *options, not recompute, backend)


def route(topk_ids: Tensor, layout: ExpertLayout, *, backend: str = "auto") -> Routing:
    """Sort the slots of `topk_ids (T, K)` by expert. Building blocks that get the result run on `backend`.

    Raises ValueError on ids that are not `(T, K)` integers with 1 <= K <= E, or a backend that cannot run there.
    """
    check_type(layout, ExpertLayout, "layout", "an ExpertLayout")
    check_ids(topk_ids, layout)
    if backend == "hopper":
        fail("backend", "auto, triton or torch: the Hopper kernels are in moe_mlp alone", repr(backend))
    if not runs_kernels(topk_ids.device, None, backend):
        return torch_backend.route(topk_ids, layout)
    from triton_moe.ops.building_blocks import route as run

    return run(topk_ids, layout)


def _implementation(routing: Routing, tensor: Tensor, argument: str):
    """The module whose building blocks run with this routing."""
    check_type(routing, Routing, "routing", "a Routing")
    check_type(tensor, Tensor, argument, "a tensor")
    check_device(tensor, argument, routing.row_to_slot.device)
    if not tensor.is_floating_point():
        fail(argument, "a float tensor", tensor.dtype)
    if not routing.block_m:
        return torch_backend
    if tensor.dtype not in KERNEL_DTYPES:
        fail(argument, "float32, bfloat16 or float16", tensor.dtype)
    from triton_moe.ops import building_blocks

    return building_blocks


def gather_autograd(x: Tensor, *, routing: Routing) -> Tensor:
    """`x (T, H)` -> `(R, H)`: each slot's token, rows in expert order, zeros past the last row. Differentiable in x."""
    run = _implementation(routing, x, "x")
    check_tokens(x, routing)
    return run.gather(x, routing=routing)


def scatter_autograd(y: Tensor, topk_weights: Tensor, *, routing: Routing) -> Tensor:
    """`out[t] = sum_k topk_weights[t, k] * y[slot_to_row[t, k]]`: `(R, H)` -> `(T, H)`, summed in fp32.

    Differentiable in y and topk_weights `(T, K)`, which is float32 or has y's dtype.
    """
    run = _implementation(routing, y, "y")
    if y.dim() != 2 or y.shape[0] != routing.num_rows:
        fail("y", f"shape ({routing.num_rows}, H)", tuple(y.shape))
    check_topk_weights(topk_weights, routing.topk_ids, y)
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
    check_tokens(x, routing)
    check_weights(w1, None, w3, x, x.shape[1], routing.layout.total_width, gated)
    return run.grouped_gemm_up(x, w1, w3, routing=routing, activation=activation)


def grouped_gemm_down_autograd(x_up: Tensor, w2: Tensor, *, routing: Routing) -> Tensor:
    """`x_up_e w2_e`: the flat ragged buffer of activations -> `(R, H)`, rows in expert order, zeros past the last row.

    Differentiable in x_up and w2 `(S, H)`.
    """
    run = _implementation(routing, x_up, "x_up")
    size = routing.ragged_numel()
    if x_up.shape != (size,):
        fail("x_up", f"a ragged buffer of shape ({size},)", tuple(x_up.shape))
    check_type(w2, Tensor, "w2", "a tensor")
    if w2.dim() != 2:
        fail("w2", "shape (S, H)", tuple(w2.shape))
    check_weight(w2, "w2", (routing.layout.total_width, w2.shape[1]), x_up)
    return run.grouped_gemm_down(x_up, w2, routing=routing)


gather = torch.no_grad()(gather_autograd)
scatter = torch.no_grad()(scatter_autograd)
grouped_gemm_up = torch.no_grad()(grouped_gemm_up_autograd)
grouped_gemm_down = torch.no_grad()(grouped_gemm_down_autograd)
