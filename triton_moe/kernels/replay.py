"""Host time: what the host did for a call it does again for the next one like it, with other addresses.

Which tiles a kernel gets, how large a buffer is, what is launched and in which order follow from shapes, strides,
dtypes and options, never from values, which the host does not see. So a call is watched once: a dispatch mode sees
which memory it asks PyTorch for and which products, the launchers tell what they launch. Further calls of its kind do
the same in the same order and work out nothing. Not repeatable, and so never recorded, is a call in which PyTorch
computes anything else, whose arguments overlap, or that uses a pointer neither into an argument, nor into new memory,
nor to a table.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_moe.kernels.config import is_table
from triton_moe.kernels.launch import STREAM, Launch, current_stream, is_hooked, moved, watching
from triton_moe.kernels.tuning import forget_when_configured

Function = TypeVar("Function", bound=Callable[..., Any])
_MAX_KINDS = 1024
"""Kinds of calls that a function remembers: a batch size of its own for every step must not pile up for ever."""
_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)


_NEW, _SEEN = object(), object()
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_COMPUTATIONS = frozenset((torch.ops.aten.mm.default, torch.ops.aten.mm.dtype, torch.ops.aten.add.Tensor))


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


def _span(tensor: Tensor) -> tuple[int, int]:
    """Address of the first byte, and of the one after the last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


class Recording(TorchDispatchMode):
    """Watches a call while it is active, then repeats it with other arguments."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self._num_arguments = self._num_values = len(arguments)
        self._steps: list[_Step] = []
        self._allocations: list[_Allocation] = []
        """Those since the last launch."""
        self._memory = [(*_span(tensor), value) for value, tensor in enumerate(arguments)]
        """Latest last: what is let go may be another's next."""
        self._shapes = [(tensor.shape, tensor.stride()) for tensor in arguments]
        spans = sorted(span for span in self._memory if span[0] < span[1])
        self.is_repeatable = all(a[1] <= b[0] or a[0] == b[0] for a, b in itertools.pairwise(spans))
        self._autocasts = torch._C._is_any_autocast_enabled()
        self._created: list[weakref.ref[Tensor]] = []
        self._results: tuple[type, list[int]] | None = None
        """What the call returns: a tuple, a list, or a tensor; the values in it, -1 for None."""

    def __enter__(self):
        watching.by = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        watching.by = None
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if watching.by is not self:
            return result
        if func.overloadpacket in _ALLOCATIONS:
            size = tuple(result.shape)  # PyTorch takes a torch.Size more slowly
            self._allocations.append(_Allocation(self._num_values, size, result.stride(), result.dtype))
            self._add_value(result)
        elif func in _COMPUTATIONS and not any(isinstance(arg, Tensor) for arg in (kwargs or {}).values()):
            self._computed(functools.partial(func, **kwargs) if kwargs else func, args, result)
        elif not func.is_view:
            self.is_repeatable = False
        return result

    def _add_value(self, tensor: Tensor) -> None:
        self._memory.append((*_span(tensor), self._num_values))
        self._shapes.append((tensor.shape, tensor.stride()))
        self._created.append(weakref.ref(tensor))
        self._num_values += 1

    def _computed(self, function: Callable[..., Any], args: tuple, result: Tensor) -> None:
        self.is_repeatable &= not self._autocasts  # which would cast operands once more
        operands = []
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor):
                value, offset = self._find(arg.data_ptr())
                self.is_repeatable &= value >= 0 and offset == 0
                shape = arg.shape, arg.stride()
                operands.append((place, value, None if shape == self._shapes[value] else shape))
        arguments = [None if isinstance(arg, Tensor) else arg for arg in args]
        step = _Step(self._allocations, function, arguments, [], [], operands, self._num_values, [], [])
        self._steps.append(step)
        self._allocations = []
        self._add_value(result)

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
        value, _ = self._find(address)
        if value < 0 or not self._steps:
            self.is_repeatable = False
        elif value < self._num_arguments:
            self._steps[-1].given_back.append(value)
            self._memory = [span for span in self._memory if span[2] != value]

    def _find(self, address: int) -> tuple[int, int]:
        """The value that an address is in, -1 if it is in none, and how many bytes into it."""
        for start, end, value in reversed(self._memory):
            if start <= address < end:
                return value, address - start
        return -1, 0

    def finish(self, result: Any) -> None:
        """Note what the call returned: new tensors and Nones."""
        created = [reference() for reference in self._created]
        values = []
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            same = [value for value, other in enumerate(created, self._num_arguments) if other is tensor]
            values.append(-1 if tensor is None else same[0] if same else None)
        self.is_repeatable &= None not in values
        if self._allocations:
            nothing: list[Any] = [None] * (STREAM + 1)
            self._steps.append(_Step(self._allocations, _launch_nothing, nothing, [], [], [], None, [], []))
        self._results = type(result), values
        last_use: dict[int, _Step] = {}
        for step in self._steps:
            uses = (*step.pointers, *step.descriptors, *step.operands)
            last_use |= {value: step for _, value, *_ in uses}
        for value, step in last_use.items():
            if value >= self._num_arguments and value not in values:
                step.unused.append(value)
        self._memory, self._created, self._shapes = [], [], []

    def repeat(self, arguments: list[Tensor], addresses: list[int]) -> Any:
        """The call with other arguments of its kind, which are at these addresses."""
        device = arguments[0].device
        stream = current_stream(device.index) if device.index is not None else None
        new: list[Any] = [None] * (self._num_values - len(arguments))
        values, addresses = [*arguments, *new], [*addresses, *new]
        for allocations, run, known, pointers, descriptors, operands, result, given_back, unused in self._steps:
            for value, size, stride, dtype in allocations:
                values[value] = tensor = torch.empty_strided(size, stride, dtype=dtype, device=device)
                addresses[value] = tensor.data_ptr()
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
                values[result] = tensor = run(*given)
                addresses[result] = tensor.data_ptr()
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
    and Nones.
    """
    known: dict[tuple, Any] = {}
    """A kind's recording, `_SEEN` once before there is one, None if there can be none."""
    forget_when_configured(known.clear)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        arguments, addresses, bits = [], [], 0
        kind: list[Any] = [torch.get_float32_matmul_precision(), torch._C._is_any_autocast_enabled()]
        for arg in args:
            if arg.__class__ in _TENSORS:
                address = arg.data_ptr()
                arguments.append(arg)
                addresses.append(address)
                bits |= address
                kind.append((arg.shape, arg.stride(), arg.dtype))
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
