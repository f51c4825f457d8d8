"""Launching a kernel at a small cost in host time, on which small shapes depend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MAX_COMPILED = 1024
"""Entries a launcher remembers: integer arguments that follow the number of tokens must not pile up for ever."""


class Launcher:
    """A kernel with its compile-time arguments. Called with a grid and the run-time arguments, which come first.

    Triton works out at every launch which compiled kernel the arguments ask for. Here that is looked up by what it
    depends on: the arguments' dtypes, and the values of the integers among them. What is not known yet, and tensors
    that are not aligned to 16 bytes, take Triton's way. An empty grid launches nothing. The kernel runs on the tensors'
    device, current or not.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self.options = options
        self._compiled: dict[tuple, tuple[Any, list]] = {}

    def __call__(self, grid: tuple[int, ...], *args: Tensor | int | None) -> None:
        if 0 in grid:
            return
        device = args[0].get_device()  # type: ignore[union-attr]
        if device < 0:  # interpreted
            self.kernel[grid](*args, **self.options)
        elif device == torch.cuda.current_device():
            self._launch(grid, device, args)
        else:
            with torch.cuda.device(device):
                self._launch(grid, device, args)

    def _launch(self, grid: tuple[int, ...], device: int, args: tuple) -> None:
        values, key, addresses = [], [device], 0
        for arg in args:
            if isinstance(arg, Tensor):
                address = arg.data_ptr()
                addresses |= address
                values.append(address)
                key.append(arg.dtype)  # type: ignore[arg-type]
            else:
                values.append(arg)
                key.append(arg)
        known = None if addresses % 16 else self._compiled.get(tuple(key))
        if known is not None:
            compiled, constexprs = known
            compiled[grid + (1,) * (3 - len(grid))](*values, *constexprs)
            return
        compiled = self.kernel[grid](*args, **self.options)
        if addresses % 16 == 0:
            if len(self._compiled) == _MAX_COMPILED:
                self._compiled.clear()
            constexprs = [self.options[name] for name in self.kernel.arg_names[len(args) :]]
            self._compiled[tuple(key)] = compiled, constexprs
