"""Run one building block three ways: on the kernels, in the oracle in the same dtype, in the oracle in fp64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_moe import functional, moe_mlp, reference
from triton_moe.layout import Routing
from triton_moe.testing import Case, Inputs, assert_within_budget, make_inputs, poison_empty


def routings(inputs: Inputs) -> tuple[Routing, Routing]:
    """The kernels' routing and the oracle's."""
    return functional.route(inputs.topk_ids, inputs.layout, backend="triton"), reference.route(
        inputs.topk_ids, inputs.layout
    )


def forward_backward(
    operator: Callable[..., Tensor], operands: list[Tensor], dout: Tensor, **options: Any
) -> list[Tensor]:
    """Output and the gradient of every operand."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    out = operator(*leaves, **options)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check_operator(name: str, operands: list[Tensor], dout: Tensor, inputs: Inputs, **options: Any) -> None:
    """`<name>_autograd` on the kernels against `reference.<name>`, output and gradients within the error budget."""
    ours, theirs = routings(inputs)
    oracle = getattr(reference, name)
    with poison_empty():
        actual = forward_backward(getattr(functional, f"{name}_autograd"), operands, dout, routing=ours, **options)
    plain = forward_backward(oracle, operands, dout, routing=theirs, **options)
    truth = forward_backward(
        oracle, [operand.double() for operand in operands], dout.double(), routing=theirs, **options
    )
    assert len(actual) == len(plain) == len(operands) + 1
    for i, tensors in enumerate(zip(actual, truth, plain, strict=True)):
        which = f"{name} gradient {i}" if i else name
        assert_within_budget(*tensors, eps_dtype=operands[0].dtype, name=which)


def unit(shape: torch.Size | tuple[int, ...], like: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


BACKENDS = ("triton", "hopper") if has_hopper() else ("triton",)
"""Whose kernels run here: natively, or the portable ones in the interpreter."""


def inputs_for(case: Case, dtype: torch.dtype, device: str, seed: int = 0, **options: Any) -> Inputs:
    return make_inputs(case, dtype, device, seed=seed, **options)


def zeros(*args, **kwargs) -> Tensor:
    return 0 * moe_mlp(*args, **kwargs)
