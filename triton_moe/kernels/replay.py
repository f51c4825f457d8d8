"""Host time: what the host did for a call it does again for the next one like it, with other addresses.

Which tiles a kernel gets, how large a buffer is, what is launched and in which order follow from shapes, strides,
dtypes and options, never from values, which the host does not see. So a call is watched once: a dispatch mode sees
which memory it asks PyTorch for and which products, the launchers tell what they launch. Further calls of its kind do
the same in the same order and work out nothing. Not repeatable, and so not recorded, is a call in which PyTorch
computes or copies anything else, whose arguments overlap, or that uses a pointer neither into an argument, nor into new
memory that is still there, nor to a table.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from triton_moe.kernels.config import allows_tf32, is_table
from triton_moe.kernels.launch import STREAM, Launch, current_stream, is_hooked, moved, watching
from triton_moe.kernels.tuning import forget_when_configured

Function = TypeVar("Function", bound=Callable[..., Any])
_MAX_KINDS = 1024
"""Kinds of calls that a function remembers: a batch size of its own for every step must not pile up for ever."""
_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)


_NEW, _SEEN = object(), object()
"""A kind's state before its first call, and before its second."""
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_COMPUTATIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.mm.dtype: torch.mm,
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.addmm_.default: Tensor.addmm_,
}
"""Operators of PyTorch that a call may repeat, as what they make depends on nothing but their operands, and a way to
them that costs less host time."""


class _Allocation(NamedTuple):
    value: int
    """The tensor's number among the call's: its arguments, then new ones in order."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Step(NamedTuple):
    """A launch or one of PyTorch's operators, what is allocated before it, and what is let go after it."""

    allocations: list[_Allocation]
    run: Callable[..., Any]
    arguments: list
    pointers: list[tuple[int, int, int]]
    """Place among the arguments; the value pointed into, and how many bytes into it."""
    descriptors: list[tuple[int, int]]
    """Likewise, of TMA descriptors, which begin where the value does."""
    operands: list[tuple[int, int, tuple | None]]
    """Likewise, of an operator's tensors; size and strides if these are not the value's own."""
    result: int | None
    """The operator's; None for a launch."""
    given_back: list[int]
    """Arguments of the call whose memory it gives back."""
    unused: list[int]
    """New tensors of no further use."""


def _launch_nothing(*_arguments: None) -> None:
    """For what is allocated after the last launch."""


def _is_constant(address: int) -> bool:
    """Whether a pointer is the same in every call of a kind: to a table, or to nothing."""
    return not address or is_table(address)


class _Value(NamedTuple):
    """A tensor that is there while the call is watched."""

    start: int
    end: int
    """Addresses of its first byte, and of the one after the last."""
    shape: tuple[torch.Size, tuple[int, ...]]
    """Size and strides."""
    dtype: torch.dtype
    tensor: weakref.ref[Tensor]
    storage: StorageWeakRef


def _value(tensor: Tensor) -> _Value:
    start, size, stride = tensor.data_ptr(), tensor.shape, tensor.stride()
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    end = start + (last + 1) * tensor.element_size() if tensor.numel() else start
    storage = StorageWeakRef(tensor.untyped_storage())
    return _Value(start, end, (size, stride), tensor.dtype, weakref.ref(tensor), storage)


def _is_view(result: Any, args: tuple) -> bool:
    """Whether an operator, of which PyTorch says that it makes views, has copied nothing: it may have, `contiguous` and
    `to` among them, where autograd is out of the way."""
    storages = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
    results = result if isinstance(result, (tuple, list)) else (result,)
    return all(tensor.untyped_storage()._cdata in storages for tensor in results)


