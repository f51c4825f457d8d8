"""Mixture-of-experts layers whose experts may have any width, in Triton."""

from triton_moe.balancing import BiasBalancing, update_expert_biases
from triton_moe.functional import moe_mlp
from triton_moe.layout import ExpertLayout, Routing
from triton_moe.moe import MoEConfig, MoEMLP

__all__ = ["BiasBalancing", "ExpertLayout", "MoEConfig", "MoEMLP", "Routing", "moe_mlp", "update_expert_biases"]
