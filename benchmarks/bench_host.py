"""Host time of the layer with its three losses: kernel launches and wall time of a call, eager and as a CUDA graph.

    python benchmarks/bench_host.py

On small shapes the device works for a tenth of a millisecond, and the rest is launching. `forward` records a graph for
backward; `step` is that and the backward pass, from gradients of the output and the losses, into gradients that were
None. The graphs are captured once and replayed. `step_one_thread` is a step whose backward pass runs in the thread that
asks for it (`torch.autograd.set_multithreading_enabled(False)`). `identity_step` and `node_step` are what PyTorch takes
for functions written in Python, as the layer's is, that compute nothing: of one tensor, and of as many as the layer's
takes, returns and saves. `add_us` is an eager addition of two small tensors, in turns with the others, for the host is
not equally fast all the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cases import CASES, BenchCase
from results import append, folder, provenance, text
from timing import QUICK, Call, captured, ceilings, launches, wall_times
from torch import Tensor

from triton_moe import MoEMLP

LOSSES = ("router_z_loss", "load_balance_loss", "compute_loss")
_TIMED = ("forward", "step", "step_one_thread", "identity_step", "node_step", "graph_forward", "graph_step")
DEFAULT_CASES = ("8exp_uniform", "8exp_variable", "16exp_uniform", "16exp_variable", "128exp_variable")


def calls_of(case: BenchCase, dtype: torch.dtype, device: torch.device) -> tuple[Call, Call]:
    """-> forward, step."""
    torch.manual_seed(0)
    layer = MoEMLP(dataclasses.replace(case.config, aux_losses=True), device=device, dtype=dtype)
    shape = (case.num_tokens, case.config.hidden_size)
    x, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    one = torch.ones((), device=device)
    leaves = (x, *layer.parameters())

    def forward() -> object:
        return layer(x)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        out, aux, _ = layer(x)
        torch.autograd.backward((out, *(aux[name] for name in LOSSES)), (dout, one, one, one))

    return forward, step


class Identity(torch.autograd.Function):
    """Nothing, forward and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:  # type: ignore[override]
        return dout


class Node(torch.autograd.Function):
    """Allocates what the layer returns, keeps what it keeps, and computes nothing: for x and three weights 12 results,
    four of them differentiable, five of them kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = tuple(torch.empty_like(inputs[0]) for _ in range(12))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[4:])
        ctx.save_for_backward(*inputs, *results[-5:])
        return results

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:4])


def step_of_nothing(function: type[torch.autograd.Function], num_inputs: int, device: torch.device) -> Call:
    """A step of a function of `num_inputs` tensors, and gradients of as many of its results."""
    leaves = [torch.randn(8, device=device, requires_grad=True) for _ in range(num_inputs)]
    douts = [torch.randn(8, device=device) for _ in leaves]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        results: Any = function.apply(*leaves)
        torch.autograd.backward([results] if isinstance(results, Tensor) else results[:num_inputs], douts)

    return step


def in_one_thread(call: Call) -> Call:
    def run() -> None:
        with torch.autograd.set_multithreading_enabled(False):
            call()

    return run


def measure(case: BenchCase, dtype: torch.dtype, device: torch.device, quick: bool) -> dict:
    forward, step = calls_of(case, dtype, device)
    small = torch.ones(8, device=device)
    calls: dict[str, Call] = {
        "forward": forward,
        "step": step,
        "step_one_thread": in_one_thread(step),
        "identity_step": step_of_nothing(Identity, 1, device),
        "node_step": step_of_nothing(Node, 4, device),
        "add": lambda: small + small,
    }
    if device.type == "cuda":
        forward()
        step()
        calls |= {"graph_forward": captured(forward)[0].replay, "graph_step": captured(step)[0].replay}
    ms = {name: time.median for name, time in wall_times(calls, device, QUICK if quick else None).items()}
    config = case.config
    return {
        "case": case.name,
        "T": case.num_tokens,
        "H": config.hidden_size,
        "sizes": "+".join(f"{count}x{width}" for count, width in config.expert_sizes),
        "K": config.num_active_experts,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_ms": ms.get(name) for name in _TIMED},
        "add_us": ms["add"] * 1e3,
    }


def counted(case: BenchCase, dtype: torch.dtype, device: torch.device) -> dict[str, float | None]:
    """The profiler's columns of a row."""
    columns = ("launches_forward", "launches_step", "busy_forward_ms", "busy_step_ms")
    if device.type != "cuda":
        return dict.fromkeys(columns)
    forward, step = map(launches, calls_of(case, dtype, device))
    return dict(zip(columns, (forward.count, step.count, forward.busy_ms, step.busy_ms), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Host time of the layer; rows go to bench_host.csv.")
    parser.add_argument("--cases", nargs="+", metavar="NAME", choices=list(CASES))
    parser.add_argument("--quick", action="store_true", help="a tiny case and short loops, for the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = folder(args.out, quick=args.quick, device=device) / "bench_host.csv"
    names = args.cases or (["quick_variable"] if args.quick else DEFAULT_CASES)
    machine = {**ceilings(device), **provenance(device)}
    rows = [measure(CASES[name], dtype, device, args.quick) for name in names]
    for row in rows:
        row |= {**counted(CASES[row["case"]], dtype, device), **machine}
        append(path, [row])
        print(", ".join(f"{name} {text(value)}" for name, value in row.items()))
    print(f"Rows went to {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
