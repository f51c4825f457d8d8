"""What a run of the recipe is: all its options, read from a JSON file, from the command line, or written in Python."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpe import Tokens
from gpt import GPTConfig

from triton_moe import BiasBalancing, MoEConfig

CHOICES = {
    "experts": ("triton", "grouped_mm"),
    "optimizer": ("adamw", "muon"),
    "balancing": ("none", "smebu", "sign"),
    "precision": ("bf16", "fp32"),
    "compile": ("off", "blocks", "model", "graph"),
}

STEPS = 360
"""Of a run that is given neither steps nor passes."""


@dataclass(frozen=True)
class Config:
    """All that decides a run's numbers, apart from the text and the machine. ValueErrors name what cannot be."""

    expert_sizes: Sequence[Sequence[int]] = ((64, 256),)
    num_active_experts: int = 8
    activation: str = "relu_squared"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    moe_every: int = 1
    """1: an MoE in every block; 2: in every other."""
    vocabulary: int = 8192
    context: int = 1024
    batch_size: int = 16
    """Sequences of a micro-step."""
    accumulation: int = 1
    """Micro-steps whose gradients one step of the optimizer takes."""
    steps: int = None  # type: ignore[assignment]  # STEPS, unless passes stand in
    """None if, and only if, `passes` is a number."""
    passes: int | None = None
    """In place of steps: as many as take no sequence of the text more often than this. See `on`."""
    warm_up: int = 30
    """Steps over which the learning rate rises; then it follows a cosine."""
    optimizer: str = "adamw"
    """muon: for matrices, each expert's by itself; embedding, head, router and gains keep AdamW. PyTorch's Muon takes
    them one after another, so with many experts it wants `accumulation` to hide its launches."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    load_balance_weight: float = 0.01
    router_z_weight: float = 0.001
    compute_weight: float = 0.0
    """Of the loss that makes wide experts dear."""
    balancing: str = "none"
    """A bias on the router's scores that balances the experts, see `BiasBalancing`."""
    balancing_speed: float = 1e-3
    experts: str = "triton"
    """grouped_mm: PyTorch's grouped GEMM, padded to the widest expert, in place of ours."""
    precision: str = "bf16"
    compile: str = "blocks"
    """blocks: torch.compile of a block, which all blocks share; model: of all of them at once; graph: of a block, and
    forward and backward are captured as a CUDA graph, which no host is late for."""
    backend: str = "auto"
    """Of our experts: one of `triton_moe.functional.BACKENDS`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.passes is None and self.steps is None:
            object.__setattr__(self, "steps", STEPS)
        if self.passes is not None and self.steps is not None:
            raise ValueError(f"passes: expected None beside steps = {self.steps!r}, got {self.passes!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("steps", "passes") and value is None:
                continue
            least = 0 if field.name in ("seed", "warm_up") else 1
            if field.type in ("int", "int | None") and (type(value) is not int or value < least):
                raise ValueError(f"{field.name}: expected an integer of {least} or more, got {value!r}")
            if field.type == "float" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{field.name}: expected 0 or more, got {value!r}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"num_heads: expected heads of an even size, got {self.hidden_size} / {self.num_heads}")
        if self.moe_every > self.num_layers:
            raise ValueError(f"moe_every: expected at most num_layers = {self.num_layers}, got {self.moe_every}")
        object.__setattr__(self, "expert_sizes", self.gpt.moe.expert_sizes)  # raises if they cannot be

    @property
    def gpt(self) -> GPTConfig:
        balancing = None if self.balancing == "none" else BiasBalancing(self.balancing, self.balancing_speed)
        names = ("expert_sizes", "num_active_experts", "hidden_size", "activation", "backend")
        moe = MoEConfig(**{name: getattr(self, name) for name in names}, balancing=balancing)
        return GPTConfig(moe, self.num_layers, self.num_heads, self.vocabulary, self.context, self.moe_every)

    @property
    def tokens_per_step(self) -> int:
        return self.accumulation * self.batch_size * self.context

    def on(self, tokens: Tokens) -> Config:
        """The same, with steps in place of passes. Raises ValueError if the text has no step in so many."""
        if self.passes is None:
            return self
        wanted, found = self.accumulation * self.batch_size, self.passes * tokens.sequences_per_pass(self.context)
        if found < wanted:
            raise ValueError(f"data: expected {wanted} sequences, a step's, in passes = {self.passes}, got {found}")
        return dataclasses.replace(self, steps=found // wanted, passes=None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"config: expected fields of Config, got {', '.join(sorted(unknown))}")
        return cls(**values)

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Config:
        """A JSON file with some of the fields, the others at their defaults, and changes to it: steps to passes too."""
        values = json.loads(path.read_text())
        for name, other in (("steps", "passes"), ("passes", "steps")):
            if name in changes:
                values.pop(other, None)
        return cls.from_dict({**values, **changes})
