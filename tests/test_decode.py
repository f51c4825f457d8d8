"""A few tokens without gradients, as in decoding: a routing of their own, tiles of 16 rows, only the chosen read."""

import functools
from typing import Any

import pytest
import torch
from test_route import assert_same_routing, assert_schedule_covers_rows
from torch import Tensor

from offline import compiled_by
from operators import inputs_for
from triton_moe import ExpertLayout, moe_mlp, reference
from triton_moe.activations import ACTIVATIONS
from triton_moe.layout import Routing
from triton_moe.testing import BIASES, CASES, Case, Inputs, assert_within_budget, poison_empty

pytest.importorskip("triton")

from triton_moe.kernels.decode import MAX_SLOTS, is_few, route_few
from triton_moe.kernels.route import trimmed
from triton_moe.ops import moe_mlp as operator

SHARED_MEMORY = {80: 163, 86: 99, 90: 227, 120: 99}  # KB a program may use (CUDA programming guide)
WIDE = ExpertLayout((64, 24, 0, 128, 8, 40, 16, 128))
DECODING = [case for case in CASES if case.num_tokens]


def decode(inputs: Inputs, **changes: object) -> Tensor:
    given = {name: getattr(inputs, name) for name in BIASES}
    arguments = {
        **{name: getattr(inputs, name) for name in ("x", "topk_weights", "topk_ids", "w1", "w2", "w3")},
        **given,
    }
    options = {"layout": inputs.layout, "activation": inputs.activation, "backend": "triton"}
    with torch.inference_mode(), poison_empty():
        return moe_mlp(**{**arguments, **options, **changes})  # type: ignore[arg-type]


def oracle(inputs: Inputs, dtype: torch.dtype | None = None) -> Tensor:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype or tensor.dtype)

    x, weights, *experts = (cast(getattr(inputs, name)) for name in ("x", "topk_weights", "w1", "w2", "w3"))
    biases = {name: cast(getattr(inputs, name)) for name in BIASES}
    operands: Any = (x, weights, inputs.topk_ids, *experts)
    return reference.moe_mlp(*operands, layout=inputs.layout, activation=inputs.activation, **biases)


def check(inputs: Inputs, **changes: object) -> None:
    truth, plain = oracle(inputs, torch.float64), oracle(inputs)
    assert_within_budget(decode(inputs, **changes), truth, plain, eps_dtype=inputs.x.dtype, name="decoded")