class Recording(TorchDispatchMode):
    """Watches a call while it is active, then repeats it with other arguments."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self._device = arguments[0].device
        self._num_arguments = len(arguments)
        self._values = [_value(tensor) for tensor in arguments]
        self._given_back: set[int] = set()
        self._steps: list[_Step] = []
        self._allocations: list[_Allocation] = []
        """Those since the last launch."""
        spans = sorted(value[:2] for value in self._values if value.start < value.end)
        self.is_repeatable = all(a[1] <= b[0] or a[0] == b[0] for a, b in itertools.pairwise(spans))
        self._autocasts = torch._C._is_any_autocast_enabled()
        self._num_new = 0
        self._results: tuple[type, list[int]] | None = None
        """What the call returns: a tuple, a list, or a tensor; the values in it, -1 for None."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would import all of torch.compile for it, which takes seconds. What runs here is never traced."""
        return False

    def __enter__(self):
        super().__enter__()
        watching.by = self
        return self

    def __exit__(self, *exception: Any) -> None:
        watching.by = None
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if watching.by is not self:
            return result
        if func.overloadpacket in _ALLOCATIONS:
            size = tuple(result.shape)  # PyTorch takes a torch.Size more slowly
            self._allocations.append(_Allocation(len(self._values), size, result.stride(), result.dtype))
            self._add(result)
        elif func in _COMPUTATIONS and not any(isinstance(arg, Tensor) for arg in (kwargs or {}).values()):
            function = _COMPUTATIONS[func]
            self._computed(functools.partial(function, **kwargs) if kwargs else function, args, result)
        elif not (func.is_view and _is_view(result, args)):
            self.is_repeatable = False
        return result

    def _add(self, tensor: Tensor) -> None:
        self.is_repeatable &= tensor.device == self._device
        self._values.append(_value(tensor))

    def _computed(self, function: Callable[..., Any], args: tuple, result: Tensor) -> None:
        self.is_repeatable &= not self._autocasts  # which would cast operands once more
        operands = []
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor):
                number, offset = self._find(arg.data_ptr())
                value, shape = self._values[number], (arg.shape, arg.stride())
                self.is_repeatable &= number >= 0 and offset == 0 and arg.dtype == value.dtype
                operands.append((place, number, None if shape == value.shape else shape))
        arguments = [None if isinstance(arg, Tensor) else arg for arg in args]
        is_new = result is not args[0]
        number = len(self._values) if is_new else operands[0][1]
        self._steps.append(_Step(self._allocations, function, arguments, [], [], operands, number, [], []))
        self._allocations = []
        if is_new:
            self._add(result)

    def launched(self, launch: Launch | None) -> None:
        """A launcher made a launch; None: one that cannot be repeated."""
        if launch is None:
            self.is_repeatable = False
            return
        addresses = {place: launch.arguments[place] for place in launch.pointers}
        addresses |= {place: launch.arguments[place].base.data_ptr() for place in launch.descriptors}
        found = {place: self._find(address) for place, address in addresses.items() if not _is_constant(address)}
        self.is_repeatable &= all(value >= 0 for value, _ in found.values())
        self.is_repeatable &= all(place in found and found[place][1] == 0 for place in launch.descriptors)
        pointers = [(place, *found[place]) for place in launch.pointers if place in found]
        descriptors = [(place, found[place][0]) for place in launch.descriptors if place in found]
        for place in launch.descriptors:
            launch.arguments[place] = moved(launch.arguments[place], None)
        step = _Step(self._allocations, launch.run, launch.arguments, pointers, descriptors, [], None, [], [])
        self._steps.append(step)
        self._allocations = []

    def gave_back(self, address: int) -> None:
        """The call gave back the memory of the tensor that begins there."""
        number, _ = self._find(address)
        if number < 0 or not self._steps:
            self.is_repeatable = False
            return
        self._given_back.add(number)
        if number < self._num_arguments:
            self._steps[-1].given_back.append(number)

    def _find(self, address: int) -> tuple[int, int]:
        """The number of the value that an address is in, -1 if it is in none that is still there, and how many bytes
        into it."""
        for number, value in enumerate(self._values):
            if value.start <= address < value.end and not value.storage.expired() and number not in self._given_back:
                return number, address - value.start
        return -1, 0

    def finish(self, result: Any) -> None:
        """Note what the call returned: a new tensor, or a tuple or list of new tensors and Nones."""
        kind = type(result)
        tensors = [value.tensor() for value in self._values]
        numbers = []
        for tensor in result if kind in (tuple, list) else (result,):
            same = [n for n, other in enumerate(tensors) if other is tensor and n >= self._num_arguments]
            numbers.append(-1 if tensor is None else same[0] if same else None)
        self.is_repeatable &= None not in numbers
        if self._allocations:
            nothing: list[Any] = [None] * (STREAM + 1)
            self._steps.append(_Step(self._allocations, _launch_nothing, nothing, [], [], [], None, [], []))
        self._results = kind, numbers
        self._num_new = len(self._values) - self._num_arguments
        last_use: dict[int, _Step] = {}
        for step in self._steps:
            uses = (*step.pointers, *step.descriptors, *step.operands)
            last_use |= {number: step for _, number, *_ in uses}
        for number, step in last_use.items():
            if number >= self._num_arguments and number not in numbers:
                step.unused.append(number)
        self._values = []

    def repeat(self, arguments: list[Tensor], addresses: list[int]) -> Any:
        """The call with other arguments of its kind, which are at these addresses."""
        device = arguments[0].device
        stream = current_stream(device.index) if device.index is not None else None
        new: list[Any] = [None] * self._num_new
        values, addresses = [*arguments, *new], [*addresses, *new]
        for allocations, run, known, pointers, descriptors, operands, result, given_back, unused in self._steps:
            for value, size, stride, dtype in allocations:
                values[value] = torch.empty_strided(size, stride, dtype=dtype, device=device)
                addresses[value] = values[value].data_ptr()
            given = known.copy()
            if result is None:
                given[STREAM] = stream
                for place, value, offset in pointers:
                    given[place] = addresses[value] + offset
                for place, value in descriptors:
                    given[place] = moved(given[place], values[value])
                run(*given)
            else:
                for place, value, shape in operands:
                    given[place] = values[value] if shape is None else values[value].as_strided(*shape)
                values[result] = run(*given)
                addresses[result] = values[result].data_ptr()
            given.clear()  # it may hold what is let go here
            for value in given_back:
                values[value].untyped_storage().resize_(0)
            for value in unused:
                values[value] = None
        kind, results = self._results
        results = [None if value < 0 else values[value] for value in results]
        return results if kind is list else tuple(results) if kind is tuple else results[0]


