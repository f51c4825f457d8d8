"""The first users' layer, in plain PyTorch and from its description alone: none of the package is in it.

Letters as in `triton_moe.layout`. It is what a training code of theirs would hold, and so what ours must replace: the
same state dict, the same signature, the same numbers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FirstUserMoE(nn.Module):
    """Sigmoid router, weights packed over experts of several widths, three losses, SMEBU if it has a speed.

    In float64 everything is computed there: the truth of a comparison.
    """

    expert_bias: Tensor
    expert_bias_momentum: Tensor

    def __init__(
        self, sizes: Sequence[tuple[int, int]], top_k: int, hidden_size: int, activation: str, speed: float = 0.0,
        kappa: float = 2.0, beta: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.widths = [width for count, width in sizes for _ in range(count)]
        self.top_k, self.activation = top_k, activation
        self.speed, self.kappa, self.beta = speed, kappa, beta
        S = sum(self.widths)
        self.router = nn.Linear(hidden_size, len(self.widths), bias=False)
        self.w1 = nn.Parameter(torch.empty(hidden_size, S))
        self.w2 = nn.Parameter(torch.empty(S, hidden_size))
        if activation == "swiglu":
            self.w3 = nn.Parameter(torch.empty(hidden_size, S))
        if speed:
            self.register_buffer("expert_bias", torch.zeros(len(self.widths)))
            self.register_buffer("expert_bias_momentum", torch.zeros(len(self.widths)))
        self.init_params()

    @torch.no_grad()
    def init_params(self) -> None:
        for parameter in self.parameters():
            parameter.normal_(std=0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(tokens.to(wide), self.router.weight.to(wide))
        probs = logits.sigmoid()
        bias = self.expert_bias.clone() if self.speed else torch.zeros(len(self.widths), device=x.device)
        topk_ids = (probs + bias).topk(self.top_k, dim=-1).indices
        topk_weights = probs.gather(-1, topk_ids)
        topk_weights = (topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)).to(x.dtype)
        out = self._experts(tokens, topk_weights, topk_ids)
        f = torch.stack([(topk_ids == e).sum() for e in range(len(self.widths))]).to(wide) / topk_ids.numel()
        aux = {
            "router_z_loss": logits.logsumexp(-1).square().mean(),
            "load_balance_loss": self._load_balance_loss(f, probs.mean(0)),
            "compute_loss": (probs @ torch.tensor(self.widths).to(probs)).mean() / self._mean_width,
            "router_logits_abs_max": logits.detach().abs().max(),
            "router_logits_mean": logits.detach().mean(),
        }
        if self.speed:
            aux |= {"expert_bias_abs_max": bias.abs().max(), "expert_bias_abs_mean": bias.abs().mean()}
            aux["expert_bias_vector"] = bias
            if self.training:
                self._move_bias(f * topk_ids.numel())
        return out.view(x.shape), aux, f.to(x.dtype)

    @torch.no_grad()
    def _move_bias(self, n: Tensor) -> None:
        v = (n.mean() - n) / n.mean()
        d = self.speed * torch.tanh(self.kappa * v)
        d = d - d.mean()
        self.expert_bias_momentum.copy_(self.beta * self.expert_bias_momentum + (1 - self.beta) * d)
        self.expert_bias.add_(self.expert_bias_momentum)

    @property
    def _mean_width(self) -> float:
        return sum(self.widths) / len(self.widths)

    def _load_balance_loss(self, f: Tensor, p: Tensor) -> Tensor:
        if len(set(self.widths)) == 1:
            return len(self.widths) * (f * p).sum()
        classes = [[e for e, own in enumerate(self.widths) if own == width] for width in set(self.widths)]
        losses = [len(members) * (f[members] * p[members]).sum() for members in classes if len(members) > 1]
        return torch.stack(losses).mean() if losses else (f * p).sum()

    def _experts(self, tokens: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        out = torch.zeros_like(tokens, dtype=wide)
        first = 0
        for e, width in enumerate(self.widths):
            own = slice(first, first + width)
            first += width
            token, k = (topk_ids == e).nonzero(as_tuple=True)
            h = tokens[token] @ self.w1[:, own]
            a = F.silu(h) * (tokens[token] @ self.w3[:, own]) if self.activation == "swiglu" else F.relu(h).square()
            rows = topk_weights[token, k, None].to(wide) * (a @ self.w2[own]).to(wide)
            out = out.index_add(0, token, rows)
        return out.to(tokens.dtype)
