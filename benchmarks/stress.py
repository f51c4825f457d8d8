"""Random layers and random routings, forward and backward, against the fp64 oracle, and twice for the same bits.

    python benchmarks/stress.py --count 10000

The seed of a draw says everything about it: `--seed S --count 1` repeats draw S (with `--quick`, that of a quick run).
The kernels run on the device, with poisoned memory and without; the oracle runs on the CPU beside them. What makes
kernels compile (dtype, activation, K, kinds of sizes) has one of 60 values, `seed % 60`, and each worker process keeps
to its own of them, so that compiling takes no longer than the draws. Exits with 1 if a draw fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from results import append, folder, provenance, text
from torch import Tensor

from triton_moe import moe_mlp
from triton_moe.activations import ACTIVATIONS
from triton_moe.kernels.hopper import launch as hopper
from triton_moe.kernels.tuning import forget
from triton_moe.testing import BIASES, Case, check_against_oracle, make_inputs, poison_empty, run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_PROFILES = 2 * len(DTYPES) * len(ACTIVATIONS)
HIDDEN_SIZES = ((16, 48, 80, 112), tuple(range(1, 128, 2)), (64,), (8, 24, 40, 72, 104), (128,), (1, 2, 3, 4))
WIDE_STEP, WIDE_HIDDEN_SIZES = 128, (72, 128, 256)
"""A step that is also doubled, and the H that go with it: they take a kernel's widest tiles, and the next ones."""
WIDTH_STEPS = (1, 16, 8, 1, WIDE_STEP)
NUM_EXPERTS = (1, 2, 3, 4, 6, 9, 16, 24)
MAX_WIDTH = 160
ROUTINGS = (*("random",) * 5, *("dropped",) * 2, "repeated", "one expert", "idle expert", "all dropped")
X_STRIDES = ("contiguous", "wide rows", "columns")
NUM_PROGRAMS = (None, 1, 3, 10)


@dataclass(frozen=True)
class Draw:
    """One layer, one batch."""

    seed: int
    case: Case
    dtype: torch.dtype
    weights_dtype: torch.dtype
    ids_dtype: torch.dtype
    transposed: tuple[bool, bool]
    """Whether w1 (and w3), and w2, lie transposed in memory."""
    x_strides: str
    num_programs: int | None = None
    """That share the tiles of a Hopper kernel: so few that each has many. None: one a multiprocessor."""


