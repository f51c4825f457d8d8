"""A byte-level GPT whose MLPs are variable-width MoE layers, and what it writes.

Letters: `B` sequences, `L` bytes a sequence, `H` hidden size, `E` experts, `D` size of an attention head.
"""

from __future__ import annotations

import math
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


def _rotate(x: Tensor, start: int = 0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34) of `x (B, heads, L, D)`, whose positions
    count from `start`; fp32 angles."""
    half = x.shape[-1] // 2
    frequency = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Past:
    """Keys and values of the positions that one layer's attention has seen, at most `context` of them."""

    def __init__(self, context: int) -> None:
        self.context, self.length = context, 0
        self._buffers: tuple[Tensor, ...] = ()

    def extend(self, *keys_and_values: Tensor) -> list[Tensor]:
        """Those of the next L positions, `(B, heads, L, D)` each -> those of all so far."""
        if not self._buffers:
            self._buffers = tuple(t.new_empty(*t.shape[:2], self.context, t.shape[3]) for t in keys_and_values)
        first, self.length = self.length, self.length + keys_and_values[0].shape[2]
        for buffer, new in zip(self._buffers, keys_and_values, strict=True):
            buffer[:, :, first : self.length] = new
        return [buffer[:, :, : self.length] for buffer in self._buffers]


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        B, L, H = x.shape
        start, seen = 0 if past is None else past.length, None
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, H // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = _rotate(_norm(q), start), _rotate(_norm(k), start)
        if past is not None:
            k, v = past.extend(k, v)
            seen = torch.ones(L, start + L, dtype=torch.bool, device=x.device).tril(start)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=past is None)
        return self.out(y.transpose(1, 2).reshape(B, L, H))


class Block(nn.Module):
    def __init__(self, config: TrainConfig, mlp: MLPFactory) -> None:
        super().__init__()
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.mlp = mlp(config.moe)

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        x = x + self.attention(_norm(x), past)
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

    def new_cache(self) -> list[Past]:
        """What `forward` takes to go on with sequences; empty."""
        return [Past(self.context) for _ in self.blocks]

    def forward(self, tokens: Tensor, cache: list[Past] | None = None) -> GPTOutput:
        """`tokens (B, L)` integers in 0..255, L <= context.

        With a cache they follow the tokens it has seen, at most `context` in all, and it sees them too.
        """
        length = tokens.shape[1] + (cache[0].length if cache else 0)
        if length > self.context:
            raise ValueError(f"tokens: expected at most {self.context} a sequence, got {length}")
        x = self.embedding(tokens)
        balance, z, usage = [], [], []
        for i, block in enumerate(self.blocks):
            x, aux, f = block(x, cache[i] if cache else None)
            balance.append(aux["load_balance_loss"])
            z.append(aux["router_z_loss"])
            usage.append(f.float())
        logits = self.head(_norm(x)).float()
        return GPTOutput(logits, torch.stack(balance).mean(), torch.stack(z).mean(), torch.stack(usage))

    @torch.inference_mode()
    def generate(
        self, prompt: bytes, count: int, temperature: float = 0.8, seed: int = 0, top_k: int | None = None
    ) -> bytes:
        """The prompt and `count` bytes after it, each drawn from its `top_k` likeliest (from all by default), or, at
        temperature 0, the likeliest itself.

        The prompt's last `context` bytes are read at once, then a byte at a time. When the context is full, it goes on
        with its later half. Raises ValueError without a prompt, or on another temperature or top_k than can be.
        """
        if not prompt:
            raise ValueError("prompt: expected at least one byte, got none")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected 0 or more, got {temperature!r}")
        if top_k is not None and not 1 <= top_k <= VOCABULARY:
            raise ValueError(f"top_k: expected 1 to {VOCABULARY}, got {top_k!r}")
        generator, text = torch.Generator().manual_seed(seed), list(prompt)
        cache, unread = self.new_cache(), text[-self.context :]
        for _ in range(count):
            if cache[0].length == self.context:
                cache, unread = self.new_cache(), text[-max(1, self.context // 2) :]
            logits = self(torch.tensor([unread], device=self.embedding.weight.device), cache).logits[0, -1].cpu()
            unread = [_draw(logits, temperature, top_k, generator)]
            text += unread
        return bytes(text)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    likeliest, bytes_ = logits.topk(top_k or VOCABULARY)
    return int(bytes_[torch.multinomial((likeliest / temperature).softmax(-1), 1, generator=generator)])
