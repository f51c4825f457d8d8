"""The layer as block-sparse MoE libraries compute it, in plain PyTorch, every stage of it open to view.

Each expert's rows are padded to a multiple of `block_size`, then gathered; the intermediate matrix is block-sparse (see
`topology_var.py`). Letters as in `triton_moe.layout`; `P` padded rows, `N` blocks, `b` block size.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import triton_moe
from reference import block_sparse
from reference.topology_var import Topology, check_blocks, historical_bits, variable_topology
from triton_moe.activations import GATE_ACTIVATION
from triton_moe.functional import matmul_dtype
from triton_moe.moe import AUX, MoEConfig
from triton_moe.router import choose_experts, route_tokens
from triton_moe.torch_backend import ACTIVATION

OURS_ALONE = ("bias", "load_balance", "balancing", "weights_scale", "groups", "shared_null_logit", "shared_width")
"""Options of `MoEConfig` of which the reference has the defaults alone."""


class PaddedRows(NamedTuple):
    """Where the slots' rows are, each expert's padded to a multiple of b."""

    slots: Tensor
    """(R) slots in expert order"""
    experts: Tensor
    """(R) the expert of each of them"""
    tokens_per_expert: Tensor
    """(E)"""
    block_rows: Tensor
    """(E) rows over b, rounded up"""
    row_to_token: Tensor
    """(P) the token of each padded row, T where it is padding"""
    slot_to_row: Tensor
    """(T, K)"""


def padded_rows(topk_ids: Tensor, num_experts: int, block_size: int) -> PaddedRows:
    """Sort the slots of `topk_ids (T, K)`, all in 0 <= id < E, by expert. P is read back to the host."""
    T, K = topk_ids.shape
    experts, slots = topk_ids.flatten().long().sort(stable=True)
    counts = torch.bincount(experts, minlength=num_experts)
    block_rows = (counts + block_size - 1) // block_size
    padding_before = F.pad((block_rows * block_size - counts).cumsum(0), (1, 0))
    rows = torch.arange(slots.numel(), device=slots.device) + padding_before[experts]
    row_to_token = slots.new_full((int(block_rows.sum()) * block_size,), T)
    row_to_token[rows] = slots // K
    slot_to_row = torch.empty_like(slots).scatter_(0, slots, rows).view(T, K)
    return PaddedRows(slots, experts, counts, block_rows, row_to_token, slot_to_row)


class MoEMLP(triton_moe.MoEMLP):
    """`triton_moe.MoEMLP`'s parameters, initialisation, state dict and results, computed on padded blocks.

    `historical=True` brings back an error that the baseline long had: the transposed topology is sorted by
    `ceil(log2(E))` bits of the block column. Outputs and the gradient of x are right, those of w1, w2 and w3 are not,
    once an expert is wider than a block (see docs/gradients.md).

    Raises ValueError if a width is no multiple of `config.block_size`, or for an option of `OURS_ALONE`.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        historical: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_blocks(config.layout, config.block_size)
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name in OURS_ALONE and value != field.default:
                raise ValueError(f"{field.name}: expected {field.default!r} for the reference, got {value!r}")
        super().__init__(config, device=device, dtype=dtype)
        self.sort_bits = historical_bits(self.layout.num_experts) if historical else None

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """As `triton_moe.MoEMLP.forward`, behind the same router."""
        config, tokens = self.config, self._tokens(x)
        routed = route_tokens(
            tokens,
            self.router.weight,
            layout=self.layout,
            num_active_experts=config.num_active_experts,
            router=config.router,
            normalize_weights=config.normalize_weights,
            aux_losses=config.aux_losses,
            backend=config.backend,
        )
        out = self.experts(tokens, routed.topk_weights, routed.topk_ids)["output"]
        return out.view(x.shape), {name: getattr(routed, name) for name in AUX}, routed.f.to(x.dtype)

    def forward_with_intermediates(self, x: Tensor) -> dict[str, Tensor | Topology]:
        """Every stage of the forward pass of `x (..., H)` by its name, in order, each part of one autograd graph:

        router_logits `(T, E)` fp32, router_scores `(T, E)` fp32, top_k_weights `(T, K)`, selected_experts `(T, K)`,
        tokens_per_expert `(E)`, padded_tokens_per_expert `(E)`, topology, x_gathered `(P, H)`, x_after_up `(N, b, b)`
        (gated: x_after_gate, the product with w1, before it, and x_after_up is that with w3), x_after_activation
        `(N, b, b)`, x_after_down `(P, H)`, output, of x's shape. `expert_rows` and `expert_block` take an expert's part
        out of them.
        """
        config, tokens = self.config, self._tokens(x)
        choice = choose_experts(
            tokens,
            self.router.weight,
            num_active_experts=config.num_active_experts,
            router=config.router,
            normalize_weights=config.normalize_weights,
        )
        stages = self.experts(tokens, choice.topk_weights, choice.topk_ids)
        stages["output"] = stages["output"].view(x.shape)
        return {
            "router_logits": choice.logits,
            "router_scores": choice.probs,
            "top_k_weights": choice.topk_weights,
            "selected_experts": choice.topk_ids,
            **stages,
        }

    def experts(self, tokens: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> dict:
        """The stages behind the router, of `tokens (T, H)`."""
        rows = padded_rows(topk_ids, self.layout.num_experts, self.config.block_size)
        topology = self.topology(rows)
        gathered = self.gather(tokens, rows)
        products = self.up(gathered, topology)
        activated = self.activate(products)
        down = self.down(activated, topology)
        names = ("x_after_up",) if self.w3 is None else ("x_after_gate", "x_after_up")
        return {
            "tokens_per_expert": rows.tokens_per_expert,
            "padded_tokens_per_expert": rows.block_rows * self.config.block_size,
            "topology": topology,
            "x_gathered": gathered,
            **dict(zip(names, products, strict=True)),
            "x_after_activation": activated,
            "x_after_down": down,
            "output": self.scatter(down, topk_weights, rows),
        }

    def topology(self, rows: PaddedRows) -> Topology:
        return variable_topology(rows.block_rows, self.layout, self.config.block_size, self.sort_bits)

    def gather(self, x: Tensor, rows: PaddedRows) -> Tensor:
        """`(T, H)` -> `(P, H)`, zeros where a row is padding."""
        return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, rows.row_to_token)

    def up(self, gathered: Tensor, topology: Topology) -> list[Tensor]:
        """The products with w1 and, if gated, w3: `(N, b, b)` each."""
        weights = [self.w1] if self.w3 is None else [self.w1, self.w3]
        return [self.sdd(gathered, weight.to(gathered.dtype), topology) for weight in weights]

    def activate(self, products: list[Tensor]) -> Tensor:
        """`act(h)`, or `act(gate) * up`, of blocks."""
        name = self.config.activation
        first, *up = products
        act = ACTIVATION[GATE_ACTIVATION.get(name, name)]
        return act(first) * up[0] if up else act(first)

    def down(self, activated: Tensor, topology: Topology) -> Tensor:
        """`(N, b, b)` -> `(P, H)`"""
        return self.dsd(activated, self.w2.to(activated.dtype), topology)

    def scatter(self, down: Tensor, topk_weights: Tensor, rows: PaddedRows) -> Tensor:
        """`(P, H)` -> `(T, H)`, each token's rows weighted and summed."""
        T, K = rows.slot_to_row.shape
        chosen = down.index_select(0, rows.slot_to_row.flatten()).view(T, K, down.shape[1])
        return torch.bmm(topk_weights.to(down.dtype)[:, None], chosen).squeeze(1)

    def sdd(self, a: Tensor, b: Tensor, topology: Topology) -> Tensor:
        return block_sparse.sdd(a, b, topology)

    def dsd(self, blocks: Tensor, b: Tensor, topology: Topology) -> Tensor:
        return block_sparse.dsd(blocks, b, topology)

    def expert_rows(self, rows: Tensor, stages: dict, expert: int) -> Tensor:
        """An expert's `(n_e, M)` of a stage `(P, M)`, without padding. Reads two numbers back, as the next one does."""
        first = int(stages["padded_tokens_per_expert"][:expert].sum())
        return rows[first : first + int(stages["tokens_per_expert"][expert])]

    def expert_block(self, blocks: Tensor, stages: dict, expert: int) -> Tensor:
        """An expert's `(n_e, I_e)` of a stage `(N, b, b)`, without padding."""
        b, topology = self.config.block_size, stages["topology"]
        padded = stages["padded_tokens_per_expert"]
        first, down = int(padded[:expert].sum()) // b, int(padded[expert]) // b
        across = self.layout.widths[expert] // b
        start = int(topology.offsets[first])
        own = blocks[start : start + down * across].view(down, across, b, b)
        return own.transpose(1, 2).reshape(down * b, across * b)[: int(stages["tokens_per_expert"][expert])]

    def _tokens(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return x.reshape(-1, self.config.hidden_size).to(matmul_dtype(x))
