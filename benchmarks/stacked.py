"""Weights as the libraries want them: one matrix an expert, all of one width. Letters as in `triton_moe.layout`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from layers import Layer, State, routed
from results import with_version
from torch import Tensor, nn

from triton_moe import MoEConfig
from triton_moe.activations import GATE_ACTIVATION, is_gated
from triton_moe.layout import ExpertLayout
from triton_moe.torch_backend import ACTIVATION


def activation_of(config: MoEConfig) -> Callable[[Tensor], Tensor]:
    """Of a contestant without activations of its own; a gated one's is that of its gate."""
    return ACTIVATION[GATE_ACTIVATION.get(config.activation, config.activation)]


def stack(packed: Tensor, layout: ExpertLayout, experts: Sequence[int], width: int) -> Tensor:
    """`(H, S)` -> `(len(experts), H, width)` of these experts, narrower ones padded with zeros."""
    stacked = packed.new_zeros(len(experts), packed.shape[0], width)
    for row, e in enumerate(experts):
        stacked[row, :, : layout.widths[e]] = packed[:, layout.columns(e)]
    return stacked


def unstack(stacked: Tensor, packed: Tensor, layout: ExpertLayout, experts: Sequence[int]) -> None:
    """Put these experts' columns into `packed (H, S)`, without the padding."""
    for row, e in enumerate(experts):
        packed[:, layout.columns(e)] = stacked[row, :, : layout.widths[e]]


@dataclass(frozen=True)
class Form:
    """How a library lays out what one expert multiplies by."""

    names: tuple[str, ...] = ("w1", "w3")
    """Of a gated expert's matrices, which are one in the library, in the library's order."""
    transposed: bool = False
    """Whether an expert's matrices are `(out, in)`."""
    interleaved: bool = False
    """Whether columns of the gate and of the other matrix take turns."""

    def turned(self, matrices: Tensor) -> Tensor:
        return matrices.transpose(1, 2) if self.transposed else matrices

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """`(E, H, I)` each -> `(E, H, parts * I)`."""
        return torch.stack(list(parts), dim=3).flatten(2) if self.interleaved else torch.cat(list(parts), dim=2)

    def parted(self, joined: Tensor, count: int) -> Sequence[Tensor]:
        return joined.unflatten(2, (-1, count)).unbind(3) if self.interleaved else joined.chunk(count, dim=2)


class Stacked(nn.Module):
    """The weights of some experts in a library's form, as parameters `up` and `down`."""

    def __init__(self, config: MoEConfig, state: State, form: Form, experts: Sequence[int]) -> None:
        super().__init__()
        self.layout, self.form, self.experts = config.layout, form, experts
        self.names = form.names if is_gated(config.activation) else ("w1",)
        self.width = max(config.layout.widths[e] for e in experts)
        ups = [stack(state[name], self.layout, experts, self.width) for name in self.names]
        down = stack(state["w2"].t(), self.layout, experts, self.width)
        self.up = nn.Parameter(form.turned(form.joined(ups)).contiguous())
        self.down = nn.Parameter(form.turned(down.transpose(1, 2)).contiguous())

    def add_gradients(self, packed: dict[str, Tensor]) -> None:
        """Put the gradients into dw1, dw2 and dw3, in the shapes of the state dict; without one they are zeros."""
        up, down = (
            self.form.turned(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            for weight in (self.up, self.down)
        )
        for name, part in zip(self.names, self.form.parted(up, len(self.names)), strict=True):
            unstack(part, packed[f"d{name}"], self.layout, self.experts)
        unstack(down.transpose(1, 2), packed["dw2"].t(), self.layout, self.experts)


def stacked_layer(
    config: MoEConfig,
    state: State,
    weights: Sequence[Stacked],
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    library: str = "",
) -> Layer:
    """`experts(x, topk_weights, topk_ids)`, which use these weights, behind our router; `library`: whose they are."""
    router_weight = nn.Parameter(state["router.weight"].clone())

    def gradients() -> dict[str, Tensor]:
        assert router_weight.grad is not None
        found = {f"d{name}": torch.empty_like(state[name]) for name in ("w1", "w2", "w3") if name in state}
        for group in weights:
            group.add_gradients(found)
        return {"drouter": router_weight.grad, **found}

    parameters: list[Tensor] = [router_weight, *(weight for group in weights for weight in group.parameters())]
    called = with_version(library) if library else ""
    return Layer(lambda x: experts(x, *routed(x, router_weight, config)), parameters, gradients, library=called)
