"""What a balanced layer writes in its forward pass, as operators, so that each pass is counted once.

Activation checkpointing runs a forward pass again, inside of backward, and under torch.compile Python does not run at
all: so the operators look for themselves, when they run, and leave everything as it is while a backward pass does. In
inference mode nothing is counted either. Letters as in `triton_moe.layout`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_recomputed() -> bool:
    """Whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def _counts() -> bool:
    return not is_recomputed() and not torch.is_inference_mode_enabled()


def all_reduced(counts: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over the processes of a group, in place; counts as they are without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts, group=group)
    return counts


def move_bias(
    bias: Tensor, momentum: Tensor, counts: Tensor, method: str, speed: float, kappa: float, beta: float
) -> None:
    """One update of bias and momentum `(E)` fp32 from `counts (E)`; the formulas are `BiasBalancing`'s."""
    n = counts.float()
    mean = n.mean()
    if method == "sign":
        momentum.copy_(speed * torch.sign(mean - n))
    else:
        violation = (mean - n) / mean.clamp_min(torch.finfo(torch.float32).tiny)
        step = speed * torch.tanh(kappa * violation)
        momentum.mul_(beta).add_((1 - beta) * (step - step.mean()))
    bias.add_(momentum)


def _keep_bias(kept: Tensor, bias: Tensor) -> None:
    if not is_recomputed():
        kept.copy_(bias)


def _count_choices(counts: Tensor, load: Tensor, num_slots: int) -> None:
    if _counts():
        counts.add_((load * num_slots).round().long())


def _move_bias_in_forward(
    bias: Tensor, momentum: Tensor, counts: Tensor, method: str, speed: float, kappa: float, beta: float
) -> None:
    if _counts():
        move_bias(bias, momentum, all_reduced(counts), method, speed, kappa, beta)
        counts.zero_()


class _Writer:
    """A function that writes to its first arguments; under torch.compile it is called as an operator."""

    def __init__(self, function, writes: tuple[str, ...]) -> None:
        self.function = function
        name = f"triton_moe::{function.__name__.removeprefix('_')}"
        self.operator = torch.library.custom_op(name, function, mutates_args=writes)
        self.operator.register_fake(lambda *_: None)

    def __call__(self, *arguments) -> None:
        (self.operator if torch.compiler.is_compiling() else self.function)(*arguments)


keep_bias = _Writer(_keep_bias, ("kept",))
"""`(kept, bias)`: copy the bias that this pass chooses by, for its recomputation to choose by too."""
count_choices = _Writer(_count_choices, ("counts",))
"""`(counts (E) int64, load (E), num_slots)`: add this pass's choices, a fraction `load` of the slots each."""
move_bias_in_forward = _Writer(_move_bias_in_forward, ("bias", "momentum", "counts"))
"""As `move_bias`, by the counts of all processes, which start again from 0."""
