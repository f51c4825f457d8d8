"""The kernels of a training step, each by itself, on operands of a given shape: for timing and for tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from triton_moe.activations import is_gated
from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd, grouped_gemm_up_fwd
from triton_moe.kernels.grouped_gemm_bwd import grouped_gemm_dh, grouped_gemm_dw
from triton_moe.kernels.hopper import launch as hopper
from triton_moe.kernels.route import route, trimmed
from triton_moe.kernels.scatter import scatter_fwd
from triton_moe.layout import ExpertLayout, Routing

TOLERANCE = 0.02
"""Of the relative difference, in 16 bits, between two ways to the same product."""


@dataclass(frozen=True)
class Product:
    """One kernel with its operands."""

    call: Callable[[], object]
    filled: Callable[[], list[Tensor]]
    """What `call` filled, and it alone, as it is in memory."""
    gemms: int
    """How many of `2 T K H mean width` operations it stands for."""
    bytes: int
    """What it must at least read and write: each operand once."""
    read: Callable[[list[Tensor]], list[Tensor]] = list
    """The same as every backend would have it."""

    def result(self) -> list[Tensor]:
        return self.read(self.filled())


@dataclass(frozen=True)
class Shape:
    """What a layer multiplies: T tokens, H, the experts' layout, K experts a token."""

    num_tokens: int
    hidden_size: int
    layout: ExpertLayout
    top_k: int
    activation: str


def products(
    shape: Shape, backend: str, dtype: torch.dtype, device: torch.device,
    make_routing: Callable[[Tensor, ExpertLayout, bool], Routing] = route,
) -> dict[str, Product]:  # fmt: skip
    """up, down, dh, dw1 (and dw3), dw2, dx: the products of a training step; its sums over a token's rows; the routing.

    Rows are routed at random with equal shares; weights lie as `MoEMLP` has them; numbers are at unit scale.
    """
    layout, K, activation = shape.layout, shape.top_k, shape.activation
    T, H, S, gated = shape.num_tokens, shape.hidden_size, layout.total_width, is_gated(activation)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x, dout, w1, w2 = normal(T, H), normal(T, H), normal(H, S) / H**0.5, normal(S, H) / 16
    w3 = normal(H, S) / H**0.5 if gated else None
    ids = torch.rand(T, layout.num_experts, generator=generator, device=device).topk(K).indices.int()
    weights = torch.rand(T, K, generator=generator, device=device)
    panels = hopper.takes(T * K, layout, backend, w1)
    routing, parts = make_routing(ids, layout, panels), 2 if gated else 1
    rows = int(routing.read_ragged_numel())
    pre, act = normal(parts * rows), normal(rows)
    grouped_gemm_up_fwd(x, w1, w3, act, pre, routing, activation)  # for the zeros behind odd widths
    y, dx_rows = (x.new_zeros(T * K, H) for _ in range(2))
    kept_pre, kept_act, dpre = torch.zeros_like(pre), torch.zeros_like(act), torch.zeros_like(pre)
    dw1, dw2, dw3 = torch.zeros_like(w1), torch.zeros_like(w2), None if w3 is None else torch.zeros_like(w1)
    of_dh: list[Tensor] = []

    def dh() -> None:
        of_dh[:] = grouped_gemm_dh(dout, w2, pre, weights, routing, activation, dpre)

    of_up = [dw1] if dw3 is None else [dw1, dw3]
    up_t = None if w3 is None else w3.t()
    sums: dict[str, Tensor] = {}
    routed: list[Tensor] = [routing.packed]  # type: ignore[list-item]

    def scatter(name: str, of: Tensor | None) -> Callable[[], None]:
        return lambda: sums.update({name: scatter_fwd(y, of, routing)})

    def in_order(buffer: Tensor, parts: int) -> Tensor:
        """A ragged buffer's blocks, whatever their form, without what is between."""
        places = [(e, part) for e in range(layout.num_experts) for part in range(parts)]
        return torch.cat([routing.ragged_block(buffer, e, part, parts).flatten() for e, part in places])

    def route_again() -> None:
        routed[:] = [route(ids, layout, panels).packed]  # type: ignore[list-item]

    def of_route() -> list[Tensor]:
        again = trimmed(routed[0], ids, layout)
        return [again.counts, again.row_offsets]

    # elements: of tokens, rows, weights, the activation (its pre-activation has `parts` times as many)
    t, r, w, a = T * H, T * K * H, S * H, rows

    def product(
        call: Callable[[], object], filled: Callable[[], list[Tensor]], gemms: int, elements: int,
        read: Callable[[list[Tensor]], list[Tensor]] = list,
    ) -> Product:  # fmt: skip
        return Product(call, filled, gemms, elements * dtype.itemsize, read)

    return {
        "up": product(
            lambda: grouped_gemm_up_fwd(x, w1, w3, kept_act, kept_pre, routing, activation),
            lambda: [kept_act, kept_pre], parts, t + parts * w + (parts + 1) * a,
            lambda of: [in_order(of[0], 1), in_order(of[1], parts)],
        ),
        "down": product(lambda: grouped_gemm_down_fwd(act, w2, None, y, routing), lambda: [y], 1, a + w + r),
        "dh": product(
            dh, lambda: [*of_dh, dpre], 1, t + w + (2 * parts + 1) * a,
            lambda of: [in_order(of[0], 1), of[1], in_order(of[2], parts)],
        ),
        "dw2": product(lambda: grouped_gemm_dw(dout, act, (dw2.t(),), routing), lambda: [dw2], 1, t + a + w),
        "dw1": product(
            lambda: grouped_gemm_dw(x, pre, of_up, routing), lambda: of_up, parts, t + parts * (a + w)
        ),
        "dx": product(
            lambda: grouped_gemm_down_fwd(pre, w1.t(), up_t, dx_rows, routing), lambda: [dx_rows], parts,
            parts * (a + w) + r,
        ),
        "scatter": product(scatter("out", weights), lambda: [sums["out"]], 0, r + t),
        "scatter_dx": product(scatter("dx", None), lambda: [sums["dx"]], 0, r + t),
        "route": Product(route_again, of_route, 0, 4 * 3 * T * K),
    }  # fmt: skip


def disagreement(actual: Product, expected: Product) -> float:
    """Largest relative difference of what the two fill; NaN if there is one."""
    actual.call()
    expected.call()
    pairs = zip(actual.result(), expected.result(), strict=True)
    differences = [(a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9) for a, b in pairs]
    return torch.stack(differences).max().item()
