"""A run on disk: one safetensors file with the model, the optimizer's state, and as metadata everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from triton_moe.train.config import TrainConfig

FILE_NAME = "checkpoint.safetensors"
_FORMAT = "triton-moe-train-2"


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps."""

    config: TrainConfig
    source: str
    """Of the `Corpus` it was trained on, as the next two."""
    data: Path | None
    sha256: str
    step: int
    seconds: float
    """Spent in training steps so far."""
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    """`<parameter>/<state>`, as AdamW names its state"""
    usage: Tensor
    """(layers, E) int64: slots that went to each expert so far"""

    def save(self, folder: Path) -> Path:
        """Write `folder/checkpoint.safetensors`; an earlier one stays whole until the new one is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model/{name}": tensor for name, tensor in self.model.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.items()}
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        about = {
            "format": _FORMAT,
            "config": json.dumps(self.config.to_dict()),
            "source": self.source,
            "data": "" if self.data is None else str(self.data),
            "sha256": self.sha256,
            "step": str(self.step),
            "seconds": str(self.seconds),
        }
        path = folder / FILE_NAME
        partial = path.with_suffix(".partial")
        save_file({**tensors, "usage": self.usage.cpu()}, partial, about)
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, folder: Path, argument: str = "resume") -> Checkpoint:
        """That of a run's folder, or the file itself.

        Raises ValueError, naming the argument, if there is no checkpoint of a run, or a damaged one.
        """
        path = folder if folder.is_file() else folder / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{argument}: expected a checkpoint at {path}, got none")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(
                f"{argument}: expected a checkpoint at {path}, got a file that is none: {error}"
            ) from error
        if about.get("format") != _FORMAT:
            raise ValueError(f"{argument}: expected a checkpoint of format {_FORMAT}, got {about.get('format')!r}")

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        return cls(
            config=TrainConfig(**json.loads(about["config"])),
            source=about["source"],
            data=Path(about["data"]) if about["data"] else None,
            sha256=about["sha256"],
            step=int(about["step"]),
            seconds=float(about["seconds"]),
            model=under("model/"),
            optimizer=under("optimizer/"),
            usage=tensors["usage"],
        )


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter>/<state>`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put `optimizer_state`'s tensors back, each on its parameter's device."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameter, _, key = name.rpartition("/")
        optimizer.state[parameters[parameter]][key] = value.to(parameters[parameter].device)
