"""Triton kernels and their launchers, one operator a file; also the starting document's names for the building blocks.

    from triton_moe.kernels import grouped_gemm_up_autograd, grouped_gemm_down_autograd

Those functions live above the kernels, in `triton_moe.functional`, and are looked up there when first used.
"""

from typing import TYPE_CHECKING

from triton_moe.kernels import gather, scatter

if TYPE_CHECKING:
    from triton_moe.functional import (
        gather_autograd,
        grouped_gemm_down,
        grouped_gemm_down_autograd,
        grouped_gemm_up,
        grouped_gemm_up_autograd,
        scatter_autograd,
    )

__all__ = [
    "gather",
    "gather_autograd",
    "grouped_gemm_down",
    "grouped_gemm_down_autograd",
    "grouped_gemm_up",
    "grouped_gemm_up_autograd",
    "scatter",
    "scatter_autograd",
]

# Loaded above and taken off the package again: here these names are the functions', not the files'.
del gather, scatter


def __getattr__(name: str):
    if name in __all__:
        from triton_moe import functional

        return getattr(functional, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
