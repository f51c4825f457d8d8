"""A GPT of nanochat's size whose MLPs are mixtures of experts, and what one token of it costs.

Letters: `B` sequences, `L` tokens a sequence, `H` hidden size, `D` size of a head, `V` vocabulary, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_moe import MoEConfig, MoEMLP
from triton_moe.activations import is_gated
from triton_moe.experts import DenseMLP

ROTARY_BASE = 10_000.0
AUXILIARY = ("load_balance_loss", "router_z_loss", "compute_loss")
MoE = Callable[[MoEConfig], nn.Module]
"""Builds a layer `x (B, L, H) -> (out, aux, f (E))`, as `MoEMLP` is one."""


@dataclass(frozen=True)
class GPTConfig:
    moe: MoEConfig
    """Of the MoE blocks; its hidden size is the model's."""
    num_layers: int
    num_heads: int
    vocabulary: int
    context: int
    """The most tokens of a sequence."""
    moe_every: int = 1
    """1: each block is an MoE block; 2: every other, from the second on. The rest have a dense MLP of its FLOPs."""

    def is_moe(self, block: int) -> bool:
        return (block + 1) % self.moe_every == 0

    @property
    def active_width(self) -> int:
        """Of the K experts a token goes to, if all are chosen equally often."""
        return round(self.moe.num_active_experts * self.moe.layout.total_width / self.moe.layout.num_experts)


class GPTOutput(NamedTuple):
    loss: Tensor
    """() nats a token"""
    load_balance_loss: Tensor
    """() mean over the MoE blocks, as the next two"""
    router_z_loss: Tensor
    compute_loss: Tensor
    usage: Tensor
    """(MoE blocks, E) the fraction of each one's slots that went to each expert"""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864, eq. 34): `x (B, heads, L, D)`, angles `(L, D / 2)` -> the same in fp32."""
    one, other = x.float().unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


class Attention(nn.Module):
    """Causal, with normalised queries and keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        H, self.num_heads = config.moe.hidden_size, config.num_heads
        self.qkv, self.out = nn.Linear(H, 3 * H, bias=False), nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
        q, k = (rotate(F.rms_norm(part, part.shape[-1:]), cos, sin).to(v.dtype) for part in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP, each on the normalised residual stream."""

    def __init__(self, config: GPTConfig, mlp: nn.Module) -> None:
        super().__init__()
        H = config.moe.hidden_size
        self.attention_norm, self.mlp_norm = nn.RMSNorm(H), nn.RMSNorm(H)
        self.attention = Attention(config)
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns x's successor and, of an MoE block, its `AUXILIARY` losses and its usage."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        if isinstance(self.mlp, DenseMLP):
            return x + self.mlp(self.mlp_norm(x)), ()
        out, aux, f = self.mlp(self.mlp_norm(x))
        return x + out, (*(aux[name] for name in AUXILIARY), f.float())


class Head(nn.Module):
    """The loss of the residual stream's end, in one piece, so that a compiler may keep the logits in 16 bits."""

    def __init__(self, hidden_size: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """`x (B, L, H)`, `targets (B, L)` -> () fp32."""
        return F.cross_entropy(self.linear(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class GPT(nn.Module):
    """`moe` builds the MoE layers."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, moe: MoE = MoEMLP) -> None:
        super().__init__()
        self.config = config
        H, experts = config.moe.hidden_size, config.moe
        self.embedding = nn.Embedding(config.vocabulary, H)
        self.blocks = nn.ModuleList(
            Block(config, moe(experts) if config.is_moe(i) else DenseMLP(H, config.active_width, experts.activation))
            for i in range(config.num_layers)
        )
        self.head = Head(H, config.vocabulary)
        half = H // config.num_heads // 2
        frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(config.context, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self._init_scales()

    @torch.no_grad()
    def _init_scales(self) -> None:
        """The residual stream starts at unit scale, and what is added to it is small, as it sums over the layers."""
        nn.init.normal_(self.head.linear.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.zeros_(module.out.weight)
            elif isinstance(module, (MoEMLP, DenseMLP)):
                module.w2.mul_((2 * self.config.num_layers) ** -0.5)

    def forward(self, tokens: Tensor, targets: Tensor) -> GPTOutput:
        """`tokens (B, L)` and the ones that follow them, `targets (B, L)`: integers, L <= context."""
        length = tokens.shape[1]
        x, of_moe = self.embedding(tokens), []
        for block in self.blocks:
            x, of_block = block(x, self.cos[:length], self.sin[:length])
            of_moe += [of_block] if of_block else []
        *auxiliary, usage = (torch.stack(values) for values in zip(*of_moe, strict=True))
        return GPTOutput._make((self.head(x, targets), *(values.mean() for values in auxiliary), usage))


def active_parameters(config: GPTConfig, usage: Tensor | None = None) -> int:
    """Weights that one token is multiplied with, the head's included, not the embedding's.

    `usage (MoE blocks, E)` says how often each expert is chosen; without it all are, equally often.
    """
    H, layout = config.moe.hidden_size, config.moe.layout
    matrices = 3 if is_gated(config.moe.activation) else 2
    num_moe = config.num_layers // config.moe_every
    if usage is None:
        usage = torch.full((num_moe, layout.num_experts), 1 / layout.num_experts)
    widths = usage.double().cpu() @ torch.tensor(layout.widths, dtype=torch.float64)
    width = config.moe.num_active_experts * float(widths.sum()) + (config.num_layers - num_moe) * config.active_width
    routers = num_moe * layout.num_experts * H
    return config.num_layers * 4 * H * H + round(matrices * H * width) + routers + config.vocabulary * H


def flops_per_token(config: GPTConfig, usage: Tensor | None = None) -> float:
    """Of a training step: 6 an active parameter, and attention's `6 L H` a layer (causal: half of the square)."""
    attention = 6 * config.num_layers * config.context * config.moe.hidden_size
    return 6.0 * active_parameters(config, usage) + attention
