"""Other libraries' experts as contestants, each behind our router and on our weights, in the library's own form.

Each raises CannotRun where the library cannot be imported, or documents that it does not take a case. What it then does
wrong or cannot do after all is for the gate to say.
"""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from layers import CannotRun, Layer, State
from stacked import Form, Stacked, activation_of, stacked_layer
from torch import Tensor, nn

from triton_moe import MoEConfig
from triton_moe.activations import is_gated


def _all_experts(config: MoEConfig, state: State, form: Form) -> Stacked:
    return Stacked(config, state, form, range(config.layout.num_experts))


def _check(name: str, config: MoEConfig, state: State) -> None:
    """Raise CannotRun for experts of different widths, or without a GPU."""
    if len(config.layout.width_classes) > 1:
        raise CannotRun(f"{name} takes experts of one width.")
    if not state["w1"].is_cuda:
        raise CannotRun(f"{name} runs on CUDA alone.")


def _import(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotRun(f"{name} cannot be imported: {error}.") from error


def scattermoe(config: MoEConfig, state: State) -> Layer:
    """ScatterMoE's own MLP (github.com/shawntan/scattermoe)."""
    _check("ScatterMoE", config, state)
    library = _import("ScatterMoE", "scattermoe.mlp")
    gated, layout = is_gated(config.activation), config.layout
    weights = _all_experts(config, state, Form(("w3", "w1"), transposed=True))
    with torch.device(state["w1"].device):
        mlp: nn.Module = (library.GLUMLP if gated else library.MLP)(
            config.hidden_size,
            layout.max_width,
            layout.num_experts,
            config.num_active_experts,
            activation=activation_of(config),
        )
    mlp.get_submodule("experts").register_parameter("weight", weights.up)
    mlp.get_submodule("output_experts").register_parameter("weight", weights.down)
    return stacked_layer(config, state, [weights], mlp, "scattermoe")


def transformers_grouped_mm(config: MoEConfig, state: State) -> Layer:
    """The experts of Hugging Face transformers with its implementation "grouped_mm", padded to the widest expert."""
    library = _import("transformers", "transformers.integrations.moe")
    weight, gated = state["w1"], is_gated(config.activation)
    if weight.is_cuda and weight.dtype != torch.bfloat16:
        raise CannotRun(f"PyTorch's grouped GEMM has a kernel for bfloat16 alone, and this is {weight.dtype}.")
    weights = _all_experts(config, state, Form(transposed=True))

    @library.use_experts_implementation(has_gate=gated)
    class Experts(nn.Module):
        def __init__(self, _: Any) -> None:
            super().__init__()
            self.num_experts = config.layout.num_experts
            self.act_fn = activation_of(config)
            self.down_proj = weights.down
            self.register_parameter("gate_up_proj" if gated else "up_proj", weights.up)

        def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            raise RuntimeError("transformers did not take the implementation that was asked for")

    experts = Experts(SimpleNamespace(_experts_implementation="grouped_mm"))

    def call(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return experts(x, topk_ids.long(), topk_weights)

    return stacked_layer(config, state, [weights], call, "transformers")


def sonic_moe(config: MoEConfig, state: State) -> Layer:
    """SonicMoE (github.com/Dao-AILab/sonic-moe, 0.1.2) with the routing given. Of its activations SwiGLU alone is one
    of ours: its GELUs are approximations."""
    _check("SonicMoE", config, state)
    weight = state["w1"]
    if config.activation != "swiglu":
        raise CannotRun(f"SonicMoE has no {config.activation} of this definition.")
    if weight.is_cuda and weight.element_size() != 2:
        raise CannotRun(f"SonicMoE computes in 16 bits, and this is {weight.dtype}.")
    library, enums = _import("SonicMoE", "sonicmoe"), _import("SonicMoE", "sonicmoe.enums")
    activation = enums.ActivationType.SWIGLU
    weights = _all_experts(config, state, Form(transposed=True, interleaved=True))
    num_experts, K = config.layout.num_experts, config.num_active_experts

    def experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        token_ids = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(
            K, output_size=len(x) * K
        )
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        up, down = weights.up.permute(1, 2, 0), weights.down.permute(1, 2, 0)
        routing = (topk_weights.float().flatten(), token_ids, topk_ids.int().flatten())
        return library.moe_general_routing_inputs(x, *routing, up, None, down, None, num_experts, stream, activation)[0]

    return stacked_layer(config, state, [weights], experts, "sonic-moe")


def momoe(config: MoEConfig, state: State) -> Layer:
    """MoMoE (github.com/tilde-research/MoMoE-impl), which keeps all it can for backward: its fastest setting."""
    _check("MoMoE", config, state)
    if config.activation != "swiglu" or state["w1"].dtype != torch.bfloat16:
        raise CannotRun("MoMoE computes SwiGLU in bfloat16 alone.")
    library = _import("MoMoE", "momoe.momoe")
    weights = _all_experts(config, state, Form(("w3", "w1")))
    layout, K = config.layout, config.num_active_experts
    module: nn.Module = library.MoMoE(
        config.hidden_size, layout.max_width, layout.num_experts, K, 100, weights.up.detach(), weights.down.detach()
    )
    module.register_parameter("Wl1_ND2H", weights.up)
    module.register_parameter("Wl2_NHD", weights.down)

    def experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        ids, shape = topk_ids.long(), (len(x), layout.num_experts)
        scores = torch.zeros(shape, device=x.device).scatter(1, ids, topk_weights.float())
        chosen = torch.zeros(shape, dtype=torch.int32, device=x.device).scatter(1, ids, 1)
        return module(x[None], chosen.t().contiguous(), scores.t().contiguous())[0][0]

    return stacked_layer(config, state, [weights], experts, "momoe")
