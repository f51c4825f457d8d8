"""The layers that are compared. Each is built from one set of weights and has the same router, `route_tokens`.

Weights come as the state dict of `MoEMLP`: router.weight `(E, H)`, w1 and w3 `(H, S)`, w2 `(S, H)`. Letters as in
`triton_moe.layout`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from baselines import block_sparse, block_sparse_historical, stk, stk_historical
from grouped import grouped_mm, grouped_mm_by_width
from layers import CannotRun, Layer, State, layer_of
from peers import momoe, scattermoe, sonic_moe, transformers_grouped_mm
from stacked import activation_of
from torch import Tensor, nn

from triton_moe import MoEConfig, MoEMLP

Build = Callable[[MoEConfig, State], Layer]


def _moe_mlp(config: MoEConfig, state: State, backend: str) -> Layer:
    weight = state["w1"]
    return layer_of(
        MoEMLP(dataclasses.replace(config, backend=backend), device=weight.device, dtype=weight.dtype), state
    )


def triton_moe(config: MoEConfig, state: State) -> Layer:
    """`MoEMLP` as a user gets it."""
    return _moe_mlp(config, state, "auto")


def triton_moe_hopper(config: MoEConfig, state: State) -> Layer:
    """The same on the Hopper kernels. Raises CannotRun where there are none."""
    weight = state["w1"]
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) != (9, 0) or weight.element_size() != 2:
        raise CannotRun("The Hopper kernels take 16 bits on a GPU of compute capability 9.0.")
    if config.hidden_size % 64:
        raise CannotRun("The Hopper kernels take multiples of 64 as H.")
    return _moe_mlp(config, state, "hopper")


def triton_moe_portable(config: MoEConfig, state: State) -> Layer:
    """The same on the kernels that run anywhere."""
    if not state["w1"].is_cuda:
        raise CannotRun("The portable kernels need a GPU.")
    return _moe_mlp(config, state, "triton")


def torch_loop(config: MoEConfig, state: State) -> Layer:
    """`MoEMLP` in plain PyTorch: a loop over experts, whose row counts come back to the host."""
    return _moe_mlp(config, state, "torch")


def dense_ceiling(config: MoEConfig, state: State) -> Layer:
    """One MLP as wide as K experts of mean width, without a router: the FLOPs alone, another function."""
    layout = config.layout
    width = round(config.num_active_experts * layout.total_width / layout.num_experts)
    w1, w2 = (nn.Parameter(part.clone()) for part in (state["w1"][:, :width], state["w2"][:width]))
    w3 = nn.Parameter(state["w3"][:, :width].clone()) if "w3" in state else None
    act = activation_of(config)

    def forward(x: Tensor) -> Tensor:
        a = act(x @ w1)
        return (a if w3 is None else a * (x @ w3)) @ w2

    return Layer(forward, [w for w in (w1, w2, w3) if w is not None], dict, another_function=True)


def _compiled(build: Build) -> Build:
    """Under torch.compile, compiled for each number of tokens."""

    def built(config: MoEConfig, state: State) -> Layer:
        layer = build(config, state)
        return dataclasses.replace(layer, forward=torch.compile(layer.forward, dynamic=False))

    return built


def _graph(build: Build) -> Build:
    """Captured as CUDA graphs. Raises CannotRun without a GPU."""

    def built(config: MoEConfig, state: State) -> Layer:
        if not state["w1"].is_cuda:
            raise CannotRun("CUDA graphs need a GPU.")
        return dataclasses.replace(build(config, state), replayed=True)

    return built


_OWN = (triton_moe, triton_moe_hopper, triton_moe_portable)
_OTHERS = (
    torch_loop,
    grouped_mm,
    grouped_mm_by_width,
    transformers_grouped_mm,
    scattermoe,
    sonic_moe,
    momoe,
    block_sparse,
    block_sparse_historical,
    stk,
    stk_historical,
    dense_ceiling,
)
_MODES = {"compiled": _compiled, "graph": _graph}
CONTESTANTS: dict[str, Build] = {build.__name__: build for build in (*_OWN, *_OTHERS)} | {
    f"{build.__name__}_{mode}": wrap(build)
    for build in (*_OWN, grouped_mm, dense_ceiling)
    for mode, wrap in _MODES.items()
}
OURS = frozenset(name for name in CONTESTANTS if name.startswith((triton_moe.__name__, torch_loop.__name__)))
"""Those that the gate holds to the error budget of the project's own tests."""