@pytest.fixture(autouse=True)
def routed_as_few(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slots each routing of few had."""
    seen: list[int] = []

    def spied(topk_ids: Tensor, layout: ExpertLayout):
        seen.append(topk_ids.numel())
        return route_few(topk_ids, layout)

    monkeypatch.setattr(operator, "route_few", spied)
    return seen


@pytest.mark.parametrize("case", DECODING, ids=lambda case: case.reason)
def test_cases(case: Case, device: str, dtype: torch.dtype, routed_as_few: list[int]) -> None:
    inputs = inputs_for(case, dtype, device)
    check(inputs)
    assert routed_as_few == [inputs.topk_ids.numel()] * is_few(inputs.topk_ids.numel(), inputs.layout)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 42])
@pytest.mark.parametrize("routing", ["random", "repeated", "one expert", "dropped"])
def test_any_number_of_tokens(num_tokens: int, routing: str, device: str, routed_as_few: list[int]) -> None:
    """42 tokens of one expert with 3 slots each are 126 rows: 8 row blocks."""
    case = Case(num_tokens, 40, WIDE.widths, 3, "swiglu", routing, bias=True, reason="decoding")
    check(inputs_for(case, torch.float32, device))
    assert routed_as_few == [3 * num_tokens]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, device: str, dtype: torch.dtype) -> None:
    check(inputs_for(Case(5, 24, WIDE.widths, 2, activation, reason="every activation"), dtype, device))


@pytest.mark.parametrize("turned", [("w1", "w3"), ("w2",), ("w3",), ("x",)])
def test_any_strides(turned: tuple[str, ...], device: str) -> None:
    inputs = inputs_for(Case(9, 40, WIDE.widths, 2, "swiglu", reason="strides"), torch.float32, device)
    check(inputs, **{name: getattr(inputs, name).t().contiguous().t() for name in turned})


def test_only_what_was_chosen_is_read(device: str, dtype: torch.dtype) -> None:
    """NaN in the weights of every other expert, and in their biases, reaches nothing."""
    inputs = inputs_for(Case(3, 40, WIDE.widths, 2, "swiglu", bias=True, reason="unread"), dtype, device)
    expected, chosen = decode(inputs), set(inputs.topk_ids.flatten().tolist())
    for expert in set(range(WIDE.num_experts)) - chosen:
        columns = WIDE.columns(expert)
        for packed in (inputs.w1.t(), inputs.w3.t(), inputs.w2, inputs.b1, inputs.b3):  # type: ignore[union-attr]
            packed[columns] = torch.nan  # type: ignore[index]
        inputs.b2[expert] = torch.nan  # type: ignore[index]
    assert torch.equal(decode(inputs), expected)


def test_nan_stays_with_its_token(device: str) -> None:
    inputs = inputs_for(
        Case(9, 40, WIDE.widths, 2, "swiglu", "one expert", reason="one row block"), torch.float32, device
    )
    expected = decode(inputs)
    inputs.x[4] = torch.nan
    out = decode(inputs)
    others = torch.arange(9, device=device) != 4
    assert out[4].isnan().all()
    assert torch.equal(out[others], expected[others])


def test_two_runs_agree_bit_for_bit(device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(Case(16, 40, WIDE.widths, 3, "geglu", reason="determinism"), dtype, device)
    assert torch.equal(decode(inputs), decode(inputs))


def test_many_slots_or_a_gradient_take_the_other_routing(device: str, routed_as_few: list[int]) -> None:
    inputs = inputs_for(Case(65, 8, WIDE.widths, 2, "silu", reason="130 slots of 8 experts"), torch.float32, device)
    check(inputs)
    few = inputs_for(Case(8, 8, WIDE.widths, 2, "silu", reason="few, but with a gradient"), torch.float32, device)
    w1 = few.w1.clone().requires_grad_()
    out = moe_mlp(
        few.x, few.topk_weights, few.topk_ids, w1, few.w2, layout=few.layout, activation="silu", backend="triton"
    )
    out.sum().backward()
    assert w1.grad is not None
    assert routed_as_few == []
    torch.testing.assert_close(out.detach(), decode(few))
    assert routed_as_few == [16]


def test_what_is_few() -> None:
    layout = ExpertLayout((8,) * 128)
    assert [is_few(slots, layout) for slots in (0, 1, MAX_SLOTS, MAX_SLOTS + 1)] == [False, True, True, False]
    assert [is_few(slots, ExpertLayout((8, 8))) for slots in (32, 33)] == [True, False]


def routed(ids: Tensor, layout: ExpertLayout) -> Routing:
    packed = route_few(ids, layout).packed
    assert packed is not None
    return trimmed(packed, ids, layout, few=True)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", DECODING, ids=lambda case: case.reason)
def test_routing_is_the_oracles(case: Case, ids_dtype: torch.dtype, device: str) -> None:
    inputs = inputs_for(case, torch.float32, device, ids_dtype=ids_dtype)
    with poison_empty():
        routing = routed(inputs.topk_ids, inputs.layout)
    assert routing.block_m == 16
    assert_same_routing(routing, reference.route(inputs.topk_ids, inputs.layout))
    assert_schedule_covers_rows(routing)


def test_routing_of_the_most_slots(device: str) -> None:
    """512, among 300 experts, with ids out of range that wrap into it."""
    layout = ExpertLayout(tuple(e % 5 * 3 for e in range(300)))
    ids = torch.randint(0, 301, (64, 8), generator=torch.Generator().manual_seed(0)).to(device)
    ids[::9, 3] += 2**32
    with poison_empty():
        routing = routed(ids, layout)
    assert_same_routing(routing, reference.route(ids, layout))
    assert_schedule_covers_rows(routing)


PROGRAM = """
def describe(name, kernel, options):
    ptx = kernel.asm["ptx"]
    return {
        "name": name,
        "shared": kernel.metadata.shared,
        "spill": spilled(assembled(kernel)),
        "wide_copies": len(re.findall(r"cp\\.async\\.cg\\.shared\\.global [^;]*0x10", ptx)),
        "narrow": len(re.findall(r"ld\\.global[.a-z0-9:]*\\.b16|cp\\.async[^;]*, 0x[48],", ptx)),
        "tensor_cores": ptx.count("mma.sync"),
        "few": options.get("BLOCK_M") == 16,
        "float": dtype.itemsize == 4,
    }

describe_each(describe)

from triton_moe import ExpertLayout
from triton_moe.kernels import config
from triton_moe.ops import moe_mlp

config.capability = lambda device: divmod(capability, 10)
layout, H, T = ExpertLayout((256, 512) * 16), 768, 3
S = layout.total_width
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    empty = lambda *shape: torch.zeros(*shape, dtype=dtype)
    x, ids, weights = empty(T, H), torch.zeros(T, 2, dtype=torch.int32), torch.zeros(T, 2)
    for gated in (False, True):
        for turned in (False, True):
            w1, w2 = (empty(S, H).t(), empty(H, S).t()) if turned else (empty(H, S), empty(S, H))
            moe_mlp.moe_mlp(
                x, weights, ids, w1, w2, w1 if gated else None, None, None, None, layout,
                "swiglu" if gated else "relu_squared", "bounded", False, "auto",
            )
"""


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles_to_wide_loads_and_no_spills(capability: int) -> None:
    kernels = compiled_by(PROGRAM, capability)
    gemms = [kernel for kernel in kernels if kernel["name"].startswith("grouped_gemm")]
    assert {kernel["name"] for kernel in kernels} == {
        "route_few_kernel", "grouped_gemm_up_fwd_kernel", "grouped_gemm_down_fwd_kernel", "scatter_fwd_kernel",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared"] <= 1024 * SHARED_MEMORY[capability], kernel
        assert kernel["spill"] == 0, kernel
    assert len(gemms) == 3 * 2 * 2 + 3 * 2 * 2
    for kernel in gemms:
        assert kernel["few"], kernel
        assert kernel["float"] or (kernel["tensor_cores"] and kernel["wide_copies"] and not kernel["narrow"]), kernel


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 64])
@pytest.mark.parametrize("widths", [(256,) * 32, (251, 300, 5, 0) * 8], ids=["even", "odd"])
def test_real_sizes(num_tokens: int, widths: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    case = Case(num_tokens, 768, widths, 8, "swiglu", bias=num_tokens == 2, reason="native tiles")
    check(inputs_for(case, dtype, device))


@pytest.mark.gpu
def test_a_new_number_of_tokens_compiles_nothing() -> None:
    from triton_moe.kernels.decode import route_few_kernel
    from triton_moe.kernels.grouped_gemm import grouped_gemm_down_fwd_kernel, grouped_gemm_up_fwd_kernel
    from triton_moe.kernels.scatter import scatter_fwd_kernel

    kernels = (route_few_kernel, grouped_gemm_up_fwd_kernel, grouped_gemm_down_fwd_kernel, scatter_fwd_kernel)

    def compiled() -> list[int]:
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    def step(num_tokens: int) -> Tensor:
        case = Case(num_tokens, 96, (64, 24) * 16, 8, "swiglu", reason="batch")
        return decode(inputs_for(case, torch.bfloat16, "cuda"))

    step(3)
    before = compiled()
    assert all(before)
    for num_tokens in (1, 2, 8, 16, 17, 33, 64):
        step(num_tokens)
    assert compiled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_in_a_cuda_graph(num_tokens: int) -> None:
    inputs = inputs_for(Case(num_tokens, 96, (64, 24) * 16, 8, "swiglu", reason="graph"), torch.bfloat16, "cuda")
    call = functools.partial(
        moe_mlp, inputs.x, inputs.topk_weights, inputs.topk_ids, inputs.w1, inputs.w2, inputs.w3, layout=inputs.layout,
        activation="swiglu",
    )  # fmt: skip
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        call()
        with torch.cuda.graph(graph):
            out = call()
        for seed in (1, 2):
            other = torch.Generator().manual_seed(seed)
            inputs.x.copy_(torch.randn(inputs.x.shape, generator=other))
            inputs.topk_ids.copy_(torch.rand(num_tokens, 32, generator=other).argsort(dim=1)[:, :8])
            graph.replay()
            assert torch.equal(out, call())
