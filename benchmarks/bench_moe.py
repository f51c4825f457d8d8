"""Time the layer against others, on the same weights, tokens and router, in one process.

    python benchmarks/bench_moe.py --cases seed training --contestants triton_moe grouped_mm

Before it is timed a contestant must be right: on a few hundred tokens its output and every gradient, the router's
included, are compared with the fp64 oracle. Ours are held to the error budget of the tests; the others may have four
times the rms error of plain PyTorch in the same dtype. Who is wrong, or cannot run a case, gets a sentence, not a time;
exits with 1 if that is one of ours.

`forward` is the forward pass of training: the graph is recorded and tensors are saved. `step` is that and the backward
pass from a fixed gradient of the output, into gradients that were None. Both are wall times (see `timing.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from cases import BenchCase, select
from contestants import CONTESTANTS, OURS
from layers import CannotRun, Layer, State, routed
from results import append, folder, provenance, text
from timing import ceilings, launches, memory, wall_times
from torch import Tensor

from triton_moe import MoEMLP, reference
from triton_moe.layout import ExpertLayout
from triton_moe.router import router_logits, router_scores
from triton_moe.testing import assert_within_budget

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_CONTESTANTS = ("triton_moe", "torch_loop", "grouped_mm", "scattermoe")
GATE_TOKENS = 512
GATE_FACTOR = 4.0


def initial_state(case: BenchCase, dtype: torch.dtype, device: torch.device) -> State:
    """The weights of a fresh layer, the same at every call."""
    torch.manual_seed(0)
    return MoEMLP(case.config, device=device, dtype=dtype).state_dict()


def tokens(case: BenchCase, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, which requires a gradient, and the output's gradient: `(T, H)` each, standard normal, always the same."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (case.num_tokens, case.config.hidden_size)
    x, dout = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return x.requires_grad_(), dout


def clear(layer: Layer, x: Tensor) -> None:
    for leaf in (x, *layer.parameters):
        leaf.grad = None


def step(layer: Layer, x: Tensor, dout: Tensor) -> None:
    clear(layer, x)
    layer.forward(x).backward(dout)


def outcome(layer: Layer, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of one step."""
    clear(layer, x)
    out = layer.forward(x)
    out.backward(dout)
    assert x.grad is not None
    found = {"out": out.detach(), "dx": x.grad, **layer.gradients()}
    clear(layer, x)
    return found


