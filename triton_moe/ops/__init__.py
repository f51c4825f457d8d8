"""Differentiable operators on the Triton kernels."""
