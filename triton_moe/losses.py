"""The router's auxiliary losses: scalars in the dtype of their first argument, 0 when there are no tokens. Shapes other
than these raise ValueError.

The last two are linear in `p`, the mean over tokens of the router's scores. Either takes the scores `(T, E)`, or one
row `(E)` of them, which may be that mean: whoever needs both computes it once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_moe.constants import on_device
from triton_moe.layout import ExpertLayout


def router_z_loss(logits: Tensor) -> Tensor:
    """`mean_t(logsumexp_e(logits)^2)`, logits `(T, E)` (ST-MoE, arXiv:2202.08906, eq. 5)."""
    if logits.dim() != 2:
        raise ValueError(f"logits: expected (T, E), got shape {tuple(logits.shape)}")
    return logits.logsumexp(dim=-1).square().sum() / max(logits.shape[0], 1)


def load_balance_loss(probs: Tensor, f: Tensor, layout: ExpertLayout) -> Tensor:
    """How unevenly the experts are used: `E * sum_e(f_e p_e)` if all have one width (Switch, arXiv:2101.03961, eq. 4).

    Otherwise `n * sum_e(f_e p_e)` over each width class of n > 1 experts, averaged over these classes: experts compete
    with their like, and one without its like with nobody. If every class is a single expert, `sum_e(f_e p_e)`.
    f and p are those of the whole layer, not renormalised within a class.

    Args:
        probs: `(T, E)` or `(E)`, see above.
        f: `(E)`, the fraction of routed slots that chose expert e. No gradient reaches it.
    """
    _check_probs(probs, layout)
    if f.shape != (layout.num_experts,):
        raise ValueError(f"f: expected ({layout.num_experts},), got shape {tuple(f.shape)}")
    rivals = _table(layout.num_rivals, probs)
    num_classes = sum(len(experts) > 1 for experts in layout.width_classes.values())
    return (rivals * f.detach() * mean_over_tokens(probs)).sum() / max(num_classes, 1)


def sequence_load_balance_loss(probs: Tensor, topk_ids: Tensor, sequence_length: int, layout: ExpertLayout) -> Tensor:
    """`load_balance_loss` of each sequence by itself, averaged over them, of scores divided by a token's sum of them.

    So DeepSeek-V3 has it (arXiv:2412.19437, eq. 17 to 20), with f of the choice as made, bias and groups included. If
    all experts have one width, even loads pull at no score, not at sigmoids either; of these the loss of the whole
    batch is about E / 2 times as large.

    Args:
        probs: `(T, E)`, sequences of `sequence_length` tokens one after another.
        topk_ids: `(T, K)` integers, all of them experts.
    """
    _check_probs(probs, layout)
    if probs.dim() != 2 or topk_ids.dim() != 2 or topk_ids.shape[0] != probs.shape[0]:
        raise ValueError(f"topk_ids: expected (T, K) beside probs (T, E), got shape {tuple(topk_ids.shape)}")
    check_sequence_length(sequence_length, probs.shape[0])  # len() would make it a constant where it is traced
    probs = probs / (probs.sum(dim=-1, keepdim=True) + 1e-20)
    num_experts, num_sequences = layout.num_experts, probs.shape[0] // sequence_length
    ids = topk_ids.long().reshape(num_sequences, sequence_length * topk_ids.shape[1])
    counts = probs.new_zeros(num_sequences, num_experts).scatter_add_(1, ids, torch.ones_like(ids, dtype=probs.dtype))
    f = counts / max(ids.shape[1], 1)
    p = probs.view(num_sequences, sequence_length, num_experts).sum(1) / sequence_length
    return load_balance_loss((f * p).sum(0) / max(num_sequences, 1), probs.new_ones(num_experts), layout)


def compute_loss(probs: Tensor, layout: ExpertLayout) -> Tensor:
    """What the choice costs: `mean_t(probs @ widths / mean width)`, mean width `S / E`. 1 if all scores are `1 / E`."""
    _check_probs(probs, layout)
    return (_table(layout.widths, probs) * mean_over_tokens(probs)).sum() * (layout.num_experts / layout.total_width)


def mean_over_tokens(probs: Tensor) -> Tensor:
    """`(T, E)` -> `(E)`, zeros without tokens; a row `(E)` is its own mean."""
    return probs if probs.dim() == 1 else probs.sum(dim=0) / max(probs.shape[0], 1)


def check_sequence_length(sequence_length: int, num_tokens: int) -> None:
    """Raise ValueError unless the tokens are whole sequences of so many."""
    is_int = isinstance(sequence_length, (int, torch.SymInt)) and not isinstance(sequence_length, bool)
    if not is_int or sequence_length < 1 or num_tokens % sequence_length:
        raise ValueError(f"sequence_length: expected an int that divides T = {num_tokens}, got {sequence_length!r}")


def _check_probs(probs: Tensor, layout: ExpertLayout) -> None:
    if probs.dim() not in (1, 2) or probs.shape[-1] != layout.num_experts:
        expected = f"(T, {layout.num_experts}) or ({layout.num_experts},)"
        raise ValueError(f"probs: expected {expected}, got shape {tuple(probs.shape)}")


@functools.lru_cache(maxsize=256)
def _made_once(values: tuple[int, ...], device: torch.device) -> Tensor:
    return on_device([values], torch.int32, device)[0]


def _table(values: Sequence[int], like: Tensor) -> Tensor:
    """On the device of `like`; not copied there anew, which would wait for it and could not be captured. A graph that
    is traced makes its own."""
    if type(like) is not Tensor or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int32, device=like.device)
    return _made_once(tuple(values), like.device)
