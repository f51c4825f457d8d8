"""The layer: a router, the packed weights of experts of any width, and the router's auxiliary losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from triton_moe.activations import is_gated
from triton_moe.balancing import BiasBalanced, BiasBalancing
from triton_moe.experts import DenseMLP, Experts
from triton_moe.functional import ACTIVATION_MEMORY, BACKENDS, check_choice, matmul_dtype, moe_layer, positive_int
from triton_moe.layout import ExpertLayout
from triton_moe.router import ROUTERS, GroupLimit, RouterOutput, expand_null_row, is_fused, route_tokens

LOAD_BALANCE = ("batch", "sequence")
"""What a load-balance loss is taken over: all tokens at once (`load_balance_loss`), or each sequence by itself, with
scores divided by their sum (`sequence_load_balance_loss`)."""


@dataclass(frozen=True)
class MoEConfig:
    """What a layer is. Raises ValueError, naming the argument, on anything that cannot be built.

    >>> config = MoEConfig([(4, 512), (4, 256)], num_active_experts=2, hidden_size=256)
    >>> config.layout.total_width
    3072
    """

    expert_sizes: Sequence[Sequence[int]]
    """`[(count, width), ...]`, experts in that order; kept as a tuple of tuples. Width 0: null experts."""
    num_active_experts: int
    """K, the experts each token goes to: 1 <= K <= E."""
    hidden_size: int = None  # type: ignore[assignment]  # n_embd may stand in
    """H. Never None once built."""
    block_size: int = 128
    """Of the block-sparse reference alone; the widths here need not be multiples of it."""
    activation: str = "relu_squared"
    """One of `triton_moe.activations.ACTIVATIONS`; a gated one gives the layer a third weight, w3."""
    bias: bool = False
    """Whether the experts have biases b1, b2 and, if gated, b3 (see `Experts`); the shared expert has none. Not to be
    confused with `balancing`'s, which is on the scores."""
    router: str = "sigmoid"
    """One of `triton_moe.router.ROUTERS`."""
    normalize_weights: bool = True
    """Whether a token's K weights are divided by their sum."""
    aux_losses: bool = True
    """Whether the auxiliary losses and the logits' statistics are computed; if not, zeros stand in their places."""
    backend: str = "auto"
    """One of `triton_moe.functional.BACKENDS`."""
    activation_memory: str = "bounded"
    """One of `triton_moe.functional.ACTIVATION_MEMORY`; see `moe_mlp`."""
    recompute: bool = False
    """Whether backward computes the pre-activation once more instead of keeping it."""
    load_balance: str = "batch"
    """One of `LOAD_BALANCE`; a sequence is L tokens of `x (..., L, H)`."""
    balancing: BiasBalancing | None = None
    """How a bias on the scores balances the experts (see `balancing.py`); None: there is no bias."""
    weights_scale: float = 1.0
    """Factor of a token's K weights, after they are divided by their sum."""
    groups: GroupLimit | None = None
    """Limits a token's choice to its best groups of experts."""
    shared_null_logit: bool = False
    """Whether all null experts have one logit: `router.weight` then has a row for each wider expert, in order, and a
    last one for them. A bias remains each expert's own."""
    shared_width: int = 0
    """Of one more expert, a `DenseMLP` named `shared` that every token goes through; 0: there is none."""
    n_embd: InitVar[int | None] = None
    """Another name for `hidden_size`, when building only: read `hidden_size`."""

    def __post_init__(self, n_embd: int | None) -> None:
        if isinstance(self.expert_sizes, Iterable):
            object.__setattr__(self, "expert_sizes", tuple(self.expert_sizes))
        num_experts = self.layout.num_experts
        for i, pair in enumerate(self.expert_sizes):
            if any(isinstance(number, bool) for number in pair):
                raise ValueError(f"expert_sizes[{i}]: expected a (count, width) pair of integers, got {pair!r}")
        object.__setattr__(self, "expert_sizes", tuple((int(count), int(width)) for count, width in self.expert_sizes))

        if self.hidden_size is None and n_embd is not None:
            object.__setattr__(self, "hidden_size", positive_int(n_embd, "n_embd"))
        counts = ("hidden_size", "num_active_experts", "block_size")
        for name in counts if self.shared_width == 0 else (*counts, "shared_width"):
            object.__setattr__(self, name, positive_int(getattr(self, name), name))
        if n_embd is not None and n_embd != self.hidden_size:
            raise ValueError(f"n_embd: expected hidden_size = {self.hidden_size} or nothing, got {n_embd!r}")

        if self.num_active_experts > num_experts:
            raise ValueError(f"num_active_experts: expected at most E = {num_experts}, got {self.num_active_experts}")
        is_gated(self.activation)
        check_choice(self.bias, "bias", (True, False))
        check_choice(self.router, "router", ROUTERS)
        check_choice(self.normalize_weights, "normalize_weights", (True, False))
        check_choice(self.aux_losses, "aux_losses", (True, False))
        check_choice(self.load_balance, "load_balance", LOAD_BALANCE)
        if self.balancing is not None and not isinstance(self.balancing, BiasBalancing):
            raise ValueError(f"balancing: expected a BiasBalancing or None, got {self.balancing!r}")
        if not isinstance(self.weights_scale, (int, float)) or not 0 < self.weights_scale < math.inf:
            raise ValueError(f"weights_scale: expected a number over 0, got {self.weights_scale!r}")
        if self.groups is not None:
            if not isinstance(self.groups, GroupLimit):
                raise ValueError(f"groups: expected a GroupLimit or None, got {self.groups!r}")
            self.groups.check(num_experts, self.num_active_experts)
        check_choice(self.shared_null_logit, "shared_null_logit", (True, False))
        if self.shared_null_logit and 0 not in self.layout.widths:
            raise ValueError("shared_null_logit: expected False without experts of width 0, got True")
        check_choice(self.backend, "backend", BACKENDS)
        check_choice(self.activation_memory, "activation_memory", ACTIVATION_MEMORY)
        check_choice(self.recompute, "recompute", (True, False))

    @cached_property
    def layout(self) -> ExpertLayout:
        return ExpertLayout.from_sizes(self.expert_sizes)