def draw(seed: int, max_tokens: int = 300) -> Draw:
    profile = seed % NUM_PROFILES
    of_profile, rng = random.Random(profile), random.Random(seed)
    dtype, activation = DTYPES[profile % len(DTYPES)], ACTIVATIONS[profile // len(DTYPES) % len(ACTIVATIONS)]
    hidden_sizes, step = of_profile.choice(HIDDEN_SIZES), of_profile.choice(WIDTH_STEPS)
    top_k = of_profile.choice((1, 2, 2, 3, 4, 8))
    transposed = (of_profile.random() < 0.5, of_profile.random() < 0.5)
    weights_dtype = of_profile.choice((torch.float32, dtype))
    num_experts = rng.choice([count for count in NUM_EXPERTS if count >= top_k])
    if step == WIDE_STEP:
        hidden_sizes, step = WIDE_HIDDEN_SIZES, step * rng.choice((1, 2))
    widths = [step * rng.randint(0, max(1, MAX_WIDTH // step)) for _ in range(num_experts)]
    widths[rng.randrange(num_experts)] = step
    # One pre-activation in ten million changes its sign between two orders of summation, and relu's gradient jumps.
    tokens = min(16, max_tokens) if activation in ("relu", "reglu") else max_tokens
    routing = rng.choice(ROUTINGS)
    case = Case(
        bias=profile % 4 == 1,  # every dtype, every activation, and no draw differs in anything else
        num_tokens=rng.randint(0, tokens) if rng.random() < 0.9 else rng.randint(0, 2),
        hidden_size=rng.choice(hidden_sizes),
        widths=tuple(widths),
        top_k=top_k,
        activation=activation,
        routing="random" if routing == "idle expert" and top_k == num_experts else routing,
        reason=f"draw {seed}",
    )
    ids_dtype = torch.int64 if num_experts % 2 else torch.int32
    return Draw(seed, case, dtype, weights_dtype, ids_dtype, transposed, rng.choice(X_STRIDES))


def fitted(given: Draw) -> Draw:
    """The draw with sizes and a dtype that the Hopper kernels take, and rows for more than one block."""
    case = given.case
    dtype = torch.bfloat16 if given.dtype == torch.float32 else given.dtype
    weights_dtype = torch.float32 if given.weights_dtype == torch.float32 else dtype
    step, most = ((64, 7), (8, 49), (1, 385))[given.seed // NUM_PROFILES % 3]
    widths = tuple(step * (width % most) for width in case.widths)
    sizes = {"hidden_size": 64 * (1 + case.hidden_size % 6), "widths": widths if any(widths) else (step, *widths[1:])}
    tokens = case.num_tokens if case.activation in ("relu", "reglu") else 3 * case.num_tokens
    case = dataclasses.replace(case, **sizes, num_tokens=tokens, bias=False)
    num_programs = NUM_PROGRAMS[given.seed // NUM_PROFILES // 3 % len(NUM_PROGRAMS)]
    return dataclasses.replace(given, case=case, dtype=dtype, weights_dtype=weights_dtype, num_programs=num_programs)


@contextmanager
def programs(count: int | None) -> Iterator[None]:
    """Launch the Hopper kernels with so many."""
    if count is None:
        yield
        return
    with mock.patch.object(hopper, "_num_programs", return_value=count):
        forget()
        yield
    forget()


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def _on_device(given: Draw, device: torch.device, backend: str) -> Callable[..., Tensor]:
    """`moe_mlp` on the device for arguments on the CPU, laid out in memory as drawn; gradients come back to the CPU."""

    def moved(x, topk_weights, topk_ids, w1, w2, w3, **options) -> Tensor:
        options |= {name: options[name].to(device) for name in BIASES if name in options}
        x, topk_weights, topk_ids, w1, w2 = (tensor.to(device) for tensor in (x, topk_weights, topk_ids, w1, w2))
        w3 = None if w3 is None else w3.to(device)
        if given.x_strides == "wide rows":
            x = torch.cat([x, x.new_zeros(x.shape[0], 16)], dim=1)[:, : x.shape[1]]
        elif given.x_strides == "columns":
            x = _transposed(x)
        if given.transposed[0]:
            w1, w3 = _transposed(w1), None if w3 is None else _transposed(w3)
        if given.transposed[1]:
            w2 = _transposed(w2)
        return moe_mlp(x, topk_weights, topk_ids, w1, w2, w3, backend=backend, **options).cpu()

    return moved


def faults(given: Draw, device: torch.device, backend: str) -> tuple[str, str]:
    """Why the draw is outside the error budget, and in what two runs of it differ; both empty if all is well."""
    inputs = make_inputs(
        given.case, given.dtype, "cpu", given.seed, weights_dtype=given.weights_dtype, ids_dtype=given.ids_dtype
    )
    moved = _on_device(given, device, backend)
    budget = ""
    with programs(given.num_programs):
        try:
            check_against_oracle(moved, inputs)
        except AssertionError as error:
            budget = str(error)
        first = run(moved, inputs)
        with poison_empty():
            second = run(moved, inputs)
    return budget, ", ".join(name for name in first if not torch.equal(first[name], second[name]))


@dataclass(frozen=True)
class Share:
    """What one worker did."""

    draws: int
    mismatches: int
    bitwise_differences: int
    crashed: bool


def work(seeds: Sequence[int], device: torch.device, backend: str, max_tokens: int, deadline: float) -> Share:
    """Run draws until there are none left, the deadline (`time.time()`) is past, or the device no longer answers."""
    interpreted = device.type == "cpu" and backend == "triton"
    done = mismatches = differences = 0
    for seed in seeds:
        if time.time() > deadline:
            break
        given = draw(seed, max_tokens)
        if backend == "hopper":
            given = fitted(given)
        if interpreted and given.dtype == torch.bfloat16:  # its bfloat16 dot is wrong
            given = dataclasses.replace(given, dtype=torch.float32, weights_dtype=torch.float32)
        try:
            budget, differing = faults(given, device, backend)
        except Exception as error:
            print(f"--seed {seed} --count 1: CRASH {error!r} in {given}", flush=True)
            return Share(done, mismatches, differences, crashed=True)
        done += 1
        mismatches += bool(budget)
        differences += bool(differing)
        if budget:
            print(f"--seed {seed} --count 1: MISMATCH {given}\n{budget}", flush=True)
        if differing:
            print(f"--seed {seed} --count 1: two runs DIFFER in {differing}: {given}", flush=True)
    return Share(done, mismatches, differences, crashed=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random draws against the oracle; a row goes to stress.csv.")
    parser.add_argument("--count", type=int, help="number of draws (10000; quick: 20)")
    parser.add_argument("--seed", type=int, default=0, help="that of the first draw; the next ones count up")
    parser.add_argument(
        "--workers", type=int, default=15, help="processes, of one CPU core each, that share the device"
    )
    parser.add_argument("--backend", choices=("triton", "hopper", "torch"), help="default: triton where it runs")
    parser.add_argument("--seconds", type=float, default=540, help="start no draw after this time")
    parser.add_argument("--quick", action="store_true", help="few tokens, one process, on the CPU in plain PyTorch")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_kernels = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    backend = args.backend or ("triton" if on_kernels else "torch")
    path = folder(args.out, quick=args.quick, device=device) / "stress.csv"
    count = args.count or (20 if args.quick else 10_000)
    workers = 1 if args.quick else max(1, min(args.workers, count, NUM_PROFILES))
    start = time.time()
    seeds = range(args.seed, args.seed + count)
    shares = [[seed for seed in seeds if seed % NUM_PROFILES % workers == worker] for worker in range(workers)]
    common = (device, backend, 24 if args.quick else 300, start + args.seconds)
    if workers == 1:
        results = [work(shares[0], *common)]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
            results = [running.result() for running in [pool.submit(work, share, *common) for share in shares]]

    row = {
        "backend": backend,
        "first_seed": args.seed,
        "asked": count,
        "draws": sum(share.draws for share in results),
        "mismatches": sum(share.mismatches for share in results),
        "bitwise_differences": sum(share.bitwise_differences for share in results),
        "crashes": sum(share.crashed for share in results),
        "workers": workers,
        "seconds": time.time() - start,
        **provenance(device),
    }
    append(path, [row])
    print(", ".join(f"{name} {text(value)}" for name, value in row.items()) + f". Row: {path}")
    failed = bool(row["mismatches"] or row["bitwise_differences"] or row["crashes"] or row["draws"] < count)
    print("FAILED" if failed else f"PASSED: all of {row['draws']} draws")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
