"""What a contestant is, once built, and the router that all of them have.

Letters as in `triton_moe.layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from triton_moe import MoEConfig, MoEMLP
from triton_moe.router import route_tokens

State = Mapping[str, Tensor]


class CannotRun(Exception):
    """Why a contestant sits a case out, in one sentence."""


@dataclass(frozen=True)
class Layer:
    """A contestant, built."""

    forward: Callable[[Tensor], Tensor]
    """`x (T, H)` -> `(T, H)`, router included, recording a graph."""
    parameters: list[Tensor]
    gradients: Callable[[], dict[str, Tensor]]
    """Of drouter, dw1, dw2 and, if gated, dw3, in the shapes of the state dict, after a backward pass."""
    module: MoEMLP | None = None
    """Where its stages can be taken apart."""
    replayed: bool = False
    """Whether it is captured as CUDA graphs, the forward pass as one and a step as one, and their replays are timed."""
    library: str = ""
    """Whose kernels it runs on, and their version, unless they are PyTorch's or ours."""
    another_function: bool = False
    """Whether it computes something else, so that no oracle can judge it."""


def routed(x: Tensor, weight: Tensor, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """Weights and ids by the router of `MoEMLP` itself, as in `config`."""
    K, router = config.num_active_experts, config.router
    return route_tokens(
        x, weight, layout=config.layout, num_active_experts=K, router=router, aux_losses=config.aux_losses
    )[:2]


def layer_of(module: MoEMLP, state: State) -> Layer:
    """A module with `MoEMLP`'s parameters, on these weights."""
    module.load_state_dict(state)
    names = {"drouter": module.router.weight, "dw1": module.w1, "dw2": module.w2, "dw3": module.w3}

    def gradients() -> dict[str, Tensor]:
        return {name: weight.grad for name, weight in names.items() if weight is not None and weight.grad is not None}

    return Layer(lambda x: module(x)[0], list(module.parameters()), gradients, module)
