"""Mixture-of-experts layers whose experts may have any width, in Triton."""

from triton_moe.functional import moe_mlp
from triton_moe.layout import ExpertLayout, Routing

__all__ = ["ExpertLayout", "Routing", "moe_mlp"]
