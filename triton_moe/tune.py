"""The search behind `triton-moe tune`: every kernel with every configuration that may do, on one shape."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from triton_moe.activations import is_gated
from triton_moe.kernels.config import capability, narrowed
from triton_moe.kernels.decode import is_few, route_few
from triton_moe.kernels.hopper.launch import fits
from triton_moe.kernels.route import route
from triton_moe.kernels.tuning import PipelineConfig, TileConfig, configure, kind_of, read_table, table
from triton_moe.layout import ExpertLayout, Routing
from triton_moe.moe import MoEConfig
from triton_moe.products import TOLERANCE, Product, Shape, disagreement, products

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = {"up": "up", "down": "down", "dh": "dh", "dw": "dw1"}
"""Kernel -> the product that it is timed on."""
TILES = (
    *(TileConfig(n, k, w, s) for n, k, w, s in itertools.product((64, 128), (32, 64), (4, 8), (3, 4, 5))),
    *(TileConfig(256, k, w, s) for k, w, s in itertools.product((32, 64), (8, 16), (3, 4))),
)
DECODE_TILES = tuple(TileConfig(n, k, 4, s) for n, k, s in itertools.product((32, 64, 128), (64, 128), (3, 4, 5)))
PIPELINES = tuple(
    PipelineConfig(stages, *registers) for stages in (3, 4) for registers in ((40, 232), (56, 224), (72, 216))
)
_ROUNDS = 5
_NEARLY, _BY_CHANCE = 1.1, 1.01
"""Times of the fastest: up to which another may be as fast, and up to which it is not known to be slower."""


def request(
    tokens: int, hidden_size: int, sizes: Sequence[tuple[int, int]], top_k: int, activation: str, precision: str
) -> tuple[Shape, torch.dtype, torch.device]:
    """What to search on. Raises ValueError if it is no layer, or there is no GPU."""
    if not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device to tune for, got none")
    if precision not in DTYPES:
        raise ValueError(f"precision: expected one of {', '.join(DTYPES)}, got {precision!r}")
    if tokens < 1:
        raise ValueError(f"tokens: expected 1 or more, got {tokens}")
    config = MoEConfig(sizes, top_k, hidden_size, activation=activation)
    shape = Shape(tokens, hidden_size, config.layout, top_k, activation)
    return shape, DTYPES[precision], torch.device("cuda", torch.cuda.current_device())


def kernels_for(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Kernel's name in the table -> product, as far as this shape and device run it. A few tokens are decoding."""
    if is_few(shape.num_tokens * shape.top_k, shape.layout):
        return {"decode_up_gated" if is_gated(shape.activation) else "decode_up": "up", "decode_down": "down"}
    gated = ("up", "dh") if is_gated(shape.activation) else ()
    names = {f"{kernel}_gated" if kernel in gated else kernel: product for kernel, product in PRODUCTS.items()}
    if fits(shape.hidden_size, dtype, device):
        names |= {f"hopper_{'up' if name == 'up_gated' else name}": product for name, product in names.items()}
    if gated:  # the gradients of w1 and w3 together have a row of their own
        names |= {"dw": "dw2", "dw_pair": "dw1"}
    return names


def _way(kernel: str) -> tuple[str, Callable[[Tensor, ExpertLayout, bool], Routing]]:
    """-> the backend and the routing of `products`."""
    if kernel.startswith("decode_"):
        return "triton", lambda ids, layout, _: route_few(ids, layout)
    return "hopper" if kind_of(kernel) is PipelineConfig else "triton", route


def candidates(kernel: str, product: str, shape: Shape) -> Sequence[TileConfig | PipelineConfig]:
    """The configurations to try: no wide tile of which this shape would run half."""
    if kind_of(kernel) is PipelineConfig:
        return PIPELINES
    if kernel.startswith("decode_"):
        return DECODE_TILES
    columns = (shape.hidden_size,) if product == "down" else shape.layout.widths
    return [tile for tile in TILES if narrowed(tile, *columns) == tile]


