"""The portable kernels compile for GPUs that are not here, within their shared memory."""

import pytest

from offline import compiled_by

pytest.importorskip("triton")

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a program may use (CUDA programming guide)

PROGRAM = """
def describe(name, kernel, options):
    ptx = kernel.asm["ptx"]
    narrow = len(re.findall(r"ld\\.global[.a-z0-9:]*\\.b16", ptx))
    rounds = len(re.findall(r"and\\.b32[^;]*-8192;", ptx))
    unrounded = name.startswith("grouped_gemm") and precision == "high" and not rounds
    # A gathered row's index, if it were a part of the pipeline, would take half of its stages; an operand whose
    # address were not known to be a multiple of 16 bytes would have none.
    deep = re.findall(rf"local_alloc .*memdesc<{options.get('num_stages')}x[0-9]+x[0-9]+x", kernel.asm["ttgir"])
    shallow = name.startswith("grouped_gemm") and len(widths) == 2 and len(deep) < 2
    wgmma = ptx.count("wgmma.mma_async")
    return name, kernel.metadata.shared, wgmma, narrow if odd_widths else 0, unrounded, shallow

describe_each(describe)

from triton_moe import ExpertLayout
from triton_moe.kernels import config
from triton_moe.kernels.route import route
from triton_moe.ops import building_blocks, moe_mlp, router

config.capability = lambda device: divmod(capability, 10)

def empty(*shape):
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)

for dtype, activation, widths, H, precision in (
    (torch.bfloat16, "swiglu", (256, 512), 768, "highest"),
    (torch.bfloat16, "swiglu", (251, 300, 133), 768, "highest"),
    (torch.bfloat16, "gelu", (256, 100, 0), 100, "highest"),
    (torch.float32, "swiglu", (256,), 64, "highest"),
    (torch.float32, "swiglu", (256,), 64, "high"),  # allows tf32
):
    torch.set_float32_matmul_precision(precision)
    layout, gated, odd_widths = ExpertLayout(widths), activation == "swiglu", widths[0] == 251
    S = layout.total_width
    x, w1, w2, w3 = empty(64, H), empty(H, S), empty(S, H), empty(H, S)
    ids, weights = torch.zeros(64, 2, dtype=torch.int32), torch.zeros(64, 2, requires_grad=True)
    routing = route(ids, layout)
    operands = (w1, w2, w3 if gated else None)
    biases = (empty(S), empty(len(widths), H), empty(S) if gated else None)
    for given in ((None,) * 3, biases):
        odd_widths = odd_widths and given is not biases  # which are read exactly to the width
        out = moe_mlp.moe_mlp(x, weights, ids, *operands, *given, layout, activation, "bounded", False, "auto")
        out.sum().backward()
    routed_weights, _, _, _, *losses, _, _ = router.route_tokens(
        x, empty(len(widths), H), None, layout, 2, "softmax", True, 2.5, True
    )
    (routed_weights.sum() + sum(losses)).backward()
    if activation == "gelu":  # the largest tiles of a router that multiplies
        layout = ExpertLayout((64,) * 128)
        for x16 in (empty(64, 256), empty(64, 256).half()):
            routed_weights, *_ = router.route_tokens(x16, empty(128, 256), None, layout, 2, "softmax", True, 1.0, True)
            routed_weights.sum().backward()
    odd_widths = False  # the building blocks read a caller's buffer exactly to the width
    building_blocks.gather(x, routing=routing).sum().backward()
    x_up = building_blocks.grouped_gemm_up(x, w1, w3 if gated else None, routing=routing, activation=activation)
    y = building_blocks.grouped_gemm_down(x_up, w2, routing=routing)
    building_blocks.scatter(y, weights, routing=routing).sum().backward()
"""


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles_within_shared_memory(capability: int) -> None:
    compiled = compiled_by(PROGRAM, capability)
    names = {name for name, *_ in compiled}
    assert {f"grouped_gemm_{name}_kernel" for name in ("up_fwd", "down_fwd", "dh", "dw")} <= names
    assert {"route_count_kernel", "route_place_kernel", "gather_fwd_kernel", "scatter_fwd_kernel"} <= names
    assert {"up_bias_bwd_kernel", "down_bias_bwd_kernel", "bias_dweights_kernel"} <= names
    assert {"router_fwd_kernel", "router_finish_kernel", "router_bwd_kernel"} <= names
    assert {"activation_bwd_kernel", "scatter_bwd_weights_kernel", "sum_partials_kernel", "transpose_kernel"} <= names
    assert [(name, shared) for name, shared, *_ in compiled if shared > 1024 * SHARED_MEMORY[capability]] == []
    if capability == 90:
        gemms = {name for name, *_ in compiled if name.startswith("grouped_gemm")}
        assert gemms <= {name for name, _, wgmma, *_ in compiled if wgmma}
        assert [name for name, *_, shallow in compiled if shallow] == []
    # However odd the widths, a GEMM of the layer with many rows loads 16 bytes at a time.
    assert [name for name, *_, narrow, _, _ in compiled if narrow and name.startswith("grouped_gemm")] == []
    assert [name for name, *_, unrounded, _ in compiled if unrounded] == []
