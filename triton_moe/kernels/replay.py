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

from triton_moe.constants import is_table
from triton_moe.kernels.config import allows_tf32
from triton_moe.kernels.launch import STREAM, Launch, current_stream, is_hooked, watching
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
    torch.ops.aten.addmm_.default: Tensor.addmm_,
}
"""Operators of PyTorch that a call may repeat, as what they make depends on nothing but their operands, and a way to
them that costs less host time."""


def _empty_strided(device_type: str) -> Callable[[tuple, tuple, torch.dtype], Tensor]:
    """`torch.empty_strided` on the current device, without the dispatcher, half of its host time: as the code that
    torch.compile writes allocates."""
    return getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}")


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
    """Watches a call while it is active, then repeats it with other arguments.

    What is to be repeated is written down as a Python function without loops or lookups, because going through a list
    of steps takes longer. In it `t3` is the call's tensor number 3, from 0 on, arguments first, then new ones in order,
    and `a3` its address.
    """

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self._device = arguments[0].device
        self._num_arguments = len(arguments)
        self._values = [_value(tensor) for tensor in arguments]
        self._given_back: set[int] = set()
        self._lines: list[str] = []
        self._last_use: dict[int, int] = {}
        """Of a tensor, the line."""
        self._names: dict[str, Any] = {"empty": _empty_strided(self._device.type)}
        spans = sorted(value[:2] for value in self._values if value.start < value.end)
        self.is_repeatable = all(a[1] <= b[0] or a[0] == b[0] for a, b in itertools.pairwise(spans))
        self._autocasts = torch._C._is_any_autocast_enabled()
        self._run: Callable[[int | None, list[Tensor], list[int]], Any] | None = None

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
            size, dtype = tuple(result.shape), self._name(result.dtype)
            self._made(result, f"empty({size}, {result.stride()}, {dtype})")
        elif func in _COMPUTATIONS and not any(isinstance(arg, Tensor) for arg in (kwargs or {}).values()):
            self._computed(functools.partial(_COMPUTATIONS[func], **kwargs or {}), args, result)
        elif not (func.is_view and _is_view(result, args)):
            self.is_repeatable = False
        return result

    def _name(self, value: Any) -> str:
        """What the function calls something that is the same every time."""
        if value is None or value.__class__ is int:
            return repr(value)
        self._names[f"c{len(self._names)}"] = value
        return f"c{len(self._names) - 1}"

    def _write(self, line: str, *used: int) -> None:
        self._last_use |= dict.fromkeys(used, len(self._lines))
        self._lines.append(line)

    def _made(self, tensor: Tensor, expression: str, *used: int) -> None:
        number = len(self._values)
        self._write(f"t{number} = {expression}; a{number} = t{number}.data_ptr()", number, *used)
        self.is_repeatable &= tensor.device == self._device
        self._values.append(_value(tensor))

    def _computed(self, function: Callable[..., Any], args: tuple, result: Tensor) -> None:
        self.is_repeatable &= not self._autocasts  # which would cast operands once more
        operands, used = [], []
        for arg in args:
            if not isinstance(arg, Tensor):
                operands.append(self._name(arg))
                continue
            number, offset = self._find(arg.data_ptr())
            value, shape = self._values[number], (arg.shape, arg.stride())
            self.is_repeatable &= number >= 0 and offset == 0 and arg.dtype == value.dtype
            view = "" if shape == value.shape else f".as_strided({tuple(arg.shape)}, {arg.stride()})"
            operands.append(f"t{number}{view}")
            used.append(number)
        expression = f"{self._name(function)}({', '.join(operands)})"
        if result is args[0]:
            self._write(expression, *used)
        else:
            self._made(result, expression, *used)

    def launched(self, launch: Launch | None) -> None:
        """A launcher made a launch; None: one that cannot be repeated."""
        if launch is None:
            self.is_repeatable = False
            return
        given, used = {STREAM: "stream"}, []

        def moving(address: int) -> str:
            number, offset = self._find(address)
            self.is_repeatable &= number >= 0
            used.append(number)
            return f"a{number} + {offset}" if offset else f"a{number}"

        for place in launch.pointers:
            if not _is_constant(launch.arguments[place]):
                given[place] = moving(launch.arguments[place])
        for place, at in launch.descriptors.items():
            given[place] = f"*{self._name(at)}({moving(launch.arguments[place].base.data_ptr())})"
        arguments = [given[i] if i in given else self._name(arg) for i, arg in enumerate(launch.arguments)]
        if launch.packed is not None:
            arguments[launch.packed :] = [f"({', '.join(arguments[launch.packed :])},)"]
        self._write(f"{self._name(launch.run)}({', '.join(arguments)})", *used)

    def gave_back(self, address: int) -> None:
        """The call gave back the memory of the tensor that begins there."""
        number, _ = self._find(address)
        self.is_repeatable &= number >= 0
        self._given_back.add(number)
        if 0 <= number < self._num_arguments:
            self._write(f"t{number}.untyped_storage().resize_(0)", number)

    def _find(self, address: int) -> tuple[int, int]:
        """The number of the value that an address is in, -1 if it is in none that is still there, and how many bytes
        into it."""
        for number, value in enumerate(self._values):
            if value.start <= address < value.end and not value.storage.expired() and number not in self._given_back:
                return number, address - value.start
        return -1, 0

    def finish(self, result: Any) -> None:
        """Note what the call returned: a new tensor, or a tuple or list of new tensors and Nones."""
        tensors = [value.tensor() for value in self._values]
        self._values = []

        def name(tensor: Tensor | None) -> str:
            if tensor is None:
                return "None"
            same = [n for n, other in enumerate(tensors) if other is tensor and n >= self._num_arguments]
            self.is_repeatable &= bool(same)
            return f"t{same[0]}" if same else ""

        returned = [name(tensor) for tensor in (result if isinstance(result, (tuple, list)) else (result,))]
        if not self.is_repeatable:
            return
        for number, line in self._last_use.items():
            if number >= self._num_arguments and f"t{number}" not in returned:
                self._lines[line] += f"; del t{number}"
        listed, numbers = ", ".join(returned), range(self._num_arguments)
        value = f"[{listed}]" if isinstance(result, list) else f"({listed},)" if isinstance(result, tuple) else listed
        lines = [
            "def run(stream, tensors, addresses):",
            f"{', '.join(f't{n}' for n in numbers)}, = tensors",
            f"{', '.join(f'a{n}' for n in numbers)}, = addresses",
            *self._lines,
            f"return {value}",
        ]
        exec("\n ".join(lines), self._names)
        self._run = self._names.pop("run")

    def repeat(self, arguments: list[Tensor], addresses: list[int]) -> Any:
        """The call with other arguments of its kind, which are at these addresses."""
        assert self._run is not None
        stream = None if self._device.index is None else current_stream(self._device.index)
        return self._run(stream, arguments, addresses)


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor is all that is in its storage; hooks on saved tensors may give back a part of a larger one."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


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
