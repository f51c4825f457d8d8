"""The block-sparse baseline of `reference/` as contestants, right and with its historical error."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable

import torch
from layers import CannotRun, Layer, State, layer_of
from results import ROOT, with_version

sys.path.append(str(ROOT))  # `reference/` stands beside this folder, and is in no wheel
from reference import moe, stk_moe
from triton_moe import MoEConfig

SMALLEST_BLOCK = 8


def block_sparse_module(
    config: MoEConfig,
    *,
    historical: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> moe.MoEMLP:
    """In plain PyTorch, in the largest blocks of up to 128 that all widths are multiples of. Raises CannotRun if that
    is less than 8."""
    block_size = math.gcd(stk_moe.BLOCK_SIZE, *config.layout.widths)
    if block_size < SMALLEST_BLOCK:
        raise CannotRun(f"The block-sparse reference takes widths that are multiples of {SMALLEST_BLOCK}.")
    config = dataclasses.replace(config, block_size=block_size)
    return moe.MoEMLP(config, historical=historical, device=device, dtype=dtype)


def stk_module(
    config: MoEConfig,
    *,
    historical: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> stk_moe.StkMoEMLP:
    """On stk's kernels. Raises CannotRun without the package, or on a shape that they do not take."""
    try:
        return stk_moe.StkMoEMLP(config, historical=historical, device=device, dtype=dtype)
    except (ImportError, ValueError) as error:
        raise CannotRun(str(error)) from error


def _layer(build: Callable[..., moe.MoEMLP], config: MoEConfig, state: State, historical: bool) -> Layer:
    weight = state["w1"]
    return layer_of(build(config, historical=historical, device=weight.device, dtype=weight.dtype), state)


def block_sparse(config: MoEConfig, state: State) -> Layer:
    """`reference.moe.MoEMLP`."""
    return _layer(block_sparse_module, config, state, historical=False)


def block_sparse_historical(config: MoEConfig, state: State) -> Layer:
    """The same with the transposed topology sorted by too few bits: no gate lets it pass."""
    return _layer(block_sparse_module, config, state, historical=True)


def _stk(config: MoEConfig, state: State, historical: bool) -> Layer:
    if not state["w1"].is_cuda:
        raise CannotRun("stk runs on CUDA alone.")
    layer = _layer(stk_module, config, state, historical)
    assert isinstance(layer.module, stk_moe.StkMoEMLP)
    used = ("stanford-stk", "megablocks")[: 1 + layer.module.library.count("+")]
    return dataclasses.replace(layer, library=" + ".join(map(with_version, used)))


def stk(config: MoEConfig, state: State) -> Layer:
    """`reference.stk_moe.StkMoEMLP`: stanford-stk, and MegaBlocks' operators where they are installed."""
    return _stk(config, state, historical=False)


def stk_historical(config: MoEConfig, state: State) -> Layer:
    """The same with the transposed topology sorted by too few bits."""
    return _stk(config, state, historical=True)
