"""What only a GPU can show: no host synchronisation, streams, a second device, addresses past 2^31, no recompiling."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import bench_host
import pytest
import torch
from cases import CASES
from timing import launches

from operators import BACKENDS, inputs_for
from triton_moe import ExpertLayout, GroupLimit, MoEConfig, MoEMLP, moe_mlp
from triton_moe.testing import Case, Inputs, run

pytestmark = pytest.mark.gpu
# `set_sync_debug_mode` says of itself that it is a prototype.
USES_SYNC_DEBUG = pytest.mark.filterwarnings("ignore:Synchronization debug mode")
CASE = Case(100, 64, (64, 24, 0, 128), 2, "swiglu", reason="the usual")


def each_tensor(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    changed: dict[str, Any] = {name: change(value) for name, value in vars(inputs).items() if torch.is_tensor(value)}
    return dataclasses.replace(inputs, **changed)


@USES_SYNC_DEBUG
@pytest.mark.parametrize("changes", [{}, {"load_balance": "sequence"}, {"groups": GroupLimit(3, 2, 1)}], ids=str)
def test_nothing_waits_for_the_device(changes: dict) -> None:
    """Forward and backward of the layer, its router and its losses included, copy nothing back."""
    layer = MoEMLP(MoEConfig([(4, 64), (2, 24)], 2, 64, **changes), device="cuda", dtype=torch.bfloat16)
    x = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        out, aux, _ = layer(x)
        (out.float().sum() + aux["router_z_loss"] + aux["load_balance_loss"] + aux["compute_loss"]).backward()

    step()  # the first call copies the layout's tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@USES_SYNC_DEBUG
def test_the_debug_mode_would_tell() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_stream(backend: str) -> None:
    inputs = inputs_for(CASE, torch.bfloat16, "cuda")
    expected = run(moe_mlp, inputs, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work that the default stream does not wait for
        actual = run(moe_mlp, each_tensor(inputs, torch.clone), backend=backend)
    stream.synchronize()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_device(backend: str) -> None:
    inputs = inputs_for(CASE, torch.bfloat16, "cuda:0")
    expected = run(moe_mlp, inputs, backend=backend)
    actual = run(moe_mlp, each_tensor(inputs, lambda tensor: tensor.to("cuda:1")), backend=backend)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(actual[name].cpu(), expected[name].cpu()) for name in expected)


def num_compiled() -> dict[str, int]:
    """How often each of our kernels was compiled in this process."""
    from triton.runtime.jit import JITFunction

    import triton_moe.kernels as package

    modules = [
        importlib.import_module(found.name) for found in pkgutil.walk_packages(package.__path__, "triton_moe.kernels.")
    ]
    kernels = {
        name: value for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)
    }
    return {name: sum(len(caches[0]) for caches in kernel.device_caches.values()) for name, kernel in kernels.items()}


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_batch_size_compiles_nothing(backend: str, dynamic: bool | None) -> None:
    """Of our kernels, in eager calls (None) and in a graph; one that is not dynamic is traced for each size."""
    torch.compiler.reset()
    config = MoEConfig([(1, 64), (1, 24), (1, 128)], 2, 64, activation="swiglu", backend=backend)
    layer = MoEMLP(config, device="cuda", dtype=torch.bfloat16)
    call = layer if dynamic is None else torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")

    def step(num_tokens: int) -> None:
        x = torch.randn(num_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out, aux, _ = call(x)
        (out.float().sum() + aux["router_z_loss"] + aux["load_balance_loss"] + aux["compute_loss"]).backward()

    step(100)
    before = num_compiled()
    products = {f"grouped_gemm_{name}_kernel" for name in ("up_fwd", "down_fwd", "dh", "dw")}
    if backend == "hopper":
        products = {f"grouped_gemm_{name}_hopper_kernel" for name in ("up", "down", "dh", "dw")}
    of_routing = {
        f"{name}_kernel" for name in ("router_fwd", "router_finish", "router_bwd", "route_count", "route_place")
    }
    assert products | of_routing | {"scatter_fwd_kernel", "sum_partials_kernel"} <= {
        name for name in before if before[name]
    }
    with torch._dynamo.config.patch(recompile_limit=16):
        for num_tokens in (1, 2, 8, 16, 17, 64, 333, 4096, 40_001):
            step(num_tokens)
    assert num_compiled() == before


@pytest.mark.parametrize("name", bench_host.DEFAULT_CASES)
def test_launches(name: str) -> None:
    """Of the layer with its three losses, copies and memsets among them."""
    forward, step = bench_host.calls_of(CASES[name], torch.bfloat16, torch.device("cuda"))
    assert launches(forward).count <= 10
    assert launches(step).count <= 24


def test_weights_on_the_cpu_are_refused() -> None:
    layer = MoEMLP(MoEConfig([(2, 16)], 1, 64), device="cuda")
    layer.w2 = torch.nn.Parameter(layer.w2.detach().cpu())
    with pytest.raises(ValueError, match=r"^w2: expected torch\.float32 on cuda:0 as x, got torch\.float32 on cpu"):
        layer(torch.randn(9, 64, device="cuda"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_past_int32(backend: str) -> None:
    """R * H and the ragged buffers exceed 2^31 elements: tokens at both ends are compared with small calls, the last
    expert's weights with a call of its own."""
    num_tokens, hidden_size, width, top_k = 140_000, 4096, 4096, 4
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    layout = ExpertLayout((width,) * 4)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (
            torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator).mul_(scale).requires_grad_()
        )

    x = normal(num_tokens, hidden_size)
    w1 = normal(hidden_size, layout.total_width, scale=hidden_size**-0.5)
    w2 = normal(layout.total_width, hidden_size, scale=width**-0.5)
    ids = torch.arange(top_k, device="cuda", dtype=torch.int32).expand(num_tokens, top_k)
    weights = torch.rand(num_tokens, top_k, device="cuda", generator=generator).requires_grad_()
    assert num_tokens * top_k * hidden_size > 2**31
    assert num_tokens * top_k * width > 2**31
    out = moe_mlp(x, weights, ids, w1, w2, layout=layout, backend=backend)
    dout = torch.ones_like(out)
    dx, dweights, dw1, dw2 = torch.autograd.grad(out, (x, weights, w1, w2), dout)
    for part in (slice(0, 200), slice(num_tokens - 200, num_tokens)):
        few, few_weights = x[part].detach().requires_grad_(), weights[part].detach().requires_grad_()
        small = moe_mlp(few, few_weights, ids[part], w1, w2, layout=layout, backend=backend)
        small_dx, small_dweights = torch.autograd.grad(small, (few, few_weights), dout[part])
        assert torch.equal(out[part], small)
        assert torch.equal(dx[part], small_dx)
        assert torch.equal(dweights[part], small_dweights)
    del out, dx
    alone = moe_mlp(x, weights[:, -1:], ids[:, -1:], w1, w2, layout=layout, backend=backend)
    last, (alone_dw1, alone_dw2) = layout.columns(top_k - 1), torch.autograd.grad(alone, (w1, w2), dout)
    assert dw1[:, last].any()
    assert torch.equal(dw1[:, last], alone_dw1[:, last])
    assert torch.equal(dw2[last], alone_dw2[last])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aux_losses", [False, True])
@pytest.mark.parametrize(("activation", "parts"), [("swiglu", 2), ("relu_squared", 1)])
@pytest.mark.parametrize(
    ("activation_memory", "sizes"), [("bounded", [(64, 64)]), ("exact", [(32, 64), (16, 128), (16, 192)])]
)
def test_saved_for_backward(
    activation_memory: str, sizes: list[tuple[int, int]], activation: str, parts: int, aux_losses: bool, backend: str
) -> None:
    """x, the pre-activation, the routing weights and integers: 2TH + 2 parts * sum of n_e I_e bytes within 5%, and 20
    bytes a row; the router's logits would be an eighth."""
    T, H, K = 4096, 512, 4
    options = {"activation_memory": activation_memory, "activation": activation, "backend": backend}
    config = MoEConfig(sizes, K, H, aux_losses=aux_losses, **options)  # type: ignore[arg-type]
    layer = MoEMLP(config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _, f = layer(x)
    for parameter in layer.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    rows = (f * T * K).round().tolist()
    pre = parts * sum(n * width for n, width in zip(rows, layer.layout.widths, strict=True))
    assert sum(saved.values()) <= 1.05 * 2 * (T * H + pre) + 20 * T * K
    out.sum().backward()
