"""How long a user waits for the first training step of a shape: kernels compiled anew, and taken from Triton's cache.

    python benchmarks/cold_start.py --cases 128x256_top8

Each time in a process of its own, from before `import triton_moe` to the end of the step; `import torch` and the
device's context come before. With a warm cache the row has the parts too: the import, the layer and its input, the
forward and the backward pass of the first step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import CASES
from results import ROOT, append, folder, provenance, text

FIRST_STEP = """
import sys, time
import torch
device = torch.device(sys.argv[2])
torch.zeros(1, device=device)
begun = time.perf_counter()
from cases import CASES
from triton_moe import MoEMLP
case, dtype = CASES[sys.argv[1]], torch.bfloat16 if device.type == "cuda" else torch.float32
times = [time.perf_counter()]

def done():
    if device.type == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter())

layer = MoEMLP(case.config, device=device, dtype=dtype)
x = torch.randn(case.num_tokens, case.config.hidden_size, device=device, dtype=dtype, requires_grad=True)
done()
loss = layer(x)[0].sum()
done()
loss.backward()
assert x.grad.isfinite().all()
done()
print(*(end - start for start, end in zip([begun, *times], times)))
"""


PARTS = ("import", "layer", "forward", "backward")


def first_step_seconds(case: str, device: torch.device, cache: str) -> dict[str, float]:
    """Of each of `PARTS`."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": path}
    command = [sys.executable, "-c", FIRST_STEP, case, str(device)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parent, timeout=600
    )
    if done.returncode != 0:
        raise RuntimeError(f"the first step of {case} failed: {done.stderr[-500:]}")
    return dict(zip(PARTS, map(float, done.stdout.split()), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time to the first step; rows go to cold_start.csv.")
    parser.add_argument("--cases", nargs="+", metavar="NAME", choices=list(CASES))
    parser.add_argument("--quick", action="store_true", help="a tiny case, for the CPU")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = folder(args.out, quick=args.quick, device=device) / "cold_start.csv"
    for name in args.cases or (["quick_variable"] if args.quick else ["128x256_top8", "128exp_variable"]):
        with tempfile.TemporaryDirectory() as cache:
            empty, warm = (first_step_seconds(name, device, cache) for _ in range(2))
        parts = {f"warm_{part}_s": seconds for part, seconds in warm.items()}
        total = {"empty_cache_s": sum(empty.values()), "warm_cache_s": sum(warm.values())}
        row = {"case": name, **total, **parts, **provenance(device)}
        append(path, [row])
        print(", ".join(f"{key} {text(value)}" for key, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
