"""Launching a kernel at a small cost in host time, on which small shapes depend."""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

_MAX_COMPILED = 1024
"""Entries a launcher remembers: integer arguments that follow the number of tokens must not pile up for ever."""
_MAX_ENCODED = 8192
"""Encoded descriptors remembered: every layer's weights, and what the caching allocator hands out in turn."""
_HOOKS = triton.knobs.runtime
_ONES = ((1, 1, 1), (1, 1), (1,), ())
"""What a grid of so many dimensions lacks of three."""


def is_hooked() -> bool:
    """Whether a profiler hooks into Triton's launches, which then all take Triton's way."""
    return bool(_HOOKS.launch_enter_hook.calls or _HOOKS.launch_exit_hook.calls)


def current_stream(device: int) -> int:
    return driver.active.get_current_stream(device)


class Launch(NamedTuple):
    """A launch, to be made again with other addresses: `run(*arguments)`."""

    run: Callable[..., Any]
    arguments: list
    """Three of the grid, the stream (at `STREAM`), what Triton wants, then the kernel's."""
    pointers: list[int]
    """Places of addresses among the arguments."""
    descriptors: dict[int, Callable[[int], Sequence]]
    """Places of TMA descriptors, and what `run` takes there, several arguments, for one like it of another address."""
    packed: int | None
    """The place from which on `run` takes all arguments as one tuple."""


STREAM = 3
RELEASE = next((known for known in ("3.6", "3.9") if triton.__version__.startswith(f"{known}.")), None)
"""The release of Triton, if it is one whose C functions are called here past its Python. What any other launches goes
its own way, and has its descriptors encoded every time."""


class _Way(NamedTuple):
    """How a compiled kernel is launched."""

    run: Callable[..., Any]
    wanted: tuple
    """What `run` takes between the stream and the kernel's arguments."""
    packs: bool
    """Whether it takes these as one tuple."""


def _way_of(compiled: Any) -> _Way:
    """`compiled.run` looks for scratch memory at every launch, and takes all arguments apart and together again. Where
    no scratch memory is needed its C function is launched past it."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if RELEASE is None or run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return _Way(run, (function, metadata, None, None, None), False)
    how = function, run.launch_cooperative_grid, run.launch_pdl
    if RELEASE == "3.6":
        return _Way(run.launch, (*how, None, None, metadata, None, None, None), False)
    nothing = (None,) * 5  # metadata for hooks, two hooks, two scratch memories
    return _Way(run.launch, (*how, metadata, *nothing, run.arg_annotations, run.kernel_signature), True)


def _past_encoding(run: Callable[..., Any]) -> tuple[Callable[..., Any], list]:
    """-> Triton's C function and what is known of each descriptor at compile time, if `run` is the Python before that
    function, which encodes descriptors at every launch; else `run` and nothing."""
    if RELEASE is not None and inspect.isfunction(run):
        within = inspect.getclosurevars(run).nonlocals
        known = within.get("tensordesc_meta")
        if known and all(known) and "launcher" in within:
            return within["launcher"], known
    return run, []


class _Address(NamedTuple):
    """A descriptor's base, of which Triton asks no more."""

    address: int

    def data_ptr(self) -> int:
        return self.address


@functools.lru_cache(maxsize=_MAX_ENCODED)
def _encoded(shape: tuple, strides: tuple, padding: str, known: tuple, address: int) -> Sequence:
    """What Triton's C function takes for a descriptor; it depends on nothing else."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    base = _Address(address)
    like = SimpleNamespace(base=base, shape=shape, strides=strides, padding=padding, round_f32_to_tf32=False)
    of_launch = () if RELEASE == "3.6" else (None,)  # which it does not use
    return make_tensordesc_arg(like, dict(known), *of_launch)


def _moved(descriptor: TensorDescriptor, address: int) -> Sequence:
    other = copy.copy(descriptor)
    other.base = _Address(address)
    return (other,)


def _descriptor_at(descriptor: TensorDescriptor, known: dict | None) -> Callable[[int], Sequence]:
    """Address -> what a launch takes for a descriptor like this one: encoded, if `_past_encoding` says what is `known`
    of it."""
    if known is None:
        like = copy.copy(descriptor)
        like.base = None  # or it would keep memory
        return functools.partial(_moved, like)
    frozen = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in known.items())
    shape, strides = tuple(descriptor.shape), tuple(descriptor.strides)
    return functools.partial(_encoded, shape, strides, descriptor.padding, frozen)


class Watcher(Protocol):
    def launched(self, launch: Launch | None) -> None:
        """A kernel was launched so; None: in a way that cannot be repeated."""

    def gave_back(self, address: int) -> None:
        """The memory of the tensor that begins there was given back."""


class _Watching(threading.local):
    by: Watcher | None = None


watching = _Watching()
"""Who sees this thread's launches."""


class Piece:
    """Some elements of a tensor that outlives it, as an argument of a kernel. A view takes ten times the host time."""

    __slots__ = "address", "dtype", "first", "size", "whole"

    def __init__(self, whole: Tensor, first: int, size: int, dtype: torch.dtype, address: int) -> None:
        """`first` and `size` count elements of `whole`, which are taken for `dtype` and lie at `address`."""
        self.whole, self.first, self.size, self.dtype, self.address = whole, first, size, dtype, address

    def view(self) -> Tensor:
        return self.whole[self.first : self.first + self.size].view(self.dtype)

    def __getitem__(self, place: int) -> Tensor:
        return self.view()[place]


