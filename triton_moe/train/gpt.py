"""A byte-level GPT whose MLPs are variable-width MoE layers.

Letters: `B` sequences, `L` bytes a sequence, `H` hidden size, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_moe.moe import MoEConfig, MoEMLP
from triton_moe.train.config import TrainConfig
from triton_moe.train.data import VOCABULARY

MLPFactory = Callable[[MoEConfig], MoEMLP]
_ROTARY_BASE = 10_000.0


class GPTOutput(NamedTuple):
    logits: Tensor
    """(B, L, 256) fp32"""
    load_balance_loss: Tensor
    """() mean over the layers"""
    router_z_loss: Tensor
    """() likewise"""
    usage: Tensor
    """(layers, E) fp32: the fraction of each layer's routed slots that went to each expert"""


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34) of `x (B, heads, L, D)`, fp32 angles."""
    half = x.shape[-1] // 2
    frequency = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, L, H = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, H // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(_rotate(_norm(q)), _rotate(_norm(k)), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, L, H))


class Block(nn.Module):
    def __init__(self, config: TrainConfig, mlp: MLPFactory) -> None:
        super().__init__()
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.mlp = mlp(config.moe)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        x = x + self.attention(_norm(x))
        out, aux, f = self.mlp(_norm(x))
        return x + out, aux, f


class GPT(nn.Module):
    """Norms before attention and MLP and before the head, rotary positions, no biases. `mlp` builds the MoE layers."""

    def __init__(self, config: TrainConfig, mlp: MLPFactory = MoEMLP) -> None:
        super().__init__()
        self.context = config.context
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, mlp) for _ in range(config.num_layers))
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.zeros_(module.out.weight)
            elif isinstance(module, MoEMLP):
                module.w2.data.mul_((2 * config.num_layers) ** -0.5)  # the residual stream sums over the layers

    def forward(self, tokens: Tensor) -> GPTOutput:
        """`tokens (B, L)` integers in 0..255, L <= context."""
        if tokens.shape[1] > self.context:
            raise ValueError(f"tokens: expected at most {self.context} a sequence, got {tokens.shape[1]}")
        x = self.embedding(tokens)
        balance, z, usage = [], [], []
        for block in self.blocks:
            x, aux, f = block(x)
            balance.append(aux["load_balance_loss"])
            z.append(aux["router_z_loss"])
            usage.append(f.float())
        logits = self.head(_norm(x)).float()
        return GPTOutput(logits, torch.stack(balance).mean(), torch.stack(z).mean(), torch.stack(usage))

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """The prompt and `count` bytes after it, each drawn given the `context` before it."""
        if not prompt:
            raise ValueError("prompt: expected at least one byte, got none")
        device = self.embedding.weight.device
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(count):
            window = torch.tensor([text[-self.context :]], device=device)
            logits = self(window).logits[0, -1].cpu()
            text.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
        return bytes(text)
