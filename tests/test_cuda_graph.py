"""CUDA graphs: captured once, replayed with new tokens that go to other experts."""

from collections.abc import Callable, Sequence

import pytest
import torch
from timing import captured
from torch import Tensor
from torch._dynamo.utils import counters

from operators import BACKENDS
from triton_moe import GroupLimit, MoEConfig, MoEMLP

pytestmark = pytest.mark.gpu

T, H = 300, 64
SIZES = [(4, 64), (2, 24), (1, 0)]
ROUTED_BY_PYTORCH = {"load_balance": "sequence"}, {"groups": GroupLimit(7, 7, 1)}, {"sizes": [(513, 8)]}
LOSSES = ("router_z_loss", "load_balance_loss", "compute_loss")


def make_layer(sizes: Sequence[tuple[int, int]] = SIZES, **changes: object) -> MoEMLP:
    torch.manual_seed(0)
    options = {"activation": "swiglu", **changes}
    config = MoEConfig(sizes, 2, H, **options)  # type: ignore[arg-type]
    return MoEMLP(config, device="cuda", dtype=torch.bfloat16)


def tokens(seed: int) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=torch.bfloat16)


def step(layer: Callable, x: Tensor, dout: Tensor) -> Tensor:
    """Into gradients that add up, unless they are None."""
    out, aux, _ = layer(x)
    one = torch.ones((), device="cuda")
    torch.autograd.backward((out, *(aux[name] for name in LOSSES)), (dout, one, one, one))
    return out.detach()


def clear(layer: MoEMLP, x: Tensor) -> None:
    layer.zero_grad()
    x.grad = None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, {"weights_scale": 2.5}, *ROUTED_BY_PYTORCH], ids=str)
def test_forward(changes: dict, backend: str) -> None:
    layer, x = make_layer(backend=backend, **changes), tokens(0)
    with torch.no_grad():
        graph, (out, aux, f) = captured(lambda: layer(x))
        for seed in (1, 2):
            x.copy_(tokens(seed))
            graph.replay()
            expected, expected_aux, expected_f = layer(tokens(seed))
            assert torch.equal(out, expected)
            assert torch.equal(f, expected_f)
            assert all(torch.equal(aux[name], expected_aux[name]) for name in aux)
    one, two = layer(tokens(1)), layer(tokens(2))
    assert not torch.equal(one[0], two[0])
    assert not torch.equal(one[2], two[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, *ROUTED_BY_PYTORCH], ids=str)
def test_forward_and_backward(changes: dict, backend: str) -> None:
    layer, x, dout = make_layer(backend=backend, **changes), tokens(0).requires_grad_(), tokens(100)

    def whole() -> Tensor:
        clear(layer, x)
        return step(layer, x, dout)

    graph, out = captured(whole)
    leaves = (x, *layer.parameters())
    grads = [leaf.grad for leaf in leaves]
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(tokens(seed))
        graph.replay()
        fresh = tokens(seed).requires_grad_()
        found = [grad.clone() for grad in grads if grad is not None]
        for leaf in leaves:
            leaf.grad = None
        expected = step(layer, fresh, dout)
        assert torch.equal(out, expected)
        for actual, leaf in zip(found, (fresh, *layer.parameters()), strict=True):
            assert leaf.grad is not None
            assert torch.equal(actual, leaf.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reduce_overhead(backend: str) -> None:
    """torch.compile's own graphs, the last of whose calls finds other weights in other memory."""
    torch.compiler.reset()
    counters.clear()
    sizes = [(3, 64), (2, 40)]  # a layout of its own: its tables are made inside
    config = MoEConfig(sizes, 2, H, activation="swiglu", backend=backend)
    layer, dout = MoEMLP(config, device="cuda", dtype=torch.bfloat16), tokens(100)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        if seed == 4:
            old = [weight.data for weight in layer.parameters()]  # nothing new gets its memory while it is held
            for weight in layer.parameters():
                weight.data = 2 * weight.data.roll(1, dims=0)
            assert not any(torch.equal(a, b) for a, b in zip(old, layer.parameters(), strict=True))
        results = []
        for call in (compiled, layer):
            torch.compiler.cudagraph_mark_step_begin()
            x = tokens(seed).requires_grad_()
            layer.zero_grad()
            out = step(call, x, dout).clone()
            results.append([out, *(leaf.grad.clone() for leaf in (x, *layer.parameters()))])  # type: ignore[union-attr]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_exact_memory_is_refused_while_capturing() -> None:
    layer, x = make_layer(activation_memory="exact"), tokens(0)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    message = "activation_memory: expected 'bounded' while a CUDA graph is captured"
    with pytest.raises(ValueError, match=message), torch.cuda.graph(graph):
        layer(x)
    torch.cuda.synchronize()


def test_a_new_layout_is_refused_while_capturing() -> None:
    """Its tables have to be copied to the device first."""
    make_layer()(tokens(0))
    other = MoEMLP(MoEConfig([(3, 40), (2, 24)], 2, H), device="cuda", dtype=torch.bfloat16)
    graph, x = torch.cuda.CUDAGraph(), tokens(0)
    message = "call the layer once before a CUDA graph is captured"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
        other(x)
    torch.cuda.synchronize()
    assert other(x)[0].isfinite().all()
