"""A training loop of many minutes whose batches never have the same size, checked against the oracle all along.

    python benchmarks/soak.py --seconds 480 --backend hopper

Two layers, one with widths in multiples of 64 and one with any, take turns; each learns what another one does, from 1
to `--tokens` tokens a step; the routing moves as the router learns, and now and then all tokens prefer the same
experts. Every `--check-every` steps a batch of each is held to the error budget, output and every gradient, on the
weights of that moment. A step that hangs ends the process with a traceback. Exits with 1 if a check fails, a loss is
not finite, or the loss on a batch of its own does not fall.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from results import append, folder, provenance, text

from triton_moe import MoEConfig, MoEMLP
from triton_moe.functional import moe_mlp
from triton_moe.router import route_tokens
from triton_moe.testing import Inputs, check_against_oracle

LAYOUTS = ([(4, 256), (4, 128), (7, 64), (1, 0)], [(3, 256), (4, 100), (4, 72), (4, 33), (1, 0)])
HIDDEN_SIZE, TOP_K = 256, 2
SECONDS_OF_A_HANG = 120.0


@dataclass
class Pupil:
    """A layer that learns what its teacher does."""

    layer: MoEMLP
    teacher: MoEMLP
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    """On held-out tokens, at each check."""

    def learn(self, x: torch.Tensor) -> None:
        with torch.no_grad():
            target = self.teacher(x)[0]
        out, aux, _ = self.layer(x)
        loss = (out - target).float().square().mean() + 0.01 * aux["load_balance_loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def examine(self, held_out: torch.Tensor, x: torch.Tensor) -> str:
        """-> what is wrong; empty if nothing is."""
        with torch.no_grad():
            difference = self.layer(held_out)[0] - self.teacher(held_out)[0]
        self.losses.append(difference.float().square().mean().item())
        return fault(self.layer, x) or ("" if math.isfinite(self.losses[-1]) else f"loss {self.losses[-1]}")


def pupil_of(sizes: list[tuple[int, int]], backend: str, device: torch.device, dtype: torch.dtype) -> Pupil:
    config = MoEConfig(sizes, TOP_K, HIDDEN_SIZE, activation="swiglu", backend=backend)
    layer, teacher = (MoEMLP(config, device=device, dtype=dtype) for _ in range(2))
    return Pupil(layer, teacher, torch.optim.AdamW(layer.parameters(), lr=1e-3))


def fault(layer: MoEMLP, x: torch.Tensor) -> str:
    """Why the layer's experts, as they are now, are outside the error budget on these tokens; empty if they are not."""
    config = layer.config
    weights, ids, *_ = route_tokens(
        x, layer.router.weight.detach(), layout=config.layout, num_active_experts=TOP_K, router=config.router
    )
    given = Inputs(
        x=x, topk_weights=weights.detach(), topk_ids=ids, w1=layer.w1.detach(), w2=layer.w2.detach(),
        w3=None if layer.w3 is None else layer.w3.detach(), dout=torch.randn_like(x), layout=config.layout,
        activation=config.activation,
    )  # fmt: skip
    try:
        check_against_oracle(moe_mlp, given, backend=config.backend)
    except AssertionError as error:
        return str(error)
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train for minutes under the oracle's eyes; a row goes to soak.csv.")
    parser.add_argument("--seconds", type=float, help="how long at most (480; quick: 100)")
    parser.add_argument("--steps", type=int, help="how many steps at most (no end; quick: 41)")
    parser.add_argument("--tokens", type=int, help="largest batch (8192; quick: 64)")
    parser.add_argument("--check-every", type=int, help="steps between two checks (500; quick: 5)")
    parser.add_argument("--backend", default="auto", help="as in moe_mlp")
    parser.add_argument("--quick", action="store_true", help="a few steps, on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.quick else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seconds = args.seconds or (100 if args.quick else 480)
    max_steps = args.steps or (41 if args.quick else sys.maxsize)
    max_tokens = args.tokens or (64 if args.quick else 8192)
    check_every = args.check_every or (5 if args.quick else 500)
    path = folder(args.out, quick=args.quick, device=device) / "soak.csv"

    torch.manual_seed(0)
    rng = random.Random(0)
    pupils = [pupil_of(sizes, args.backend, device, dtype) for sizes in LAYOUTS]
    held_out = torch.randn(256, HIDDEN_SIZE, device=device, dtype=dtype)
    faults: list[str] = []
    steps = tokens = checks = 0
    start = time.time()
    while steps < max_steps and time.time() - start < seconds:
        x = torch.randn(rng.randint(1, max_tokens), HIDDEN_SIZE, device=device, dtype=dtype)
        if rng.random() < 0.05:
            x = x[:1].expand_as(x) + 0.01 * x  # all tokens alike: all go to the same experts
        pupils[steps % len(pupils)].learn(x)
        steps += 1
        tokens += x.shape[0]
        if steps % check_every == 1:
            faulthandler.dump_traceback_later(SECONDS_OF_A_HANG, exit=True)
            found = [pupil.examine(held_out, x[:512].contiguous()) for pupil in pupils]
            checks += len(pupils)
            for wrong in filter(None, found):
                faults.append(wrong)
                print(f"step {steps}: {wrong}", flush=True)
    faulthandler.cancel_dump_traceback_later()

    losses = {
        f"{which}_loss": statistics.fmean(pupil.losses[place] for pupil in pupils)
        for which, place in (("first", 0), ("last", -1))
    }
    row = {
        "backend": args.backend, "seconds": time.time() - start, "steps": steps, "tokens": tokens, "checks": checks,
        "faults": len(faults), **losses, **provenance(device),
    }  # fmt: skip
    append(path, [row])
    print(", ".join(f"{name} {text(value)}" for name, value in row.items()) + f". Row: {path}")
    failed = bool(faults) or not all(pupil.losses[-1] < pupil.losses[0] for pupil in pupils)
    print("FAILED" if failed else "PASSED")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
