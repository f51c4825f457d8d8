"""Rows of times, memory and launches for the contestants that pass the gate, and of those that do not, why.

`forward` is the forward pass of training: the graph is recorded and tensors are saved. `step` is that and the backward
pass from a fixed gradient of the output, into gradients that were None. Both are wall times (see `timing.py`), and
`backward` is what the step takes longer; of a contestant captured as CUDA graphs they are those of its replays, and
what it keeps in memory is not taken.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import BenchCase
from contestants import CONTESTANTS, OURS
from gate import Gate, clear, initial_state, step, tokens
from layers import CannotRun, Layer, State
from results import text
from timing import QUICK, Call, CallFailed, captured, launches, memory, wall_times
from torch import Tensor

Row = dict[str, Any]
MEASURES = ("forward", "step", "memory", "launches")
COLUMNS = (
    *("forward_ms", "forward_spread_ms", "backward_ms", "step_ms", "step_spread_ms", "forward_tflops", "step_tflops"),
    *(MEMORY := ("saved_MiB", "held_MiB", "peak_MiB")),
    *(LAUNCHES := ("launches_forward", "launches_step", "busy_forward_ms", "busy_step_ms")),
)
"""Of a row, in their order, between its shape and the machine; those of what was not measured are left out."""


@dataclass(frozen=True)
class Refusal:
    """A contestant that got no time in a case."""

    case: str
    contestant: str
    kind: str
    """skipped: it cannot be imported, or is not made for such a case; crashed; wrong."""
    reason: str

    @property
    def is_failure(self) -> bool:
        return self.kind != "skipped"


def described(case: BenchCase, contestant: str, dtype: torch.dtype) -> Row:
    """The columns with which a row begins."""
    return {"case": case.name, "contestant": contestant, **case.columns(), "dtype": str(dtype).removeprefix("torch.")}


def _refused(case: BenchCase, contestant: str, kind: str, reason: str) -> Refusal:
    print(f"{case.name}: no time for {contestant}. {reason}", flush=True)
    return Refusal(case.name, contestant, kind, reason)


def crashed(case: BenchCase, contestant: str, error: BaseException | None) -> Refusal:
    """A peer's own fault, whatever it is, is a result."""
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return _refused(case, contestant, "crashed", reason)


def calls_of(layer: Layer, x: Tensor, dout: Tensor) -> dict[str, Call]:
    """forward and step, as they are timed."""
    calls: dict[str, Call] = {"forward": partial(layer.forward, x), "step": partial(step, layer, x, dout)}
    if not layer.replayed:
        return calls
    return {name: captured(call)[0].replay for name, call in calls.items()}


def _admit(case: BenchCase, name: str, gate: Gate, state: State) -> tuple[Layer, dict[str, Call]] | Refusal:
    try:
        layer = CONTESTANTS[name](case.config, state)
        fault = gate.fault(name, layer)
        return _refused(case, name, "wrong", fault) if fault else (layer, calls_of(layer, gate.all_x, gate.all_dout))
    except CannotRun as error:
        return _refused(case, name, "skipped", str(error))
    except Exception as error:
        return crashed(case, name, error)


def admitted(
    case: BenchCase, names: Sequence[str], state: State, x: Tensor, dout: Tensor
) -> tuple[dict[str, Layer], dict[str, dict[str, Call]], list[Refusal]]:
    """-> the contestants that pass the gate, their calls, and the others. Whoever raises anything is one of these."""
    gate = Gate(case, state, x, dout)
    found = {name: _admit(case, name, gate, state) for name in names}
    passed = {name: of for name, of in found.items() if not isinstance(of, Refusal)}
    layers, calls = ({name: of[part] for name, of in passed.items()} for part in range(2))
    return layers, calls, [of for of in found.values() if isinstance(of, Refusal)]  # type: ignore[return-value]


def measure(
    case: BenchCase,
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    what: Collection[str] = MEASURES,
    *,
    quick: bool = False,
) -> tuple[list[Row], list[Refusal]]:
    """A row for each contestant that passes; `what` is some of `MEASURES`. `profiled` has the columns of launches."""
    torch.compiler.reset()
    state = initial_state(case, dtype, device)
    x, dout = tokens(case, dtype, device)
    layers, calls, refusals = admitted(case, names, state, x, dout)
    columns: dict[str, Row] = {name: {} for name in layers}
    teraflop = case.forward_flops() / 1e12
    for kind, passes in (("forward", 1), ("step", 3)):
        while kind in what:
            try:
                times = wall_times({name: calls[name][kind] for name in layers}, device, QUICK if quick else None)
            except CallFailed as failed:
                refusals.append(crashed(case, str(failed.name), failed.__cause__))
                del layers[str(failed.name)]
                continue
            for name, layer in layers.items():
                milliseconds = times[name].median
                columns[name] |= {f"{kind}_ms": milliseconds, f"{kind}_spread_ms": times[name].spread}
                columns[name][f"{kind}_tflops"] = passes * teraflop / milliseconds * 1e3
                clear(layer, x)
            break
    for name, layer in list(layers.items()) if "memory" in what else ():
        try:
            used = None if layer.replayed else memory(partial(layer.forward, x), dout, layer.parameters)
        except Exception as error:
            refusals.append(crashed(case, name, error))
            del layers[name]
            continue
        values = (used.saved, used.held, used.peak) if used else (None,) * 3
        columns[name] |= zip(MEMORY, values, strict=True)
        clear(layer, x)
    rows: list[Row] = []
    for name, layer in layers.items():
        of = columns[name]
        if "forward_ms" in of and "step_ms" in of:
            of["backward_ms"] = of["step_ms"] - of["forward_ms"]
        measured = {column: of[column] for column in COLUMNS if column in of}
        rows.append(described(case, name, dtype) | {"library": layer.library} | measured)
    return rows, refusals


def profiled(case: BenchCase, contestant: str, dtype: torch.dtype, device: torch.device) -> Row:
    """The profiler's columns of a row: launches, and the time in which the device was busy with them; empty if the
    contestant raises."""
    if device.type != "cuda":
        return dict.fromkeys(LAUNCHES)
    torch.compiler.reset()
    x, dout = tokens(case, dtype, device)
    try:
        layer = CONTESTANTS[contestant](case.config, initial_state(case, dtype, device))
        step(layer, x, dout)
        forward, whole = (launches(call) for call in calls_of(layer, x, dout).values())
    except Exception as error:
        print(f"{case.name}: no profile of {contestant}. {type(error).__name__}: {error}", flush=True)
        return dict.fromkeys(LAUNCHES)
    return dict(zip(LAUNCHES, (forward.count, whole.count, forward.busy_ms, whole.busy_ms), strict=True))


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """These columns of the rows, aligned."""
    cells = [list(columns), *([text(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    return "\n".join("".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)


def exit_code(rows: Sequence[Row], refusals: Sequence[Refusal]) -> int:
    """1 if one of ours crashed or is wrong, or nothing was measured at all."""
    ours_failed = any(refusal.is_failure and refusal.contestant in OURS for refusal in refusals)
    if not rows:
        print("Nothing was measured.", file=sys.stderr)
    return int(ours_failed or not rows)
