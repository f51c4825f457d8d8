"""Balancing without a loss: a bias on the scores that the choice of experts is made by, moved against their load.

A layer counts in training how often each expert is chosen. Once a step, after any number of forward and backward
passes, the bias moves by these counts:

    optimizer.step()
    update_expert_biases(model)

or, with a hook, `optimizer.register_step_post_hook(lambda *_: update_expert_biases(model))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triton_moe.ops import expert_bias as ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METHODS = ("smebu", "sign")
_FP32_BUFFERS = ("expert_bias", "expert_bias_momentum", "_kept_bias")


@dataclass(frozen=True)
class BiasBalancing:
    """How the bias moves. With n_e the times that expert e was chosen, and mean their mean over the E experts:

        smebu   d = speed * tanh(kappa * (mean - n) / mean);  d -= mean(d)
                momentum = beta * momentum + (1 - beta) * d;  bias += momentum
        sign    momentum = speed * sign(mean - n);  bias += momentum

    smebu: soft-clamped momentum expert bias updates (arXiv:2602.17004); sign: arXiv:2408.15664. All in fp32.
    Raises ValueError, naming the argument, on anything else.
    """

    method: str = "smebu"
    speed: float = 5e-4
    kappa: float = 2.0
    """Of smebu: how soon a violation saturates."""
    beta: float = 0.5
    """Of smebu: 0 <= beta < 1, the momentum's share of the last one."""
    update_in_forward: bool = False
    """Whether each forward pass in training moves the bias, after its own choice, instead of the training loop.

    One bias is kept for activation checkpointing to repeat a pass with, the last one's: backward must repeat a pass
    before the layer's next pass in training. Otherwise it raises ValueError; compiled, it does not notice.
    """

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("speed", "kappa"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {value!r}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.beta, Real) or not 0 <= float(self.beta) < 1:
            raise ValueError(f"beta: expected 0 <= beta < 1, got {self.beta!r}")
        object.__setattr__(self, "beta", float(self.beta))
        if not isinstance(self.update_in_forward, bool):
            raise ValueError(f"update_in_forward: expected True or False, got {self.update_in_forward!r}")

    @property
    def formula(self) -> tuple[str, float, float, float]:
        """What the operators take of it."""
        return self.method, self.speed, self.kappa, self.beta


class BiasBalanced(nn.Module):
    """Base of a layer that chooses its experts by scores and a bias.

    With a `balancing` it has the buffers `expert_bias` and `expert_bias_momentum`, `(E)` and fp32 whatever the layer is
    cast to, and outside of the state dict `expert_counts (E)` int64. A subclass chooses by `choice_bias()` and then
    says what it chose, with `count_choices`.
    """

    balancing: BiasBalancing | None = None
    expert_bias: Tensor
    expert_bias_momentum: Tensor
    expert_counts: Tensor
    _kept_bias: Tensor
    _passes = 0
    """Forward passes in training since backward last repeated one, or since any layer raised for two of them."""
    _seen = 0
    _raised = 0
    """How often that was, in all layers; `_seen`: when this one last looked."""

    def _register_expert_bias(
        self, balancing: BiasBalancing | None, num_experts: int, device: torch.device | str | None
    ) -> None:
        self.balancing = balancing
        if balancing is None:
            return
        self.register_buffer("expert_bias", torch.zeros(num_experts, device=device, dtype=torch.float32))
        self.register_buffer("expert_bias_momentum", torch.zeros_like(self.expert_bias))
        counts = torch.zeros(num_experts, device=device, dtype=torch.int64)
        self.register_buffer("expert_counts", counts, persistent=False)
        if balancing.update_in_forward:
            self.register_buffer("_kept_bias", torch.zeros_like(self.expert_bias), persistent=False)

    @torch.no_grad()
    def _init_buffers(self) -> None:
        """Set the buffers named above to their initial zeros, as after `to_empty`."""
        for name in (*_FP32_BUFFERS, "expert_counts"):
            if name in self._buffers:
                self.get_buffer(name).zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        """Then see to what `assign=True` takes as it was saved, in any dtype, or leaves on the meta device."""
        super()._load_from_state_dict(*args)
        if self.balancing is None:
            return
        for name in ("expert_bias", "expert_bias_momentum"):
            self._buffers[name] = self.get_buffer(name).float()
        for name in ("expert_counts", "_kept_bias"):
            if name in self._buffers and self.get_buffer(name).device != self.expert_bias.device:
                self._buffers[name] = torch.zeros_like(self.get_buffer(name), device=self.expert_bias.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers.get(name) for name in _FP32_BUFFERS}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers.get(name)
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def choice_bias(self) -> Tensor | None:
        """`(E)` fp32, to be added to the scores for the choice alone; None without balancing."""
        if self.balancing is None:
            return None
        if not (self.training and self.balancing.update_in_forward):
            return self.expert_bias
        if not torch.compiler.is_compiling():  # which cannot trace any of this
            if torch.is_inference_mode_enabled():
                return self.expert_bias
            repeated = ops.is_recomputed()
            if self._seen != BiasBalanced._raised:  # backward ended there: nothing of before will be repeated
                self._passes, self._seen = 0, BiasBalanced._raised
            if repeated and self._passes > 1:
                BiasBalanced._raised += 1
                raise ValueError(
                    "update_in_forward: expected backward to repeat a checkpointed pass before the layer's next pass "
                    f"in training, got {self._passes} passes since it last did"
                )
            self._passes = 0 if repeated else self._passes + 1
        ops.keep_bias(self._kept_bias, self.expert_bias)
        return self._kept_bias

    def count_choices(self, load: Tensor, num_slots: int) -> None:
        """After a choice: `load (E)`, in fp32 or wider, is the fraction of the `num_slots` that chose each expert.

        Does nothing without balancing, in evaluation, in inference mode, or when activation checkpointing repeats the
        pass. A forward pass of its own inside of backward is taken for such a repetition.
        """
        if self.balancing is None or not self.training:
            return
        ops.count_choices(self.expert_counts, load, num_slots)
        if self.balancing.update_in_forward:
            ops.move_bias_in_forward(
                self.expert_bias, self.expert_bias_momentum, self.expert_counts, *self.balancing.formula
            )


@torch.no_grad()
def update_expert_biases(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Move the bias of every layer in a model by what was chosen since the last time. Once a step, in every process.

    Where torch.distributed is initialised the counts are summed over the processes of `group`, in one all-reduce.
    Layers without a bias, and those that move theirs in forward, are left alone. DistributedDataParallel would
    overwrite the counts of other processes than the first: give it `broadcast_buffers=False`.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, BiasBalanced) and layer.balancing and not layer.balancing.update_in_forward
    ]
    if not layers:
        return
    device = layers[0].expert_counts.device
    counts = ops.all_reduced(torch.cat([layer.expert_counts.to(device) for layer in layers]), group)
    for layer, n in zip(layers, counts.split([layer.expert_counts.numel() for layer in layers]), strict=True):
        assert layer.balancing is not None
        bias = layer.expert_bias
        ops.move_bias(bias, layer.expert_bias_momentum, n.to(bias.device), *layer.balancing.formula)
        layer.expert_counts.zero_()
