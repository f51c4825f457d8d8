"""Mixture-of-experts layers whose experts may have any width, in Triton."""

from triton_moe.functional import moe_mlp
from triton_moe.layout import ExpertLayout, Routing
from triton_moe.moe import MoEConfig, MoEMLP

__all__ = ["ExpertLayout", "MoEConfig", "MoEMLP", "Routing", "moe_mlp"]