AUX = ("router_z_loss", "load_balance_loss", "compute_loss", "router_logits_abs_max", "router_logits_mean")
"""Keys of the second thing that a layer returns; with balancing `AUX_OF_BIAS` too."""
AUX_OF_BIAS = ("expert_bias_abs_max", "expert_bias_abs_mean", "expert_bias_vector")


def _sequence_length(x: Tensor) -> int:
    return max(x.shape[-2], 1) if x.dim() > 1 else 1


class RouterLinear(nn.Linear):
    """`nn.Linear` with weights of a normal distribution of std 1 / sqrt(fan-in)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class MoEMLP(Experts, BiasBalanced):
    """A mixture-of-experts MLP whose experts may have any width.

    Parameters, all 2-D, each with a gradient at every step: `router.weight (E, H)`; `w1 (H, S)`; `w2 (S, H)`; for gated
    activations only `w3 (H, S)`, w1 being the gate. Expert e owns the columns `layout.columns(e)` of w1 and w3 and the
    same rows of w2. Nothing else is in the state dict, but with biases `b1 (S)`, `b2 (E, H)` and, if gated, `b3 (S)`,
    with balancing the buffers `expert_bias` and `expert_bias_momentum`, `(E)` fp32, and with a shared expert its
    weights, `shared.w1` and so on. With `shared_null_logit` and N null experts `router.weight` is `(E - N + 1, H)`: a
    row for each other expert, in order, then that of the null ones.

    On the kernels the output and the losses are one node of autograd's graph: differentiate them together, as a
    training step does, or one after the other with `retain_graph=True`.

    A model built on the meta device becomes real by `to_empty`, then `reset_parameters()`, which is `init_params()` and
    `_init_buffers()`.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)
        if not isinstance(config, MoEConfig):
            raise ValueError(f"config: expected a MoEConfig, got {config!r}")
        self.config = config
        H, layout, activation, on = config.hidden_size, config.layout, config.activation, (device, dtype)
        rows = layout.num_experts - layout.widths.count(0) + 1 if config.shared_null_logit else layout.num_experts
        self.router = RouterLinear(H, rows, bias=False, device=device, dtype=dtype)
        options: dict[str, str | bool] = {
            name: getattr(config, name) for name in ("backend", "activation_memory", "recompute")
        }
        self._register_experts(layout, H, activation, config.bias, *on, options)
        width = config.shared_width
        self.shared = DenseMLP(H, width, activation, device=device, dtype=dtype) if width else None
        self._register_expert_bias(config.balancing, layout.num_experts, device)
        self._is_one_operator = (
            config.load_balance == "batch"
            and is_fused(layout, config.groups, None)
            and super().forward.__func__ is Experts.forward  # and not a subclass's own experts
        )
        self.init_params()

    @torch.no_grad()
    def init_params(self) -> None:
        """Draw every weight from a normal distribution of std 1 / sqrt(fan-in).

        The fan-in is H for the router, w1 and w3. For w2 it is the expert's own width, so that experts of all widths
        start with outputs of one scale.
        """
        self.router.reset_parameters()
        super().init_params()
        if self.shared is not None:
            self.shared.init_params()

    def reset_parameters(self) -> None:
        """Every weight and buffer as a new layer has them."""
        self.init_params()
        self._init_buffers()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:  # type: ignore[override]
        """`x (..., H)`, in the weights' dtype (under autocast in any) -> `(out, aux, f_i)`.

        Returns:
            out: x's shape and dtype, under autocast its dtype.
            aux: fp32 scalars, always these. Differentiable: `router_z_loss`, `load_balance_loss`, `compute_loss` (see
                `losses.py`). Detached: `router_logits_abs_max`, `router_logits_mean`. All are 0 without tokens. With
                balancing, detached: `expert_bias_abs_max`, `expert_bias_abs_mean` and `expert_bias_vector (E)`, of the
                bias that the experts were chosen by.
            f_i: `(E)` in x's dtype, the fraction of the T*K slots that went to each expert.

        Raises:
            ValueError: x has another last dimension, dtype or device than the weights.
        """
        self._check_input(x)
        config = self.config
        tokens, dtype = x if x.dim() == 2 else x.reshape(-1, config.hidden_size), matmul_dtype(x)
        if tokens.dtype != dtype:
            tokens = tokens.to(dtype)
        weight, bias = self.router.weight, self.choice_bias()
        if config.shared_null_logit:
            weight = expand_null_row(weight, self.layout)
        out, routed = self._route_and_run(tokens, weight, bias, _sequence_length(x))
        self.count_choices(routed.load, routed.topk_ids.numel())
        if self.shared is not None:
            out = out + self.shared(tokens)
        aux = {name: getattr(routed, name) for name in AUX}
        if bias is not None:
            size = bias.abs()
            aux |= zip(AUX_OF_BIAS, (size.amax(), size.mean(), bias.clone()), strict=True)
        f = routed.f if routed.f.dtype == x.dtype else routed.f.to(x.dtype)
        return out if x.dim() == 2 else out.view(x.shape), aux, f

    def _route_and_run(
        self, tokens: Tensor, router_weight: Tensor, bias: Tensor | None, sequence_length: int
    ) -> tuple[Tensor, RouterOutput]:
        """-> the routed experts' output `(T, H)`, and the routing."""
        config = self.config
        options: dict[str, Any] = {
            "layout": self.layout,
            "num_active_experts": config.num_active_experts,
            "router": config.router,
            "normalize_weights": config.normalize_weights,
            "weights_scale": config.weights_scale,
            "aux_losses": config.aux_losses,
        }
        if self._is_one_operator:
            both = moe_layer(tokens, router_weight, bias, *self._operands(), **options, **self._moe_mlp_options)
            if both is not None:
                return both[0], RouterOutput(*both[1:10])
        sequence = sequence_length if config.load_balance == "sequence" else None
        options |= {"groups": config.groups, "sequence_length": sequence, "backend": config.backend}
        routed = route_tokens(tokens, router_weight, bias, **options)
        return super().forward(tokens, routed.topk_weights, routed.topk_ids), routed

    def _check_input(self, x: Tensor) -> None:
        H, weight = self.config.hidden_size, self.w1
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != H:
            raise ValueError(f"x: expected shape (..., {H}), got {tuple(x.shape) if isinstance(x, Tensor) else x!r}")
        if weight is None:
            raise ValueError("w1: expected a tensor, got None")
        same = x.dtype == weight.dtype or matmul_dtype(x) == matmul_dtype(weight)
        if not same or x.device != weight.device:
            raise ValueError(
                f"x: expected {weight.dtype} on {weight.device} as the weights, got {x.dtype} on {x.device}"
            )

    def extra_repr(self) -> str:
        config = self.config
        experts = " + ".join(f"{count} x {width}" for count, width in config.expert_sizes)
        return (
            f"{experts}, num_active_experts={config.num_active_experts}, hidden_size={config.hidden_size}, "
            f"activation={config.activation}, router={config.router}"
        )
