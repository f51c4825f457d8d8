"""Experts without a router, for any module that says where tokens go; and the dense MLP, an expert for all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_moe import torch_backend
from triton_moe.activations import is_gated
from triton_moe.functional import ACTIVATION_MEMORY, BACKENDS, check_choice, moe_mlp, positive_int
from triton_moe.layout import ExpertLayout

_OPTIONS = {"backend": BACKENDS, "activation_memory": ACTIVATION_MEMORY, "recompute": (True, False)}
"""Of `moe_mlp`, and their values."""
_OPERANDS = ("w1", "w2", "w3", "b1", "b2", "b3")


class Experts(nn.Module):
    """The packed weights of experts of any width, as `moe_mlp` takes them, whose options these are.

    >>> experts = Experts(ExpertLayout.from_sizes([(4, 64), (4, 32)]), hidden_size=16)
    >>> weights, ids = torch.rand(5, 16).matmul(torch.rand(16, 8)).softmax(-1).topk(2)  # a router of one's own
    >>> experts(torch.rand(5, 16), weights, ids).shape
    torch.Size([5, 16])

    Parameters: `w1 (H, S)`, `w2 (S, H)`, for gated activations `w3 (H, S)`, w1 being the gate. Expert e owns the
    columns `layout.columns(e)` of w1 and w3 and the same rows of w2. With `bias` also `b1 (S)`, `b2 (E, H)`, and for
    gated activations `b3 (S)`. A state dict does not have the widths: one of another layout with this S loads, and
    means something else.
    """

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter | None
    b1: nn.Parameter | None
    b2: nn.Parameter | None
    b3: nn.Parameter | None

    def __init__(
        self,
        layout: ExpertLayout,
        hidden_size: int,
        activation: str = "relu_squared",
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: str | bool,
    ) -> None:
        """`options`: `backend`, `activation_memory`, `recompute` of `moe_mlp`. ValueError on what cannot be built."""
        super().__init__()
        if not isinstance(layout, ExpertLayout):
            raise ValueError(f"layout: expected an ExpertLayout, got {layout!r}")
        hidden_size = positive_int(hidden_size, "hidden_size")
        check_choice(bias, "bias", (True, False))
        self._register_experts(layout, hidden_size, activation, bias, device, dtype, options)
        self.init_params()

    def _register_experts(
        self,
        layout: ExpertLayout,
        hidden_size: int,
        activation: str,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        options: dict[str, str | bool],
    ) -> None:
        unknown = set(options) - set(_OPTIONS)
        if unknown:
            raise TypeError(f"options: expected backend, activation_memory and recompute, got {', '.join(unknown)}")
        for name, value in options.items():
            check_choice(value, name, _OPTIONS[name])
        self.layout, self._moe_mlp_options = layout, {"activation": activation, **options}
        _register_weights(self, hidden_size, layout.total_width, activation, device, dtype)
        sizes = {"b1": (layout.total_width,), "b2": (layout.num_experts, hidden_size), "b3": (layout.total_width,)}
        for name, size in sizes.items():
            has_bias = bias and (name != "b3" or is_gated(activation))
            value = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if has_bias else None
            self.register_parameter(name, value)

    @torch.no_grad()
    def init_params(self) -> None:
        """Draw every weight from a normal distribution of std 1 / sqrt(fan-in), for w2 the expert's own width. Biases
        are 0."""
        _init_up(self)
        for value in (self.b1, self.b2, self.b3):
            if value is not None:
                value.zero_()
        layout = self.layout
        scale = torch.tensor([width**-0.5 for width in layout.widths for _ in range(width)], device=self.w2.device)
        self.w2.normal_().mul_(_sharded_as(self.w2, scale[:, None].to(self.w2.dtype)))

    def reset_parameters(self) -> None:
        """PyTorch's name for `init_params`."""
        self.init_params()

    def _operands(self) -> tuple[Any, ...]:
        """w1, w2, w3, b1, b2, b3. `nn.Module` looks for a parameter in Python, and six times that is host time."""
        own = self._parameters
        return tuple([own[name] if name in own else getattr(self, name) for name in _OPERANDS])

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """`moe_mlp`: `x (..., H)`, weights and ids `(T, K)` from any router -> x's shape and dtype."""
        w1, w2, w3, b1, b2, b3 = self._operands()
        return moe_mlp(
            x, topk_weights, topk_ids, w1, w2, w3, layout=self.layout, b1=b1, b2=b2, b3=b3,
            **self._moe_mlp_options,  # type: ignore[arg-type]
        )  # fmt: skip


class DenseMLP(nn.Module):
    """One MLP for every token, with the experts' activations: `w1 (H, I)`, `w2 (I, H)`, if gated `w3 (H, I)`.

    Raises ValueError on sizes that are not integers of 1 or more, or an unknown activation.
    """

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        width: int,
        activation: str = "relu_squared",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size, width = positive_int(hidden_size, "hidden_size"), positive_int(width, "width")
        self.activation = activation
        _register_weights(self, hidden_size, width, activation, device, dtype)
        self.init_params()

    @torch.no_grad()
    def init_params(self) -> None:
        """Draw every weight from a normal distribution of std 1 / sqrt(fan-in)."""
        _init_up(self)
        self.w2.normal_(std=self.w2.shape[0] ** -0.5)

    def reset_parameters(self) -> None:
        """PyTorch's name for `init_params`."""
        self.init_params()

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., H)` -> the same shape."""
        up = None if self.w3 is None else x @ self.w3
        return torch_backend.activate(x @ self.w1, up, self.activation) @ self.w2


def _register_weights(
    module: nn.Module, hidden_size: int, width: int, activation: str, device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    def empty(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    module.register_parameter("w1", empty(hidden_size, width))
    module.register_parameter("w2", empty(width, hidden_size))
    module.register_parameter("w3", empty(hidden_size, width) if is_gated(activation) else None)


def _sharded_as(parameter: Any, value: Tensor) -> Tensor:
    """The value itself, or as parameters are under FSDP: a part of one, taken by its index, would be a copy there."""
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor  # seconds that others need not wait for

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _init_up(module: Experts | DenseMLP) -> None:
    for weight in (module.w1, module.w3):
        if weight is not None:
            weight.normal_(std=weight.shape[0] ** -0.5)
