"""The shapes that are measured, each under one name, and how many floating-point operations they stand for.

Letters as in `triton_moe.layout`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from triton_moe import MoEConfig
from triton_moe.activations import is_gated

Sizes = Sequence[tuple[int, int]]
BATCH_TOKENS = 512


@dataclass(frozen=True)
class BenchCase:
    """A layer and how many tokens go through it. Auxiliary losses are off: not every contestant has them."""

    name: str
    num_tokens: int
    config: MoEConfig

    def columns(self) -> dict[str, int | str]:
        """Those of a row of results that say what the shape is."""
        config = self.config
        return {
            "T": self.num_tokens,
            "H": config.hidden_size,
            "sizes": "+".join(f"{count}x{width}" for count, width in config.expert_sizes),
            "K": config.num_active_experts,
            "activation": config.activation,
        }

    def forward_flops(self) -> float:
        """Floating-point operations of the experts' GEMMs in one forward pass; a step is three times that.

        `2 * T * K * H * mean width`, times 2 matrices, or 3 of a gated MLP. Which experts are chosen, and so how wide
        they are, depends on the data: this is the expectation when all are chosen equally often. Padding does not
        count, nor does the router.
        """
        config, layout = self.config, self.config.layout
        mean_width = layout.total_width / layout.num_experts
        matrices = 3 if is_gated(config.activation) else 2
        return 2.0 * self.num_tokens * config.num_active_experts * config.hidden_size * mean_width * matrices


def bench_case(name: str, num_tokens: int, hidden_size: int, sizes: Sizes, top_k: int, activation: str) -> BenchCase:
    config = MoEConfig(sizes, top_k, hidden_size, activation=activation, aux_losses=False)
    return BenchCase(name, num_tokens, config)


def _seed_case(name: str, top_k: int, sizes: Sizes, num_tokens: int = 4096, hidden_size: int = 256) -> BenchCase:
    return bench_case(name, num_tokens, hidden_size, sizes, top_k, "relu_squared")


_RANDOM_WIDTHS = random.Random(0).choices(range(128, 513), k=220)

GROUPS = {
    "seed": (
        _seed_case("8exp_uniform", 2, [(8, 512)]),
        _seed_case("8exp_variable", 2, [(4, 512), (4, 256)]),
        _seed_case("16exp_uniform", 2, [(16, 256)]),
        _seed_case("16exp_variable", 2, [(4, 512), (8, 256), (4, 128)]),
        _seed_case("64exp_uniform", 8, [(64, 256)]),
        _seed_case("64exp_variable", 8, [(16, 512), (32, 256), (16, 128)]),
        _seed_case("128exp_uniform", 8, [(128, 256)]),
        _seed_case("128exp_variable", 8, [(32, 512), (64, 256), (32, 128)]),
    ),
    "seed_h768": (
        _seed_case("64exp_uniform_h768", 8, [(64, 256)], num_tokens=8192, hidden_size=768),
        _seed_case(
            "64exp_variable_h768", 8, [(16, 512), (32, 256), (16, 128)], num_tokens=8192, hidden_size=768
        ),
    ),
    "training": (
        bench_case("128x256_top8", 24576, 1536, [(128, 256)], 8, "swiglu"),
        bench_case("32x1024_top2", 24576, 1536, [(32, 1024)], 2, "swiglu"),
        bench_case("128x1024_top8_h4096", 32768, 4096, [(128, 1024)], 8, "swiglu"),
        bench_case("128x768_top8_h2048", 16384, 2048, [(128, 768)], 8, "swiglu"),
        bench_case("128exp_variable_top8", 24576, 1536, [(32, 512), (64, 256), (32, 128)], 8, "swiglu"),
    ),
    "widths": (
        bench_case("128x256", 24576, 1536, [(128, 256)], 8, "swiglu"),
        bench_case("32x384_64x256_32x128", 24576, 1536, [(32, 384), (64, 256), (32, 128)], 8, "swiglu"),
        bench_case("128x1024_h4096", 32768, 4096, [(128, 1024)], 8, "swiglu"),
        bench_case("32x1536_64x1024_32x512_h4096", 32768, 4096, [(32, 1536), (64, 1024), (32, 512)], 8, "swiglu"),
        bench_case("64x1536", 24576, 1536, [(64, 1536)], 2, "swiglu"),
        bench_case("23_to_1", 24576, 1536, [(32, 2944), (32, 128)], 2, "swiglu"),
        bench_case("120x512", 24576, 1536, [(120, 512)], 4, "swiglu"),
        bench_case("9_to_23_times_32", 24576, 1536, [(8, 32 * n) for n in range(9, 24)], 4, "swiglu"),
        bench_case("220x320", 24576, 1536, [(220, 320)], 8, "swiglu"),
        bench_case("220_random", 24576, 1536, [(1, width) for width in _RANDOM_WIDTHS], 8, "swiglu"),
    ),
    "quick": (
        bench_case("quick_uniform", 64, 32, [(4, 16)], 2, "relu_squared"),
        bench_case("quick_variable", 48, 32, [(2, 32), (2, 8)], 2, "swiglu"),
    ),
}  # fmt: skip
"""seed: the starting document's configurations; seed_h768: two of them at its first user's size; training: shapes of
pretraining runs; widths: pairs of a uniform layout and one of other widths but about equal FLOPs; quick: for a CPU, in
seconds."""

CASES = {case.name: case for group in GROUPS.values() for case in group}


def select(names: Sequence[str]) -> list[BenchCase]:
    """Cases by their names, by those of their groups, or all of them but the quick ones. ValueError on another name."""
    groups = {**GROUPS, "all": [case for name, group in GROUPS.items() if name != "quick" for case in group]}
    chosen: dict[str, BenchCase] = {}
    for name in names:
        if name not in groups and name not in CASES:
            raise ValueError(f"cases: expected some of {', '.join((*groups, *CASES))}, got {name!r}")
        chosen |= {case.name: case for case in groups.get(name) or (CASES[name],)}
    return list(chosen.values())


def with_batch_sizes(cases: Sequence[BenchCase], batch_sizes: Sequence[int]) -> list[BenchCase]:
    """Each case with so many batches of `BATCH_TOKENS` tokens, named after them. ValueError on less than one."""
    if min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes: expected 1 or more each, got {min(batch_sizes)}")
    return [
        case
        if case.num_tokens == size * BATCH_TOKENS
        else replace(case, name=f"{case.name}_batch{size}", num_tokens=size * BATCH_TOKENS)
        for case in cases
        for size in batch_sizes
    ]
