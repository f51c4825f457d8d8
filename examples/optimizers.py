"""AdamW, and Muon on the matrices of a model whose experts are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpt import GPT, Attention
from padded_experts import PaddedExperts
from settings import Config
from torch import Tensor

from triton_moe.experts import DenseMLP, Experts

Cut = Callable[[Tensor], Sequence[Tensor]]
"""A parameter, or its gradient, into views of its matrices."""


class Muon(torch.optim.Muon):
    """Muon over parts of parameters, each a matrix of its own: orthogonalising packed experts would mix them."""

    def __init__(self, parts: Mapping[Tensor, Cut], **options: Any) -> None:
        self._cuts = [
            (whole, cut, [part for part in cut(whole.detach()) if part.numel()]) for whole, cut in parts.items()
        ]
        super().__init__(
            [part for *_, views in self._cuts for part in views], adjust_lr_fn="match_rms_adamw", **options
        )

    def step(self, closure: None = None) -> None:
        for whole, cut, views in self._cuts:
            assert whole.grad is not None
            for view, grad in zip(views, (part for part in cut(whole.grad) if part.numel()), strict=True):
                view.grad = grad
        super().step(closure)
        for *_, views in self._cuts:
            for view in views:
                view.grad = None  # or the memory would stay until the next step


def matrices(model: GPT) -> dict[Tensor, Cut]:
    """The parameters that Muon takes, and how each falls into matrices."""
    parts: dict[Tensor, Cut] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            parts |= {module.qkv.weight: lambda w: w.chunk(3), module.out.weight: lambda w: (w,)}
        elif isinstance(module, PaddedExperts):
            parts |= {module.w1: lambda w: w.unbind(), module.w2: lambda w: w.unbind()}
        elif isinstance(module, Experts):
            ups = [w for w in (module.w1, module.w3) if w is not None]
            parts |= {w: lambda w, layout=module.layout: layout.split(w, dim=1) for w in ups}
            parts[module.w2] = lambda w, layout=module.layout: layout.split(w, dim=0)
        elif isinstance(module, DenseMLP):
            parts |= {w: lambda w: (w,) for w in module.parameters()}
    return parts


def optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for matrices and AdamW for the rest. Weights decay, embeddings and gains do not."""
    by_muon = matrices(model) if config.optimizer == "muon" else {}
    rest = [p for p in model.parameters() if p not in by_muon]
    still = {p for p in rest if p.dim() == 1 or p is model.embedding.weight}
    groups = [
        {"params": [p for p in rest if p not in still]},
        {"params": [p for p in rest if p in still], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    fused = next(model.parameters()).is_cuda
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused, **options)]
    return [*made, Muon(by_muon, **options)] if by_muon else made