def give_back(tensor: Tensor) -> None:
    """Give a tensor's memory back, whoever else holds it: it must not be used any more."""
    address = tensor.data_ptr()
    tensor.untyped_storage().resize_(0)
    if watching.by is not None:
        watching.by.gave_back(address)


def replayed(function: Function) -> Function:
    """Record the second call of each kind of a function of tensors and options, and repeat it from then on.

    The function launches kernels, multiplies and allocates; it returns a new tensor, or a tuple or list of new tensors
    and Nones. Calls with tensors that are not aligned to 16 bytes, on another device than the current one, or of a
    subclass, within another that is being recorded, and under a profiler's hooks are made as they stand.
    """
    known: dict[tuple, Any] = {}
    """A kind's recording, `_SEEN` once before there is one, None if there can be none."""
    forget_when_configured(known.clear)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        arguments, addresses, bits = [], [], 0
        kind: list[Any] = [allows_tf32(), torch._C._is_any_autocast_enabled()]
        for arg in args:
            if arg.__class__ in _TENSORS:
                address = arg.data_ptr()
                arguments.append(arg)
                addresses.append(address)
                bits |= address
                kind.append((arg.shape, arg.stride(), arg.dtype))
            elif isinstance(arg, Tensor):  # a subclass's: nobody knows what it makes of a call
                return function(*args, **options)
            else:
                kind.append(tuple(arg) if arg.__class__ is list else arg)
        kind += options.values()
        device = arguments[0].get_device()
        is_elsewhere = device >= 0 and device != torch._C._cuda_getDevice()
        if bits % 16 or is_elsewhere or is_hooked() or watching.by is not None:
            return function(*args, **options)
        if len(set(addresses)) < len(addresses):
            kind += map(addresses.index, addresses)  # which arguments are one and the same
        key = (device, *kind)
        recording = known.get(key, _NEW)
        if recording.__class__ is Recording:
            return recording.repeat(arguments, addresses)
        if recording is _NEW:
            if len(known) >= _MAX_KINDS:
                known.clear()
            known[key] = _SEEN
        if recording is not _SEEN:
            return function(*args, **options)
        with Recording(arguments) as recording:
            result = function(*args, **options)
        recording.finish(result)
        known[key] = recording if recording.is_repeatable else None
        return result

    return call  # type: ignore[return-value]
