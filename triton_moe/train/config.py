"""What a training run is: everything that decides its numbers, apart from the text and the device."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from triton_moe.moe import MoEConfig

PRECISIONS = ("fp32", "bf16")
"""fp32: everything in float32. bf16: float32 parameters under autocast to bfloat16."""


@dataclass(frozen=True)
class TrainConfig:
    """A model and its training. The defaults are for two CPU cores, `for_device` knows those of a GPU."""

    expert_sizes: tuple[tuple[int, int], ...] = ((2, 256), (4, 128), (2, 64))
    num_active_experts: int = 2
    activation: str = "swiglu"
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    context: int = 128
    """Bytes a prediction may look back on."""
    batch_size: int = 16
    """Sequences of `context` bytes a step."""
    steps: int = 600
    learning_rate: float = 2e-3
    """Its peak, after a warm-up over the first twentieth of the steps; from there a cosine down to a tenth."""
    weight_decay: float = 0.1
    load_balance_weight: float = 0.05
    router_z_weight: float = 0.001
    precision: str = "fp32"
    seed: int = 0
    backend: str = "auto"
    """Of the MoE layers; one of `triton_moe.functional.BACKENDS`."""

    compile: bool = False
    """Whether each step runs under torch.compile, as CUDA graphs."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "context", "batch_size", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r}")
        for name in ("learning_rate", "weight_decay", "load_balance_weight", "router_z_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 <= seed < 2**32, got {self.seed!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        object.__setattr__(self, "expert_sizes", self.moe.expert_sizes)
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: expected a multiple of 2 * num_heads = {2 * self.num_heads}, got {self.hidden_size}"
            )

    @classmethod
    def for_device(cls, device_type: str, **changes: object) -> TrainConfig:
        """The defaults of a device, with changes. A TypeError names an unknown one."""
        defaults = _CUDA_DEFAULTS if device_type == "cuda" else {}
        return cls(**{**defaults, **changes})  # type: ignore[arg-type]

    @property
    def moe(self) -> MoEConfig:
        """The configuration of each MoE layer."""
        return MoEConfig(
            self.expert_sizes,
            self.num_active_experts,
            self.hidden_size,
            activation=self.activation,
            backend=self.backend,
        )

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


_CUDA_DEFAULTS: dict[str, object] = {
    "expert_sizes": ((8, 512), (16, 256), (8, 128)),
    "num_active_experts": 4,
    "hidden_size": 512,
    "num_layers": 8,
    "num_heads": 8,
    "context": 512,
    "batch_size": 32,
    "steps": 1000,
    "learning_rate": 1e-3,
    "precision": "bf16",
}
