"""Whether a contestant is right, which it must be before it is timed.

Its output and every gradient, the router's included, are compared with the fp64 oracle on a few hundred tokens. Ours
are held to the error budget of the tests; the others may have four times the rms error of plain PyTorch in the same
dtype. Then, because kernels are chosen, graphs captured and code compiled for a number of tokens, the same on all of
the case's tokens beside plain PyTorch, expert by expert. Of a contestant that replays CUDA graphs it is a replay that
is judged, on other inputs than those it was captured with.
"""

from __future__ import annotations

import torch
from cases import BenchCase
from contestants import OURS
from layers import Layer, State, routed
from timing import captured
from torch import Tensor

from triton_moe import MoEMLP, reference
from triton_moe.layout import ExpertLayout
from triton_moe.router import router_logits, router_scores
from triton_moe.testing import assert_within_budget

GATE_TOKENS = 512
GATE_FACTOR = 4.0
FULL_SIZE_TOLERANCE = 0.02
"""Of the norm of a difference, over that of what plain PyTorch gives: an expert of garbage is off by 1."""


def initial_state(case: BenchCase, dtype: torch.dtype, device: torch.device) -> State:
    """The weights of a fresh layer, the same at every call."""
    torch.manual_seed(0)
    return MoEMLP(case.config, device=device, dtype=dtype).state_dict()


def tokens(case: BenchCase, dtype: torch.dtype, device: torch.device, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x, which requires a gradient, and the output's gradient: `(T, H)` each, standard normal, the same for a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.num_tokens, case.config.hidden_size)
    x, dout = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return x.requires_grad_(), dout


def clear(layer: Layer, x: Tensor) -> None:
    for leaf in (x, *layer.parameters):
        leaf.grad = None


def step(layer: Layer, x: Tensor, dout: Tensor) -> None:
    clear(layer, x)
    layer.forward(x).backward(dout)


def _eager_outcome(layer: Layer, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    clear(layer, x)
    out = layer.forward(x)
    out.backward(dout)
    assert x.grad is not None
    found = {"out": out.detach(), "dx": x.grad, **layer.gradients()}
    clear(layer, x)
    return found


def outcome(layer: Layer, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of one step."""
    if not layer.replayed:
        return _eager_outcome(layer, x, dout)
    held_x, held_dout = torch.randn_like(x).requires_grad_(), torch.randn_like(dout)
    graph, found = captured(lambda: _eager_outcome(layer, held_x, held_dout))
    with torch.no_grad():
        held_x.copy_(x)
        held_dout.copy_(dout)
    graph.replay()
    return {name: result.clone() for name, result in found.items()}


def oracle(case: BenchCase, state: State, x: Tensor, dout: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `outcome` should be, computed in `dtype`; the experts are those that x's own dtype chooses."""
    config = case.config
    names = [name for name in ("router.weight", "w1", "w2", "w3") if name in state]
    _, topk_ids = routed(x.detach(), state["router.weight"], config)
    leaves = {name: state[name].to(dtype, copy=True).requires_grad_() for name in names}
    x = x.detach().to(dtype, copy=True).requires_grad_()
    scores = router_scores(router_logits(x, leaves["router.weight"]), config.router).gather(1, topk_ids.long())
    topk_weights = (scores / (scores.sum(1, keepdim=True) + 1e-20)).to(dtype)
    out = reference.moe_mlp(
        x, topk_weights, topk_ids, leaves["w1"], leaves["w2"], leaves.get("w3"),
        layout=case.config.layout, activation=config.activation,
    )  # fmt: skip
    grads = torch.autograd.grad(out, (x, *leaves.values()), dout.to(dtype))
    return {"out": out.detach(), **dict(zip(("dx", *(f"d{name.split('.')[0]}" for name in names)), grads, strict=True))}


def parts(results: dict[str, Tensor], layout: ExpertLayout) -> dict[str, Tensor]:
    """The tensors to compare: the weights' gradients expert by expert, whose scales differ with their widths."""
    whole = {name: results[name] for name in ("out", "dx", "drouter")}
    for name in results.keys() - whole.keys():
        packed = results[name].t() if name == "dw2" else results[name]
        whole |= {f"{name} of expert {e}": packed[:, layout.columns(e)] for e in range(layout.num_experts)}
    return whole


def _distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm())


class Gate:
    """What one case should give, and whether a contestant agrees with it."""

    def __init__(self, case: BenchCase, state: State, x: Tensor, dout: Tensor) -> None:
        self.layout = case.config.layout
        self.x, self.dout = x.detach()[:GATE_TOKENS].requires_grad_(), dout[:GATE_TOKENS]
        self.whole = oracle(case, state, self.x, self.dout, torch.float64)
        self.truth = parts(self.whole, self.layout)
        self.plain = parts(oracle(case, state, self.x, self.dout, x.dtype), self.layout)
        self.all_x, self.all_dout = x, dout
        self.all_plain = parts(oracle(case, state, x, dout, x.dtype), self.layout) if len(x) > len(self.x) else None

    def fault(self, contestant: str, layer: Layer) -> str | None:
        """What is wrong with a contestant, None if nothing is."""
        if layer.another_function:
            outcome(layer, self.all_x, self.all_dout)
            return None
        found = outcome(layer, self.x, self.dout)
        if found.keys() != self.whole.keys():
            return f"expected the results {', '.join(self.whole)}, got {', '.join(found)}"
        actual = parts(found, self.layout)
        fault = self._over_budget(contestant, actual) if contestant in OURS else self._far_from_truth(actual)
        if fault or self.all_plain is None:
            return fault
        actual = parts(outcome(layer, self.all_x, self.all_dout), self.layout)
        for name, plain in self.all_plain.items():
            off, size = _distance(actual[name], plain), float(plain.double().norm())
            if not off <= FULL_SIZE_TOLERANCE * size:
                return f"on all {len(self.all_x)} tokens {name} is {off:.3g} off plain PyTorch's {size:.3g} (norms)"
        return None

    def _over_budget(self, contestant: str, actual: dict[str, Tensor]) -> str | None:
        try:
            assert_within_budget(actual, self.truth, self.plain, eps_dtype=self.x.dtype, name=contestant)
        except AssertionError as error:
            return str(error)
        return None

    def _far_from_truth(self, actual: dict[str, Tensor]) -> str | None:
        for name, truth in self.truth.items():
            error, plain = _distance(actual[name], truth), _distance(self.plain[name], truth)
            if not error <= GATE_FACTOR * plain:
                return f"the error of {name} is {error:.3g}, and plain PyTorch's {plain:.3g} (norms)"
        return None
