"""A few tokens through the experts, as in decoding, beside the time that reading the chosen experts' weights takes.

    python benchmarks/bench_decode.py

`graph_us` is a replay of a CUDA graph of `moe_mlp`, whose routing changes from one to the next, with the L2 cache
overwritten in between; the time of the replay alone, by events. `eager_us` is the host's: calls one after another.
`loop_us` is what one would write without a library: a loop over the chosen experts, a product a weight, the tokens
sorted by expert and the experts' ids read back once. `TBps` counts the chosen experts' weights, read once. A result
outside the error budget gets no time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cases import CASES, BenchCase, bench_case
from results import append, folder, provenance, text
from timing import QUICK, Call, captured, ceilings, wall_times
from torch import Tensor

from triton_moe import moe_mlp, reference
from triton_moe.activations import is_gated
from triton_moe.testing import assert_within_budget
from triton_moe.torch_backend import activate

CASE = bench_case("128x768_top8_h2048", 16, 2048, [(128, 768)], 8, "swiglu")
TOKENS = (1, 2, 4, 8, 16, 32, 64)
REPLAYS = 30
L2_BYTES = 256 * 2**20
"""Overwritten before each replay: several times the largest L2 cache."""
Weights = tuple[Tensor, Tensor, Tensor | None]


def random_ids(case: BenchCase, num_tokens: int, seed: int) -> Tensor:
    """`(T, K)`: K distinct experts for each token, all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, case.config.layout.num_experts, generator=generator)
    return scores.argsort(dim=1)[:, : case.config.num_active_experts].int()


def chosen_bytes(case: BenchCase, ids: Tensor, weights: Weights) -> int:
    """Of the weights of the experts that are chosen at all."""
    width = sum(case.config.layout.widths[e] for e in ids.unique().tolist())
    return sum(width * case.config.hidden_size * weight.element_size() for weight in weights if weight is not None)


def loop(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: Weights, case: BenchCase) -> Tensor:
    """Chosen experts one by one, on their slices of the tokens in experts' order and of the packed weights."""
    (T, K), (w1, w2, w3) = topk_ids.shape, weights
    experts, order = topk_ids.flatten().sort()
    rows = x[order // K]
    sorted_out, first = torch.empty_like(rows), 0
    for expert, count in Counter(experts.tolist()).items():
        columns, own = case.config.layout.columns(expert), slice(first, first + count)
        up = None if w3 is None else rows[own] @ w3[:, columns]
        a = activate(rows[own] @ w1[:, columns], up, case.config.activation)
        torch.matmul(a, w2[columns], out=sorted_out[own])
        first += count
    out = torch.empty_like(rows)
    out[order] = sorted_out
    return torch.bmm(topk_weights.to(x.dtype)[:, None], out.view(T, K, -1)).squeeze(1)


def graph_us(call: Call, ids: Tensor, routings: Sequence[Tensor]) -> tuple[float, float]:
    """Median and spread of a replay's microseconds, over replays of these routings in turn, the L2 cache cold."""
    graph, _ = captured(call)
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=ids.device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for i, (before, after) in enumerate(marks):
        ids.copy_(routings[i % len(routings)])
        flush.fill_(i % 100)
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    times = [1e3 * before.elapsed_time(after) for before, after in marks]
    return statistics.median(times), max(times) - min(times)


@torch.inference_mode()
def measure(
    case: BenchCase, tokens: Sequence[int], dtype: torch.dtype, device: torch.device, quick: bool
) -> list[dict]:
    config = case.config
    H, layout, K = config.hidden_size, config.layout, config.num_active_experts
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    w1, w2 = normal(H, layout.total_width) / H**0.5, normal(layout.total_width, H) / layout.max_width**0.5
    weights = w1, w2, normal(H, layout.total_width) / H**0.5 if is_gated(config.activation) else None
    rows = []
    for T in tokens:
        x, topk_weights = normal(T, H), torch.full((T, K), 1 / K, device=device)
        routings = [random_ids(case, T, seed).to(device) for seed in range(1 if quick else 5)]
        ids = routings[0].clone()
        options = {"layout": layout, "activation": config.activation}
        call = functools.partial(moe_mlp, x, topk_weights, ids, *weights, **options)
        plain = reference.moe_mlp(x, topk_weights, ids, *weights, **options)
        wide: Any = [None if w is None else w.double() for w in weights]
        truth = reference.moe_mlp(x.double(), topk_weights.double(), ids, *wide, **options)
        try:
            assert_within_budget(call(), truth, plain, eps_dtype=dtype, name=f"T={T}")
        except AssertionError as error:
            print(f"{case.name}: no time. {error}", flush=True)
            continue
        size = statistics.mean(chosen_bytes(case, routing, weights) for routing in routings)
        calls = {"eager": call, "loop": functools.partial(loop, x, topk_weights, ids, weights, case)}
        times = wall_times(calls, device, QUICK if quick else None)
        replay, spread = graph_us(call, ids, routings) if device.type == "cuda" else (None, None)
        rows.append(
            {
                "case": case.name, "T": T, "H": H,
                "sizes": "+".join(f"{count}x{width}" for count, width in config.expert_sizes), "K": K,
                "activation": config.activation, "dtype": str(dtype).removeprefix("torch."),
                "chosen_MB": size / 1e6, "graph_us": replay, "graph_spread_us": spread,
                "TBps": size / replay / 1e6 if replay else None,
                "eager_us": 1e3 * times["eager"].median, "loop_us": 1e3 * times["loop"].median,
            }
        )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the experts on a few tokens; rows go to bench_decode.csv.")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="numbers of tokens")
    parser.add_argument("--quick", action="store_true", help="a tiny case and short loops, for the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1:
        parser.error(f"tokens: expected 1 or more, got {min(args.tokens)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = folder(args.out, quick=args.quick, device=device) / "bench_decode.csv"
    case = CASES["quick_variable"] if args.quick else CASE
    machine = {**ceilings(device), **provenance(device)}
    rows = measure(case, args.tokens[:2] if args.quick else args.tokens, dtype, device, args.quick)
    for row in rows:
        copy = machine["copy_TBps"]
        row["of_copy"] = row["TBps"] / copy if copy and row["TBps"] else None
        append(path, [{**row, **machine}])
        print(", ".join(f"{name} {text(value)}" for name, value in row.items()))
    print(", ".join(f"{name} {text(value)}" for name, value in machine.items()) + f". Rows: {path}")
    return int(len(rows) == 0)


if __name__ == "__main__":
    sys.exit(main())
