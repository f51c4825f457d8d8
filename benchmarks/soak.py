"""A training loop of many minutes whose batches never have the same size, checked against the oracle all along.

    python benchmarks/soak.py --seconds 480 --backend hopper

A layer learns what another one does, from 1 to `--tokens` tokens a step; the routing moves as the router learns, and
now and then all tokens prefer the same experts. Every `--check-every` steps one batch is held to the error budget,
output and every gradient, on the weights of that moment. A step that hangs ends the process with a traceback. Exits
with 1 if a check fails, a loss is not finite, or the loss on a batch of its own does not fall.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from results import append, folder, provenance, text

from triton_moe import MoEConfig, MoEMLP
from triton_moe.functional import moe_mlp
from triton_moe.router import route_tokens
from triton_moe.testing import Inputs, check_against_oracle

SIZES = [(4, 256), (4, 128), (7, 64), (1, 0)]
HIDDEN_SIZE, TOP_K = 256, 2
SECONDS_OF_A_HANG = 120.0


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
    config = MoEConfig(SIZES, TOP_K, HIDDEN_SIZE, activation="swiglu", backend=args.backend)
    layer, teacher = (MoEMLP(config, device=device, dtype=dtype) for _ in range(2))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    held_out = torch.randn(256, HIDDEN_SIZE, device=device, dtype=dtype)
    losses: list[float] = []
    faults: list[str] = []
    steps = tokens = checks = 0
    start = time.time()
    while steps < max_steps and time.time() - start < seconds:
        x = torch.randn(rng.randint(1, max_tokens), HIDDEN_SIZE, device=device, dtype=dtype)
        if rng.random() < 0.05:
            x = x[:1].expand_as(x) + 0.01 * x  # all tokens alike: all go to the same experts
        with torch.no_grad():
            target = teacher(x)[0]
        out, aux, _ = layer(x)
        loss = (out - target).float().square().mean() + 0.01 * aux["load_balance_loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        tokens += x.shape[0]
        if steps % check_every == 1:
            faulthandler.dump_traceback_later(SECONDS_OF_A_HANG, exit=True)
            with torch.no_grad():
                losses.append((layer(held_out)[0] - teacher(held_out)[0]).float().square().mean().item())
            found = fault(layer, x[:512].contiguous())
            checks += 1
            if found or not math.isfinite(losses[-1]):
                faults.append(found or f"loss {losses[-1]}")
                print(f"step {steps}: {faults[-1]}", flush=True)
    faulthandler.cancel_dump_traceback_later()

    row = {
        "backend": args.backend, "seconds": time.time() - start, "steps": steps, "tokens": tokens, "checks": checks,
        "faults": len(faults), "first_loss": losses[0], "last_loss": losses[-1], **provenance(device),
    }  # fmt: skip
    append(path, [row])
    print(", ".join(f"{name} {text(value)}" for name, value in row.items()) + f". Row: {path}")
    failed = bool(faults) or not losses[-1] < losses[0]
    print("FAILED" if failed else "PASSED")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
