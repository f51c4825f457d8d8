"""What every backward here says to a request for second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Raise where `create_graph=True` would otherwise leave terms out of a second derivative without a word."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the kernels can be differentiated once only: run backward without create_graph=True")
        return backward(ctx, *grads)

    return checked
