"""Launching a kernel at a small cost in host time, on which small shapes depend."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

_MAX_COMPILED = 1024
"""Entries a launcher remembers: integer arguments that follow the number of tokens must not pile up for ever."""


class Launcher:
    """A kernel with its compile-time arguments. Called with a grid and the run-time arguments, which come first.

    Triton works out at every launch which compiled kernel the arguments ask for. Here that is looked up by what it
    depends on: the arguments' dtypes, and the values of the integers among them, unless the kernel says that it does
    not specialise to one. What is not known yet, tensors that are not aligned to 16 bytes, and every launch while a
    profiler hooks into Triton's, take Triton's way. An empty grid launches nothing. The kernel runs on the tensors'
    device, current or not.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self.options = options
        names = getattr(kernel, "do_not_specialize", ())
        self._unspecialized = [i for i, name in enumerate(kernel.arg_names) if name in names]
        self._compiled: dict[tuple, tuple] = {}

    def __call__(self, grid: tuple[int, ...], *args: Tensor | TensorDescriptor | int | None) -> None:
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
            if arg is None or arg.__class__ is int:
                values.append(arg)
                key.append(arg)
            elif arg.__class__ is TensorDescriptor:  # aligned, and written anew at every launch
                values.append(arg)
                key.append(arg.base.dtype)
            else:
                address = arg.data_ptr()
                addresses |= address
                values.append(address)
                key.append(arg.dtype)
        for i in self._unspecialized:  # an int32 compiles to the same whatever it is
            if values[i] < 2**31:
                key[i + 1] = int
        aligned = addresses % 16 == 0
        known = self._compiled.get(tuple(key)) if aligned else None
        hooks = triton.knobs.runtime
        if known is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled = self.kernel[grid](*args, **self.options)
            if aligned:
                self._remember(tuple(key), compiled, len(args))
            return
        run, function, metadata, constexprs = known
        stream = driver.active.get_current_stream(device)
        run(*grid, *(1,) * (3 - len(grid)), stream, function, metadata, None, None, None, *values, *constexprs)

    def _remember(self, key: tuple, compiled: Any, num_args: int) -> None:
        if len(self._compiled) >= _MAX_COMPILED:
            self._compiled.clear()
        constexprs = [self.options[name] for name in self.kernel.arg_names[num_args:]]
        self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, constexprs
