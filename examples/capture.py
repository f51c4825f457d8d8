"""Forward and backward of a micro-step as one CUDA graph: a launch for the host, where they would be hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MicroStep = Callable[[Tensor], tuple[Tensor, ...]]
"""Takes tensors from the device's memory, adds to the gradients, and waits for nothing."""


class CapturedMicroStep:
    """A micro-step that has run before, so that nothing is left to compile; captured when this is built.

    The gradients stay where they are from then on. Where they add up over several micro-steps, they are to be zeroed
    before the first of them; where not, every call writes them anew.
    """

    def __init__(self, micro_step: MicroStep, model: nn.Module, inputs: Tensor, adds_up: bool) -> None:
        self.adds_up = adds_up
        model.zero_grad()
        if adds_up:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        torch.cuda.empty_cache()  # the graph has memory of its own
        self.inputs, self.graph = inputs.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = micro_step(self.inputs)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        self.inputs.copy_(inputs)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)