def _milliseconds(product: Product) -> float:
    times = do_bench(product.call, warmup=10, rep=50, return_mode="all")
    assert isinstance(times, list)
    return statistics.median(times)


@contextmanager
def _restored(kernel: str, device: torch.device) -> Iterator[TileConfig | PipelineConfig]:
    """The configuration in force, which is in force again at the end."""
    major, minor = capability(device)
    before = table().get((f"{major}.{minor}", kernel)) or table()["any", kernel]
    try:
        yield before
    finally:
        configure(kernel, (major, minor), before)


def search(
    kernel: str, product: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[TileConfig | PipelineConfig, float | None]]:
    """Each configuration and its milliseconds, None if it does not fit or is wrong. The one in force comes first."""
    backend, make_routing = _way(kernel)
    made = products(shape, backend, dtype, device, make_routing)[product]
    expected = products(shape, "triton", dtype, device)[product]
    expected.call()
    truth = [tensor.clone() for tensor in expected.result()]
    known = dataclasses.replace(expected, call=lambda: None, filled=lambda: truth, read=list)
    with _restored(kernel, device) as before:
        for config in dict.fromkeys((before, *candidates(kernel, product, shape))):
            configure(kernel, capability(device), config)
            try:
                for tensor in made.filled():
                    tensor.fill_(torch.nan)  # or what this one leaves out would be right by the one before
                right = disagreement(made, known) < TOLERANCE
                yield config, _milliseconds(made) if right else None
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
                yield config, None


def best_of(
    kernel: str,
    product: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    found: Mapping[TileConfig | PipelineConfig, float],
) -> tuple[TileConfig | PipelineConfig, float]:
    """The fastest of those that a search found to run, and its milliseconds.

    In a search one runs after the other, on a device whose clock changes; so those that were nearly as fast as the
    fastest run once more, in turns. The one in force stays unless another is faster by more than chance.
    """
    backend, make_routing = _way(kernel)
    made = products(shape, backend, dtype, device, make_routing)[product]
    limit = _NEARLY * min(found.values())
    times: dict[TileConfig | PipelineConfig, list[float]] = {config: [] for config in found if found[config] <= limit}
    with _restored(kernel, device) as before:
        for _ in range(_ROUNDS):
            for config, of_config in times.items():
                configure(kernel, capability(device), config)
                of_config.append(_milliseconds(made))
    medians = {config: statistics.median(of_config) for config, of_config in times.items()}
    best = min(medians, key=medians.__getitem__)
    if before in medians and medians[before] <= _BY_CHANCE * medians[best]:
        best = before
    return best, medians[best]


def _beside(path: Path) -> Path:
    """Where a table is written before it takes the place of the file, or of the one that a link names."""
    path = path.resolve()
    return path.with_name(f"{path.name}.new")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A table's rows, none if there is no such file. Raises ValueError if that is no table, or cannot be written."""
    try:
        _beside(path).touch()
        _beside(path).unlink()
    except OSError as error:
        raise ValueError(f"out: expected a file that can be written, got {path}: {error.strerror}") from None
    if not path.exists():
        return []
    read_table(path)
    return json.loads(path.read_text())


def write_row(
    path: Path, kernel: str, config: TileConfig | PipelineConfig, ms: float, shape: Shape, device: torch.device
) -> None:
    """Put a row into a table, in place of the one for the same kernel and compute capability."""
    major, minor = capability(device)
    rows = [row for row in read_rows(path) if (row["capability"], row["kernel"]) != (f"{major}.{minor}", kernel)]
    rows.append(
        {
            "capability": f"{major}.{minor}",
            "kernel": kernel,
            "config": config._asdict(),
            "case": f"T={shape.num_tokens} H={shape.hidden_size} S={shape.layout.total_width} "
            f"E={shape.layout.num_experts} K={shape.top_k} {shape.activation}",
            "ms": round(ms, 5),
            "gpu": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
    )
    _beside(path).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    _beside(path).replace(path.resolve())
