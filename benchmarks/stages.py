"""Forward passes taken apart: each stage as a call of its own, on what the stages before it give.

Stages of one name do the same work; where a contestant has none of a name, another of its stages does that work or it
need not be done. Letters as in `triton_moe.layout`.
"""

from __future__ import annotations

from baselines import moe
from layers import routed
from timing import Call
from torch import Tensor

from triton_moe import MoEMLP, torch_backend
from triton_moe.products import Shape, products

STAGES = ("router", "sort", "topology", "gather", "up", "activation", "down", "scatter")


def _leaf(tensor: Tensor) -> Tensor:
    """Whose consumers record a graph, as in training."""
    return tensor.detach().requires_grad_()


def _of_reference(module: moe.MoEMLP, x: Tensor) -> dict[str, Call]:
    num_experts, block_size = module.layout.num_experts, module.config.block_size
    topk_weights, topk_ids = routed(x, module.router.weight, module.config)
    weights = _leaf(topk_weights)
    rows = moe.padded_rows(topk_ids, num_experts, block_size)
    topology = module.topology(rows)
    gathered = _leaf(module.gather(x, rows))
    products = [_leaf(product) for product in module.up(gathered, topology)]
    activated = _leaf(module.activate(products))
    down = _leaf(module.down(activated, topology))
    return {
        "router": lambda: routed(x, module.router.weight, module.config),
        "sort": lambda: moe.padded_rows(topk_ids, num_experts, block_size),
        "topology": lambda: module.topology(rows),
        "gather": lambda: module.gather(x, rows),
        "up": lambda: module.up(gathered, topology),
        "activation": lambda: module.activate(products),
        "down": lambda: module.down(activated, topology),
        "scatter": lambda: module.scatter(down, weights, rows),
    }


def _of_kernels(module: MoEMLP, x: Tensor) -> dict[str, Call]:
    """`up` gathers and activates. Its operands are those of `triton_moe.products`, routed at random."""
    config = module.config
    shape = Shape(len(x), config.hidden_size, module.layout, config.num_active_experts, config.activation)
    kernels = products(shape, config.backend, x.dtype, x.device)
    return {
        "router": lambda: routed(x, module.router.weight, config),
        "sort": kernels["route"].call,
        **{name: kernels[name].call for name in ("up", "down", "scatter")},
    }


def _of_plain_pytorch(module: MoEMLP, x: Tensor) -> dict[str, Call]:
    """`up` gathers and activates."""
    layout, activation = module.layout, module.config.activation
    topk_weights, topk_ids = routed(x, module.router.weight, module.config)
    weights, routing = _leaf(topk_weights), torch_backend.route(topk_ids, layout)

    def up() -> Tensor:
        return torch_backend.grouped_gemm_up(x, module.w1, module.w3, routing=routing, activation=activation)

    activated = _leaf(up())
    y = _leaf(torch_backend.grouped_gemm_down(activated, module.w2, routing=routing))
    return {
        "router": lambda: routed(x, module.router.weight, module.config),
        "sort": lambda: torch_backend.route(topk_ids, layout),
        "up": up,
        "down": lambda: torch_backend.grouped_gemm_down(activated, module.w2, routing=routing),
        "scatter": lambda: torch_backend.scatter(y, weights, routing=routing),
    }


def stages_of(module: MoEMLP, x: Tensor) -> dict[str, Call]:
    """The stages of a module's forward pass on `x (T, H)`, some of `STAGES`, in order."""
    if isinstance(module, moe.MoEMLP):
        return _of_reference(module, x)
    plain = not x.is_cuda or module.config.backend == "torch"
    return _of_plain_pytorch(module, x) if plain else _of_kernels(module, x)
