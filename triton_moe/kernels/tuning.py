"""The tuning table: with which tiles a kernel runs on which GPU.

Rows of JSON, written by `triton-moe tune`: `tuning.json` beside this file, then the file that the environment variable
TRITON_MOE_TUNING names, whose rows win. A row is for a compute capability, "9.0", or for "any" that has none of its
own. Nothing in it depends on the number of tokens: a new batch size compiles nothing.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

VARIABLE = "TRITON_MOE_TUNING"
_REGISTERS = 64_512
PACKAGED = Path(__file__).with_name("tuning.json")


class TileConfig(NamedTuple):
    """Keywords of a portable GEMM kernel's launch."""

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class PipelineConfig(NamedTuple):
    """Keywords of a Hopper GEMM kernel's launch: its ring's depth, registers of a thread that produces or consumes."""

    STAGES: int
    PRODUCER_REGISTERS: int
    CONSUMER_REGISTERS: int

    @property
    def registers(self) -> int:
        """Of 128 producers and 256 consumers; with more than there are a launch never ends."""
        return 128 * self.PRODUCER_REGISTERS + 256 * self.CONSUMER_REGISTERS


Config = TypeVar("Config", TileConfig, PipelineConfig)


def kind_of(kernel: str) -> type[TileConfig] | type[PipelineConfig]:
    return PipelineConfig if kernel.startswith("hopper_") else TileConfig


def read_table(path: Path) -> dict[tuple[str, str], TileConfig | PipelineConfig]:
    """(capability, kernel) -> configuration. Raises ValueError if the file is no such table."""
    try:
        rows = json.loads(path.read_text())
        found = {(row["capability"], row["kernel"]): kind_of(row["kernel"])(**row["config"]) for row in rows}
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a tuning table as `triton-moe tune` writes it, got {error!r}") from None
    for (capability, kernel), config in found.items():
        if not re.fullmatch(r"any|\d+\.\d+", capability):
            raise ValueError(f"{path}: expected a capability such as 9.0, or any, got {capability!r}")
        if path != PACKAGED and all(kernel != known for _, known in read_table(PACKAGED)):
            raise ValueError(f"{path}: expected a kernel of the packaged table, got {kernel!r}")
        if isinstance(config, PipelineConfig) and config.registers > _REGISTERS:
            raise ValueError(f"{path}: expected at most {_REGISTERS} registers for {kernel}, got {config.registers}")
    return found


@functools.cache
def table() -> dict[tuple[str, str], TileConfig | PipelineConfig]:
    """The packaged rows and the user's, read once."""
    users = os.environ.get(VARIABLE)
    return {**read_table(PACKAGED), **(read_table(Path(users)) if users else {})}


def tuned(kernel: str, capability: tuple[int, int], kind: type[Config]) -> Config:
    rows = table()
    config = rows.get((f"{capability[0]}.{capability[1]}", kernel)) or rows["any", kernel]
    assert isinstance(config, kind)
    return config


Function = TypeVar("Function", bound=Callable[..., Any])
_made_of_it: list[Callable[[], None]] = []


def forget_when_configured(clear: Callable[[], None]) -> None:
    """Have `clear` called when a configuration is changed."""
    _made_of_it.append(clear)


def cached_launcher(function: Function) -> Function:
    """Remember what a function makes of a configuration, until that is changed."""
    cached = functools.lru_cache(maxsize=256)(function)
    forget_when_configured(cached.cache_clear)
    return cached  # type: ignore[return-value]


def configure(kernel: str, capability: tuple[int, int], config: TileConfig | PipelineConfig) -> None:
    """From now on, in this process, run a kernel so. For the search."""
    table()[f"{capability[0]}.{capability[1]}", kernel] = config
    forget()


def forget() -> None:
    """Make anew what was made of the table."""
    for made in _made_of_it:
        made()
