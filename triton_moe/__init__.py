"""Mixture-of-experts layers whose experts may have any width, in Triton."""

from triton_moe.balancing import BiasBalancing, update_expert_biases
from triton_moe.experts import DenseMLP, Experts
from triton_moe.functional import moe_mlp
from triton_moe.layout import ExpertLayout, Routing
from triton_moe.moe import MoEConfig, MoEMLP
from triton_moe.router import GroupLimit

__all__ = [
    "BiasBalancing",
    "DenseMLP",
    "ExpertLayout",
    "Experts",
    "GroupLimit",
    "MoEConfig",
    "MoEMLP",
    "Routing",
    "moe_mlp",
    "update_expert_biases",
]