Argument = Tensor | Piece | TensorDescriptor | int | None


class Launcher:
    """A kernel with its compile-time arguments. Called with a grid and the run-time arguments, which come first.

    Triton works out at every launch which compiled kernel the arguments ask for. Here that is looked up by what it
    depends on: the arguments' dtypes, and the values of the integers among them, unless the kernel says that it does
    not specialise to one. What is not known yet, tensors that are not aligned to 16 bytes, and every launch while a
    profiler hooks into Triton's, take Triton's way. An empty grid launches nothing. The kernel runs on the tensors'
    device, current or not. Products and sums are fused, whatever a release of Triton does by default.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self.options = {"enable_fp_fusion": True, **options}
        names = getattr(kernel, "do_not_specialize", ())
        self._unspecialized = [i for i, name in enumerate(kernel.arg_names) if name in names]
        self._pointers: list[int] | None = None
        """Places of the arguments that are no integers, known from the first launch."""
        self._compiled: dict[tuple, tuple] = {}

    def __call__(self, grid: tuple[int, ...], *args: Argument) -> None:
        if 0 in grid:
            return
        device = args[0].get_device()  # type: ignore[union-attr]
        watcher, watching.by = watching.by, None  # what PyTorch does in a launch is not the caller's doing
        try:
            if device < 0:  # interpreted
                self._launch_slowly(grid, args)
            elif device == torch._C._cuda_getDevice():  # there is a tensor, so CUDA needs no initialising
                self._launch(grid, device, args)
            else:
                with torch.cuda.device(device):
                    self._launch(grid, device, args)
        finally:
            watching.by = watcher
        if watcher is not None:
            watcher.launched(self._again(grid, device, args))

    def _launch(self, grid: tuple[int, ...], device: int, args: tuple) -> None:
        values, key = self._values_and_key(device, args)
        known = None if key is None else self._compiled.get(key)
        if known is None or is_hooked():
            compiled = self._launch_slowly(grid, args)
            if key is not None:
                self._remember(key, compiled, len(args))
            return
        (run, wanted, packs), constexprs = known
        values += constexprs
        run(*grid, *_ONES[len(grid)], current_stream(device), *wanted, *((tuple(values),) if packs else values))

    def _values_and_key(self, device: int, args: tuple) -> tuple[list, tuple | None]:
        """-> what Triton's C function takes for the arguments, and what they ask of a compiled kernel, None if that is
        not aligned."""
        if self._pointers is None:
            self._pointers = [i for i, arg in enumerate(args) if arg.__class__ is not int]
        values, key, addresses = list(args), [*args, device], 0
        for i in self._pointers:
            arg = args[i]
            if arg is None:
                continue
            if arg.__class__ is TensorDescriptor:  # aligned, and written anew at every launch
                key[i] = arg.base.dtype
                continue
            values[i] = address = arg.address if arg.__class__ is Piece else arg.data_ptr()
            addresses |= address
            key[i] = arg.dtype
        for i in self._unspecialized:  # an int32 compiles to the same whatever it is
            if values[i] < 2**31:
                key[i] = int
        return values, None if addresses % 16 else tuple(key)

    def _launch_slowly(self, grid: tuple[int, ...], args: tuple) -> Any:
        """Triton's way. -> the compiled kernel."""
        return self.kernel[grid](*(arg.view() if arg.__class__ is Piece else arg for arg in args), **self.options)

    def _remember(self, key: tuple, compiled: Any, num_args: int) -> None:
        if len(self._compiled) >= _MAX_COMPILED:
            self._compiled.clear()
        constexprs = [self.options[name] for name in self.kernel.arg_names[num_args:]]
        self._compiled[key] = _way_of(compiled), constexprs

    def _again(self, grid: tuple[int, ...], device: int, args: tuple) -> Launch | None:
        """The launch just made, or None if only Triton's way can make it."""
        values, key = self._values_and_key(device, args)
        if device < 0:
            dtypes = [None if arg is None or arg.__class__ is int else arg.dtype for arg in args]
            run, wanted, packs, constexprs = functools.partial(self._interpret, dtypes), (), False, ()
        else:
            known = None if key is None else self._compiled.get(key)
            if known is None:
                return None
            (run, wanted, packs), constexprs = known
        run, known_of = _past_encoding(run)
        head = [*grid, *_ONES[len(grid)], None, *wanted]
        places = [i for i, arg in enumerate(args) if arg.__class__ is TensorDescriptor]
        known_of = known_of or [None] * len(places)
        return Launch(
            run,
            [*head, *values, *constexprs],
            [len(head) + i for i, arg in enumerate(args) if arg.__class__ not in (int, type(None), TensorDescriptor)],
            {len(head) + i: _descriptor_at(args[i], known) for i, known in zip(places, known_of, strict=True)},
            len(head) if packs else None,
        )

    def _interpret(self, dtypes: list[torch.dtype | None], *arguments: Any) -> None:
        """A `Launch.run` for the interpreter. `dtypes`: of what the kernel's arguments point to."""
        given = [
            value if dtype is None else _element_at(value, dtype)
            for dtype, value in zip(dtypes, arguments[STREAM + 1 :], strict=True)
        ]
        self._launch_slowly(arguments[:STREAM], tuple(given))


def _element_at(address: int, dtype: torch.dtype) -> Tensor:
    """A tensor at an address of the CPU's memory, of which kernels only take that and the dtype."""
    if not address:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)