def oracle(case: BenchCase, state: State, x: Tensor, dout: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `outcome` should be, computed in `dtype`; the experts are those that x's own dtype chooses."""
    config = case.config
    names = [name for name in ("router.weight", "w1", "w2", "w3") if name in state]
    _, topk_ids = routed(x.detach(), state["router.weight"], config)
    leaves = {name: state[name].to(dtype, copy=True).requires_grad_() for name in names}
    x = x.detach().to(dtype, copy=True).requires_grad_()
    scores = router_scores(router_logits(x, leaves["router.weight"]), config.router).gather(1, topk_ids.long())
    topk_weights = (scores / (scores.sum(1, keepdim=True) + 1e-20)).to(dtype)
    out = reference.moe_mlp(
        x, topk_weights, topk_ids, leaves["w1"], leaves["w2"], leaves.get("w3"),
        layout=case.config.layout, activation=config.activation,
    )  # fmt: skip
    grads = torch.autograd.grad(out, (x, *leaves.values()), dout.to(dtype))
    return {"out": out.detach(), **dict(zip(("dx", *(f"d{name.split('.')[0]}" for name in names)), grads, strict=True))}


def parts(results: dict[str, Tensor], layout: ExpertLayout) -> dict[str, Tensor]:
    """The tensors to compare: the weights' gradients expert by expert, whose scales differ with their widths."""
    whole = {name: results[name] for name in ("out", "dx", "drouter")}
    for name in results.keys() - whole.keys():
        packed = results[name].t() if name == "dw2" else results[name]
        whole |= {f"{name} of expert {e}": packed[:, layout.columns(e)] for e in range(layout.num_experts)}
    return whole


class Gate:
    """The oracle's results for one case, and whether a contestant's agree with them."""

    def __init__(self, case: BenchCase, state: State, x: Tensor, dout: Tensor) -> None:
        self.layout = case.config.layout
        self.x, self.dout = x.detach()[:GATE_TOKENS].requires_grad_(), dout[:GATE_TOKENS]
        self.whole = oracle(case, state, self.x, self.dout, torch.float64)
        self.truth = parts(self.whole, self.layout)
        self.plain = parts(oracle(case, state, self.x, self.dout, x.dtype), self.layout)

    def fault(self, contestant: str, layer: Layer) -> str | None:
        """What is wrong with a contestant, None if nothing is."""
        actual = parts(outcome(layer, self.x, self.dout), self.layout)
        if contestant in OURS:
            try:
                assert_within_budget(actual, self.truth, self.plain, eps_dtype=self.x.dtype, name=contestant)
            except AssertionError as error:
                return str(error)
            return None
        if actual.keys() != self.truth.keys():
            return f"expected {len(self.truth)} results, got {len(actual)}"
        for name, truth in self.truth.items():
            error, plain = (float((result[name].double() - truth).norm()) for result in (actual, self.plain))
            if not error <= GATE_FACTOR * plain:
                return f"the error of {name} is {error:.3g}, and plain PyTorch's {plain:.3g} (norms)"
        return None


def build(case: BenchCase, names: Sequence[str], state: State, gate: Gate, x: Tensor, dout: Tensor) -> dict[str, Layer]:
    """The contestants that pass the gate and get through a step; for the others, why not is printed."""
    layers = {}
    for name in names:
        try:
            layer = CONTESTANTS[name](case.config, state)
            fault = gate.fault(name, layer)
            if not fault:
                outcome(layer, x, dout)
                layers[name] = layer
        except CannotRun as reason:
            fault = str(reason)
        except RuntimeError as error:
            fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if fault:
            print(f"{case.name}: no time for {name}. {fault}", flush=True)
    return layers


def measure(case: BenchCase, names: Sequence[str], dtype: torch.dtype, device: torch.device, quick: bool) -> list[dict]:
    """One row for each contestant, without the columns that come from the profiler and the machine."""
    torch.compiler.reset()
    config, state = case.config, initial_state(case, dtype, device)
    x, dout = tokens(case, dtype, device)
    layers = build(case, names, state, Gate(case, state, x, dout), x, dout)

    effort = {"repeats": 3, "loop_seconds": 0.005} if quick else {}
    forward = wall_times({name: partial(layer.forward, x) for name, layer in layers.items()}, device, **effort)
    for layer in layers.values():
        clear(layer, x)
    whole = wall_times({name: partial(step, layer, x, dout) for name, layer in layers.items()}, device, **effort)
    rows = []
    for name, layer in layers.items():
        clear(layer, x)
        used = memory(partial(layer.forward, x), dout, layer.parameters)
        clear(layer, x)
        forward_teraflop = case.forward_flops() / 1e12
        rows.append({
            "case": case.name,
            "contestant": name,
            "T": case.num_tokens,
            "H": config.hidden_size,
            "sizes": "+".join(f"{count}x{width}" for count, width in config.expert_sizes),
            "K": config.num_active_experts,
            "activation": config.activation,
            "dtype": str(dtype).removeprefix("torch."),
            "forward_ms": forward[name].median,
            "forward_spread_ms": forward[name].spread,
            "step_ms": whole[name].median,
            "step_spread_ms": whole[name].spread,
            "forward_tflops": forward_teraflop / forward[name].median * 1e3,
            "step_tflops": 3 * forward_teraflop / whole[name].median * 1e3,
            "saved_MiB": used.saved,
            "held_MiB": used.held,
            "peak_MiB": used.peak,
        })  # fmt: skip
    return rows


def profiled(row: dict, dtype: torch.dtype, device: torch.device) -> dict[str, float | None]:
    """The profiler's columns of a row: launches, and the time in which the device was busy with them."""
    columns = ("launches_forward", "launches_step", "busy_forward_ms", "busy_step_ms")
    if device.type != "cuda":
        return dict.fromkeys(columns)
    (case,) = select([row["case"]])
    torch.compiler.reset()
    layer = CONTESTANTS[row["contestant"]](case.config, initial_state(case, dtype, device))
    x, dout = tokens(case, dtype, device)
    step(layer, x, dout)
    forward, whole = launches(partial(layer.forward, x)), launches(partial(step, layer, x, dout))
    return dict(zip(columns, (forward.count, whole.count, forward.busy_ms, whole.busy_ms), strict=True))


def table(rows: Sequence[dict]) -> str:
    shown = {"case": 24, "contestant": 20, "forward_ms": 11, "step_ms": 11, "forward_tflops": 15, "step_tflops": 12,
             "saved_MiB": 10, "peak_MiB": 10, "launches_step": 14, "busy_step_ms": 13}  # fmt: skip
    lines = ["".join(f"{column:<{width}}" for column, width in shown.items())]
    lines += ["".join(f"{text(row[column]):<{width}}" for column, width in shown.items()) for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the layer against others; rows go to bench_moe.csv.")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases or groups: seed, training, quick, all")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(DEFAULT_CONTESTANTS))
    parser.add_argument("--dtype", choices=list(DTYPES), help="bf16, and fp32 on the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny cases and short loops, for the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    path = folder(args.out, quick=args.quick, device=device) / "bench_moe.csv"
    try:
        cases = select(args.cases or ["quick" if args.quick else "all"])
    except ValueError as error:
        parser.error(str(error))

    machine = {**ceilings(device), **provenance(device)}
    print(", ".join(f"{name} {text(value)}" for name, value in machine.items()), flush=True)
    rows = []
    for case in cases:
        rows += measure(case, args.contestants, dtype, device, args.quick)
        print(f"{case.name}: timed", flush=True)
    for row in rows:
        row |= {**profiled(row, dtype, device), **machine}
        append(path, [row])
    print(f"{table(rows)}\nRows went to {path}.")
    timed = {(row["case"], row["contestant"]) for row in rows}
    return int(any((case.name, name) not in timed for case in cases for name in args.contestants if name in OURS))


if __name__ == "__main__":
    sys.exit(main())
