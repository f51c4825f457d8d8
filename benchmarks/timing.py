"""Wall times of contestants that take turns in one process, memory, launches, and what the machine can do at best."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Call = Callable[[], object]
Result = TypeVar("Result")
Name = TypeVar("Name")
MIB = 2.0**20
WARM_UP = 3
MAX_ITERATIONS = 2000


class CallFailed(Exception):
    """A call raised while it was timed; the cause is what it raised."""

    def __init__(self, name: object) -> None:
        super().__init__(f"{name} failed")
        self.name = name


@dataclass(frozen=True)
class WallTime:
    """Milliseconds a call."""

    median: float
    spread: float
    """Slowest loop less fastest."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _loop_seconds(call: Call, iterations: int, device: torch.device) -> float:
    """Wall time of a loop with one synchronisation at its end."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Effort:
    """How long timing takes: rounds, and the least that a loop lasts in each."""

    repeats: int = 7
    loop_seconds: float = 0.05


QUICK = Effort(repeats=3, loop_seconds=0.005)


def _loop_of(name: object, call: Call, iterations: int, device: torch.device) -> float:
    try:
        return _loop_seconds(call, iterations, device)
    except Exception as error:
        raise CallFailed(name) from error


def wall_times(calls: Mapping[Name, Call], device: torch.device, effort: Effort | None = None) -> dict[Name, WallTime]:
    """Time each call: in each of `effort.repeats` rounds every one runs its loop, in turn.

    All are warmed up (compiled, tuned) before the first round, and each is called once, untimed, before its loop. The
    L2 is neither flushed nor filled: a call finds what the one before it left, a step the last tensors of a backward
    pass, as in training. Raises CallFailed, naming the call, if one raises.
    """
    effort = effort or Effort()
    iterations: dict[Name, int] = {}
    for name, call in calls.items():
        _loop_of(name, call, WARM_UP, device)
        estimate = _loop_of(name, call, WARM_UP, device) / WARM_UP
        iterations[name] = min(MAX_ITERATIONS, max(1, math.ceil(effort.loop_seconds / estimate)))
    rounds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(effort.repeats):
        for name, call in calls.items():
            _loop_of(name, call, 1, device)
            rounds[name].append(_loop_of(name, call, iterations[name], device) / iterations[name] * 1e3)
    return {name: WallTime(statistics.median(ms), max(ms) - min(ms)) for name, ms in rounds.items()}


def captured(call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The call as a CUDA graph, warm, and what its replays fill."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@dataclass(frozen=True)
class Memory:
    """MiB of a training step."""

    saved: float
    """Distinct storages that autograd keeps for backward, parameters excepted; x counts if it is kept."""
    held: float | None
    """Device memory that the forward pass leaves allocated, whatever holds it: its output counts, x does not."""
    peak: float | None
    """Most device memory allocated in forward and backward beyond what was there, activations and gradients; the output
    is let go before backward, as a model does whose next operation is an addition."""


def memory(forward: Callable[[], Tensor], dout: Tensor, parameters: list[Tensor]) -> Memory:
    """Memory of one step, whose gradients must be None before; `held` and `peak` are None unless on CUDA."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    saved = sum(storages.values()) / MIB
    del out
    if not dout.is_cuda:
        return Memory(saved, None, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = forward()
    held = torch.cuda.memory_allocated() - before
    edge = torch.autograd.graph.get_gradient_edge(out)
    del out
    torch.autograd.backward((edge,), (dout,))
    return Memory(saved, held / MIB, (torch.cuda.max_memory_allocated() - before) / MIB)


@dataclass(frozen=True)
class Launches:
    """What the device executed for one call."""

    count: float
    """Kernels, copies and fills."""
    busy_ms: float
    """Sum of their durations."""


def launches(call: Call, calls: int = 5) -> Launches:
    """Profile a warm call on CUDA. The profiler may slow launches for the rest of the process: time before."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:  # without it it warns
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
    busy_us = sum(event.time_range.elapsed_us() for event in on_device)
    return Launches(len(on_device) / calls, busy_us / calls / 1e3)


def ceilings(device: torch.device) -> dict[str, float | None]:
    """What the machine does at best, as columns: cuBLAS on random bf16 matrices of 8192^2 (TFLOP/s), a device copy of
    2 GiB (TB/s, read plus written), and one eager addition of two small tensors (microseconds, host time)."""
    small = torch.ones(8, device=device)
    calls: dict[str, Call] = {"add": lambda: small + small}
    if device.type == "cuda":
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.randn(2**29, device=device)
        target = torch.empty_like(source)
        calls |= {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = {name: measured.median / 1e3 for name, measured in wall_times(calls, device).items()}
    return {
        "cublas_8192_tflops": 2 * 8192**3 / seconds["matmul"] / 1e12 if "matmul" in seconds else None,
        "copy_TBps": 2 * 4 * 2**29 / seconds["copy"] / 1e12 if "copy" in seconds else None,
        "torch_add_us": seconds["add"] * 1e6,
    }
