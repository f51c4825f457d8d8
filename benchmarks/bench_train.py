"""Time the training steps of examples/train_gpt.py with our experts and with PyTorch's grouped GEMM, in one process.

    python benchmarks/bench_train.py

Three models take turns, each compiled: with our experts, with PyTorch's, padded to the widest, behind the same router,
and without MoE MLPs. What their steps take less than the first two's is the time of MoE MLPs, their optimizer's work
included: that over the step is `moe_share`, by the wall, and `busy_moe_share`, by what the device executed (a profile).
A step is batch, forward, backward, clipping and AdamW.

Before they are timed, output and gradients of the first MoE layer with our experts must agree with those of PyTorch's,
from the same weights on the same tokens, within `GATE`; exits with 1, and writes no row, if not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from results import ROOT, append, folder, provenance, text
from timing import MIB, Effort, ceilings, launches, wall_times
from torch import Tensor, nn

sys.path.append(str(ROOT / "examples"))
from bpe import Tokens
from gpt import AUXILIARY, flops_per_token
from padded_experts import PaddedExperts
from settings import Config
from train_gpt import Training
from utilization import mfu, peak_flops

from triton_moe import MoEConfig, MoEMLP
from triton_moe.experts import Experts

OURS, RIVAL, WITHOUT = "triton", "grouped_mm", "none"
CONFIG = Config(expert_sizes=((64, 256),), num_active_experts=8, batch_size=32, context=1024, compile="graph")
"""Of 12 layers, hidden size 768, relu squared: the defaults; captured, since the host would be the slower one."""
QUICK_CONFIG = Config(
    expert_sizes=((2, 16), (2, 8)), num_active_experts=2, hidden_size=16, num_layers=2, num_heads=2, vocabulary=300,
    context=16, batch_size=2, precision="fp32", compile="off",
)  # fmt: skip
DESCRIBED = (
    "hidden_size", "num_layers", "num_active_experts", "activation", "context", "batch_size", "accumulation",
    "vocabulary", "optimizer", "precision", "compile",
)  # fmt: skip
GATE_TOKENS = 512
GATE = {"bf16": 0.02, "fp32": 1e-4}
"""Largest norm of a difference over the norm, by precision: they are two computations of one function."""


class NoMoE(nn.Module):
    """Adds nothing."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_experts = config.layout.num_experts

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        nothing = x.new_zeros(())
        return torch.zeros_like(x), dict.fromkeys(AUXILIARY, nothing), x.new_zeros(self.num_experts)


def contestants(config: Config, tokens: Tokens, device: torch.device) -> dict[str, Training]:
    """By name, the first two from the same weights."""
    ours, rival = (Training(dataclasses.replace(config, experts=name), tokens, device) for name in (OURS, RIVAL))
    state = {name: w for name, w in ours.model.state_dict().items() if not name.endswith((".w1", ".w2", ".w3"))}
    rival.model.load_state_dict(state, strict=False)
    for mine, other in zip(ours.model.modules(), rival.model.modules(), strict=True):
        if isinstance(mine, Experts) and isinstance(other, PaddedExperts):
            other.load_packed(mine)
    return {OURS: ours, RIVAL: rival, WITHOUT: Training(config, tokens, device, moe=NoMoE)}


def outcome(training: Training) -> dict[str, Tensor]:
    """Output of the first MoE layer on random tokens, and gradients of what both kinds of experts have."""
    config, device = training.config, training.device
    layer = next(module for module in training.model.modules() if isinstance(module, MoEMLP))
    generator = torch.Generator(device).manual_seed(0)
    x, dout = torch.randn(2, GATE_TOKENS, config.hidden_size, generator=generator, device=device)
    x.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        out = layer(x)[0]
    dx, drouter = torch.autograd.grad(out, (x, layer.router.weight), dout.to(out.dtype))
    return {"out": out.detach().float(), "dx": dx, "drouter": drouter}


def agree(trainings: dict[str, Training]) -> bool:
    """Whether the first two compute the same. How far they are apart is printed."""
    ours, rival = (outcome(trainings[name]) for name in (OURS, RIVAL))
    apart = {name: float((ours[name] - value).norm() / value.norm()) for name, value in rival.items()}
    print(", ".join(f"{name} {text(distance)} apart" for name, distance in apart.items()), flush=True)
    return max(apart.values()) <= GATE[trainings[OURS].config.precision]


def step_memory(training: Training) -> float | None:
    """Most MiB that a step allocates beyond what is there before; None unless on CUDA, and where a graph has it."""
    if training.device.type != "cuda" or training.config.compile == "graph":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training.step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measured(trainings: dict[str, Training], effort: Effort) -> list[dict[str, object]]:
    """A row a contestant, without provenance."""
    config, device = trainings[OURS].config, trainings[OURS].device
    calls = {name: training.step for name, training in trainings.items()}
    times = wall_times(calls, device, effort)
    memory = {name: step_memory(training) for name, training in trainings.items()}
    profiles = {name: launches(call) for name, call in calls.items()} if device.type == "cuda" else {}
    peak, machine = peak_flops(device), ceilings(device)
    rows: list[dict[str, object]] = []
    for name in trainings:
        ms, profile = times[name].median, profiles.get(name)
        rate = config.tokens_per_step / ms * 1e3
        moe = name != WITHOUT
        rows.append(
            {
                "experts": name,
                "sizes": "+".join(f"{count}x{width}" for count, width in config.expert_sizes),
                **{field: getattr(config, field) for field in DESCRIBED},
                "step_ms": ms,
                "step_spread_ms": times[name].spread,
                "tokens_per_second": rate,
                "mfu": mfu(rate, flops_per_token(config.gpt), peak) if moe else None,
                "moe_share": 1 - times[WITHOUT].median / ms if moe else None,
                "busy_ms": profile.busy_ms if profile else None,
                "busy_moe_share": 1 - profiles[WITHOUT].busy_ms / profile.busy_ms if profile and moe else None,
                "launches": profile.count if profile else None,
                "step_MiB": memory[name],
                **machine,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Training steps with our experts and PyTorch's; to bench_train.csv.")
    parser.add_argument("--config", type=Path, help="JSON file of options of examples/train_gpt.py")
    parser.add_argument("--compile", choices=("blocks", "model", "graph"), help="as of examples/train_gpt.py")
    parser.add_argument("--data", type=Path, help="text, as of examples/train_gpt.py")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which the contestants take turns")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    if args.quick and args.config is not None:
        parser.error("argument --config: expected none with --quick, which has a model of its own")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = QUICK_CONFIG if args.quick else CONFIG if args.config is None else Config.read(args.config)
    if args.compile:
        config = dataclasses.replace(config, compile=args.compile)
    tokens = Tokens.load(args.data, config.vocabulary)
    trainings = contestants(config, tokens, device)
    if not agree(trainings):
        print("the layers differ: nothing is timed", file=sys.stderr)
        return 1
    effort = Effort(args.repeats, loop_seconds=0.001 if args.quick else 1.0)
    rows = [row | provenance(device) for row in measured(trainings, effort)]
    append(folder(args.out, quick=args.quick, device=device) / "bench_train.csv", rows)
    for row in rows:
        print(", ".join(f"{key} {text(value)}" for key, value in row.items()), flush=True)
    ours, rival = (float(str(row["tokens_per_second"])) for row in rows[:2])
    print(f"tokens/s over those with PyTorch's grouped GEMM: {ours / rival:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
