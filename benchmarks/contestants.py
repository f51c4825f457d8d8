"""The layers that are compared. Each is built from one set of weights and has the same router, `route_tokens`.

Weights come as the state dict of `MoEMLP`: router.weight `(E, H)`, w1 and w3 `(H, S)`, w2 `(S, H)`. Letters as in
`triton_moe.layout`.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable

import torch
from baselines import block_sparse, block_sparse_historical, stk, stk_historical
from layers import CannotRun, Layer, State, layer_of, routed
from results import ROOT
from torch import Tensor, nn

sys.path.append(str(ROOT / "examples"))
from padded_experts import grouped_mm_mlp, stack

from triton_moe import MoEConfig, MoEMLP
from triton_moe.activations import GATE_ACTIVATION, is_gated
from triton_moe.layout import ExpertLayout
from triton_moe.torch_backend import ACTIVATION


def _moe_mlp(config: MoEConfig, state: State, backend: str) -> Layer:
    weight = state["w1"]
    return layer_of(
        MoEMLP(dataclasses.replace(config, backend=backend), device=weight.device, dtype=weight.dtype), state
    )


def _activation(config: MoEConfig) -> Callable[[Tensor], Tensor]:
    """Of a contestant without activations of its own; a gated one's is that of its gate."""
    return ACTIVATION[GATE_ACTIVATION.get(config.activation, config.activation)]


def triton_moe(config: MoEConfig, state: State) -> Layer:
    """`MoEMLP` as a user gets it."""
    return _moe_mlp(config, state, "auto")


def triton_moe_hopper(config: MoEConfig, state: State) -> Layer:
    """The same on the Hopper kernels. Raises CannotRun where there are none."""
    weight = state["w1"]
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) != (9, 0) or weight.element_size() != 2:
        raise CannotRun("The Hopper kernels take 16 bits on a GPU of compute capability 9.0.")
    if any(size % 64 for size in (config.hidden_size, *config.layout.widths)):
        raise CannotRun("The Hopper kernels take multiples of 64.")
    return _moe_mlp(config, state, "hopper")


def triton_moe_portable(config: MoEConfig, state: State) -> Layer:
    """The same on the kernels that run anywhere."""
    if not state["w1"].is_cuda:
        raise CannotRun("The portable kernels need a GPU.")
    return _moe_mlp(config, state, "triton")


def torch_loop(config: MoEConfig, state: State) -> Layer:
    """`MoEMLP` in plain PyTorch: a loop over experts, whose row counts come back to the host."""
    return _moe_mlp(config, state, "torch")


def _unstack(stacked: Tensor, layout: ExpertLayout) -> Tensor:
    """`(E, H, max width)` -> `(H, S)`, without the padding."""
    return torch.cat([stacked[e, :, :width] for e, width in enumerate(layout.widths)], dim=1)


class GroupedMM(nn.Module):
    """PyTorch's grouped GEMM, see `grouped_mm_mlp`.

    Takes one width for all experts, so narrower ones are padded to the widest with zeros. Gate and up are one GEMM.
    """

    def __init__(self, config: MoEConfig, state: State) -> None:
        super().__init__()
        self.config, layout = config, config.layout
        ups = [stack(state[name], layout) for name in ("w1", "w3") if name in state]
        self.router_weight = nn.Parameter(state["router.weight"].clone())
        self.w_up = nn.Parameter(torch.cat(ups, dim=2))
        self.w_down = nn.Parameter(stack(state["w2"].t(), layout).transpose(1, 2).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        topk_weights, topk_ids = routed(x, self.router_weight, self.config)
        return grouped_mm_mlp(x, topk_weights, topk_ids, self.w_up, self.w_down, self.config.activation)

    def gradients(self) -> dict[str, Tensor]:
        layout = self.config.layout
        assert self.router_weight.grad is not None
        assert self.w_up.grad is not None
        assert self.w_down.grad is not None
        ups = (_unstack(part, layout) for part in self.w_up.grad.split(layout.max_width, dim=2))
        named = {"drouter": self.router_weight.grad, **dict(zip(("dw1", "dw3"), ups, strict=False))}
        return named | {"dw2": _unstack(self.w_down.grad.transpose(1, 2), layout).t()}


def grouped_mm(config: MoEConfig, state: State) -> Layer:
    """`GroupedMM`, eager. Raises CannotRun where PyTorch's kernel does not take the dtype."""
    weight = state["w1"]
    if weight.is_cuda and weight.dtype != torch.bfloat16:
        raise CannotRun(f"PyTorch's grouped GEMM has a kernel for bfloat16 alone, and this is {weight.dtype}.")
    module = GroupedMM(config, state)
    return Layer(module, list(module.parameters()), module.gradients)


def grouped_mm_compiled(config: MoEConfig, state: State) -> Layer:
    """`GroupedMM` under torch.compile, compiled for each number of tokens."""
    layer = grouped_mm(config, state)
    return dataclasses.replace(layer, forward=torch.compile(layer.forward, dynamic=False))


def scattermoe(config: MoEConfig, state: State) -> Layer:
    """ScatterMoE's own MLP (github.com/shawntan/scattermoe) behind our router. Raises CannotRun without the package, a
    GPU, or for experts of different widths."""
    weight, layout = state["w1"], config.layout
    if len(layout.width_classes) > 1:
        raise CannotRun("ScatterMoE takes experts of one width.")
    if not weight.is_cuda:
        raise CannotRun("ScatterMoE runs on CUDA alone.")
    try:
        library = importlib.import_module("scattermoe.mlp")
    except ImportError as error:
        raise CannotRun(f"ScatterMoE cannot be imported: {error}.") from error
    gated, K = is_gated(config.activation), config.num_active_experts
    with torch.device(weight.device):
        mlp: nn.Module = (library.GLUMLP if gated else library.MLP)(
            config.hidden_size, layout.max_width, layout.num_experts, K, activation=_activation(config)
        )
    mlp.to(weight.dtype)
    router_weight = nn.Parameter(state["router.weight"].clone())
    up, down = mlp.get_parameter("experts.weight"), mlp.get_parameter("output_experts.weight")
    names = ("w3", "w1") if gated else ("w1",)
    with torch.no_grad():
        up.copy_(torch.cat([stack(state[name], layout) for name in names], dim=2).transpose(1, 2))
        down.copy_(stack(state["w2"].t(), layout))

    def forward(x: Tensor) -> Tensor:
        topk_weights, topk_ids = routed(x, router_weight, config)
        return mlp(x, topk_weights, topk_ids)

    def gradients() -> dict[str, Tensor]:
        assert router_weight.grad is not None
        assert up.grad is not None
        assert down.grad is not None
        ups = (_unstack(part.transpose(1, 2), layout) for part in up.grad.split(layout.max_width, dim=1))
        named = {"drouter": router_weight.grad, **{f"d{name}": dw for name, dw in zip(names, ups, strict=True)}}
        return named | {"dw2": _unstack(down.grad, layout).t()}

    return Layer(forward, [router_weight, *mlp.parameters()], gradients)


CONTESTANTS: dict[str, Callable[[MoEConfig, State], Layer]] = {
    build.__name__: build
    for build in (
        triton_moe,
        triton_moe_hopper,
        triton_moe_portable,
        torch_loop,
        grouped_mm,
        grouped_mm_compiled,
        scattermoe,
        block_sparse,
        block_sparse_historical,
        stk,
        stk_historical,
    )
}
OURS = ("triton_moe", "triton_moe_hopper", "triton_moe_portable", "torch_loop")
"""Those that the gate holds to the error budget of the project's own tests."""
