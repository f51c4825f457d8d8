"""What only a GPU can show: no host synchronisation, streams, a second device, addresses past 2^31, no recompiling."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from operators import has_hopper, inputs_for
from triton_moe import ExpertLayout, MoEConfig, MoEMLP, moe_mlp
from triton_moe.testing import Case, Inputs, run

pytestmark = pytest.mark.gpu
# `set_sync_debug_mode` says of itself that it is a prototype.
USES_SYNC_DEBUG = pytest.mark.filterwarnings("ignore:Synchronization debug mode")
CASE = Case(100, 64, (64, 24, 0, 128), 2, "swiglu", reason="the usual")


def each_tensor(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    changed: dict[str, Any] = {name: change(value) for name, value in vars(inputs).items() if torch.is_tensor(value)}
    return dataclasses.replace(inputs, **changed)


@USES_SYNC_DEBUG
def test_nothing_waits_for_the_device() -> None:
    """Forward and backward of the layer, its router and its losses included, copy nothing back."""
    layer = MoEMLP(MoEConfig([(4, 64), (2, 24)], 2, 64), device="cuda", dtype=torch.bfloat16)
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


def test_another_stream() -> None:
    inputs = inputs_for(CASE, torch.bfloat16, "cuda")
    expected = run(moe_mlp, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work that the default stream does not wait for
        actual = run(moe_mlp, each_tensor(inputs, torch.clone))
    stream.synchronize()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device() -> None:
    inputs = inputs_for(CASE, torch.bfloat16, "cuda:0")
    expected = run(moe_mlp, inputs)
    actual = run(moe_mlp, each_tensor(inputs, lambda tensor: tensor.to("cuda:1")))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(actual[name].cpu(), expected[name].cpu()) for name in expected)


def test_a_new_batch_size_compiles_nothing() -> None:
    from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd_kernel, grouped_gemm_up_fwd_kernel
    from triton_moe.kernels.grouped_gemm_bwd import grouped_gemm_dh_kernel, grouped_gemm_dw_kernel, sum_partials_kernel
    from triton_moe.kernels.route import route_count_kernel, route_place_kernel
    from triton_moe.kernels.scatter import scatter_fwd_kernel

    kernels = (
        route_count_kernel, route_place_kernel, grouped_gemm_up_fwd_kernel, grouped_gemm_down_fwd_kernel,
        scatter_fwd_kernel, grouped_gemm_dh_kernel, grouped_gemm_dw_kernel, sum_partials_kernel,
    )  # fmt: skip

    def compiled() -> list[int]:
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    def step(num_tokens: int) -> None:
        run(
            moe_mlp,
            inputs_for(Case(num_tokens, 64, (64, 24, 128), 2, "swiglu", reason="batch"), torch.bfloat16, "cuda"),
        )

    step(100)
    before = compiled()
    assert all(before)
    for num_tokens in (1, 2, 8, 16, 17, 64, 333, 4096, 40_001):
        step(num_tokens)
    assert compiled() == before


@pytest.mark.parametrize(
    "backend",
    ["triton", *(["hopper"] if has_hopper() else [])],
)
def test_addresses_past_int32(backend: str) -> None:
    """R * H and the ragged buffers exceed 2^31 elements; tokens at both ends are compared with small calls."""
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
    dx, dweights = torch.autograd.grad(out, (x, weights), dout)
    for part in (slice(0, 200), slice(num_tokens - 200, num_tokens)):
        few, few_weights = x[part].detach().requires_grad_(), weights[part].detach().requires_grad_()
        small = moe_mlp(few, few_weights, ids[part], w1, w2, layout=layout, backend=backend)
        small_dx, small_dweights = torch.autograd.grad(small, (few, few_weights), dout[part])
        assert torch.equal(out[part], small)
        assert torch.equal(dx[part], small_dx)
        assert torch.equal(dweights[part], small_dweights)


def test_saved_for_backward() -> None:
    """x, the pre-activation, the routing weights and integers: 2TH + 4 R I bytes of a SwiGLU layer, within 5%, and 20
    bytes a row; the router's logits would be an eighth."""
    num_tokens, hidden_size, width, num_experts, top_k = 4096, 512, 64, 64, 4
    layer = MoEMLP(
        MoEConfig([(num_experts, width)], top_k, hidden_size, activation="swiglu", aux_losses=False),
        device="cuda", dtype=torch.bfloat16,
    )  # fmt: skip
    x = torch.randn(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _, _ = layer(x)
    for parameter in layer.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    rows = num_tokens * top_k
    assert sum(saved.values()) <= 1.05 * (2 * num_tokens * hidden_size + 4 * rows * width) + 20 * rows
    out.sum().backward()
