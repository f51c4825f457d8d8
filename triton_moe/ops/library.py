"""An operator of torch.library, and the shorter way to the same function for eager calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_moe.layout import ExpertLayout
from triton_moe.ops.first_order import first_order

layout_of = functools.lru_cache(maxsize=256)(ExpertLayout)
"""The layout of a tuple of widths, as operators take it apart."""
_PLAIN = frozenset((Tensor, torch.nn.Parameter, tuple, list, str, bool, int, float, type(None)))
"""Types of an eager call's arguments. Another tensor may be fake, functional, or a user's."""


class Operator:
    """`forward` as `torch.ops.triton_moe.<name>`: opaque to torch.compile, with its own backward.

    An eager call reaches `forward` and `backward` through a plain autograd function instead, because the dispatcher's
    way there costs more host time than the kernels of a small shape; unless a dispatch mode is active, which wants to
    see the operator.

    Args:
        schema: `name(arguments) -> results` in PyTorch's schema language; no mutation, no aliases.
        forward: `(*arguments)` -> the results.
        fake: likewise on tensors without data: shapes, dtypes and strides alone.
        setup_context, backward: as `torch.library.register_autograd` takes them; None if there is no gradient.
    """

    def __init__(
        self,
        schema: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple, Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        name, parenthesis, rest = schema.partition("(")
        definition = torch.library.custom_op(f"triton_moe::{name}", forward, mutates_args=(), schema=parenthesis + rest)
        definition.register_fake(fake)
        self.forward = forward
        self.apply: Callable[..., Any] | None = None
        if backward is not None:
            backward = first_order(backward)
            definition.register_autograd(backward, setup_context=setup_context)
            self.apply = _eager_function(name, forward, setup_context, backward)
        self.overload = getattr(torch.ops.triton_moe, name).default

    def __call__(self, *arguments: Any, **eager_options: Any) -> Any:
        """The results. `eager_options` reach `forward` in eager calls alone, which may mutate."""
        if forward_ad._current_level >= 0:
            raise RuntimeError("the kernels have no forward-mode derivatives: call them outside of dual_level()")
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or any(issubclass(kind, Tensor) for kind in set(map(type, arguments)) - _PLAIN)
        ):
            return self.overload(*arguments)
        if (
            self.apply is not None
            and torch.is_grad_enabled()
            and any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments)
        ):
            return self.apply(*arguments)
        return self.forward(*arguments, **eager_options)


def is_eager(ctx: Any) -> bool:
    """Whether a backward's forward was an eager call, whose results nobody else has."""
    return getattr(ctx, "is_eager", False)


def _eager_function(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """-> `apply` of an autograd function of the three. With a `setup_context` of its own PyTorch would inspect
    signatures at every call, and its own `apply` looks at each argument for what only functorch leaves there."""

    def forward_and_save(ctx: Any, *arguments: Any) -> Any:
        output = forward(*arguments)
        ctx.is_eager = True
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward_and_save), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)
    apply_plain: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        return (function.apply if torch._C._are_functorch_transforms_active() else apply_plain)(*arguments)

    return apply
