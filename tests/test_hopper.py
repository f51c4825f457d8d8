"""The Hopper kernels: compiled here for a GPU that is not, and on one against the oracle."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import KERNEL_DEVICE

from offline import compiled_by
from operators import has_hopper, inputs_for
from triton_moe import ExpertLayout, functional, moe_mlp
from triton_moe.activations import ACTIVATIONS
from triton_moe.layout import Routing
from triton_moe.testing import Case, Inputs, check_against_oracle, poison_empty, run

pytest.importorskip("triton")

MAX_SHARED_MEMORY = 232_448  # bytes of a block, CUDA programming guide, compute capability 9.0
MAX_REGISTERS = 504  # of a producer's and two consumers' threads: a third of them, 168, is what a launch gives each
kernels = functools.partial(moe_mlp, backend="hopper")

PROGRAM = """
def describe(name, kernel, options):
    if "hopper" not in name:
        return None
    ptx, said = kernel.asm["ptx"], assembled(kernel)
    return {
        "name": name,
        "activation": options.get("ACTIVATION"),
        "even": options["EVEN"],
        "gated": options.get("GATED"),
        "kept": [options.get("KEEP_PRE"), options.get("KEEP_ACT")],
        "spill": spilled(said),
        "serialized": len(re.findall(r"C7510|C7515|serializ", said)),
        "wgmma": ptx.count("wgmma.mma_async.sync.aligned.m64n256k16"),
        "boxes": len(re.findall(r"cp\\.async\\.bulk\\.tensor\\.2d\\.shared", ptx)),
        "stores": len(re.findall(r"cp\\.async\\.bulk\\.tensor\\.2d\\.global", ptx)),
        "wide_copies": len(re.findall(r"cp\\.async\\.cg\\.shared\\.global [^;]*0x10", ptx)),
        "shared": kernel.metadata.shared,
        "registers": options["PRODUCER_REGISTERS"] + 2 * options["CONSUMER_REGISTERS"],
    }

from triton_moe import ExpertLayout
from triton_moe.activations import ACTIVATIONS, is_gated
from triton_moe.kernels.hopper import launch as hopper
from triton_moe.kernels.route import route

hopper._num_programs = lambda device: 132
jit.JITFunction.run = lambda *args, **options: None
T, H = 256, 1536
def routed(*widths, K=2):
    return route(torch.zeros(T, K, dtype=torch.int32), ExpertLayout(widths), panels=True)

EVEN, UNEVEN, ODD = routed(512, 64, 0, 128), routed(512, 96, 0, 200), routed(512, 97, 0, 199)
describe_each(describe)

def launch_all(routing, dtype, activation, turned=False, of_dh_alone=False):
    K = routing.top_k
    S, R = routing.layout.total_width, T * K
    empty = lambda *shape: torch.zeros(*shape, dtype=dtype)
    x, y, weights, partial = empty(T, H), empty(R, H), torch.zeros(T, K), torch.zeros(2 * R)
    gated = is_gated(activation)
    one, pre = empty(R * 512), empty((1 + gated) * R * 512)
    w1, w2 = (empty(S, H).t(), empty(H, S).t()) if turned else (empty(H, S), empty(S, H))
    up = w1 if gated else None
    hopper.dh(x, w2, pre, weights, routing, activation, pre, one, partial)
    if of_dh_alone:
        return
    for kept in ((one, pre), (one, None), (None, pre)):  # training, inference, once more in backward
        hopper.up_fwd(x, w1, up, *kept, routing, activation)
    hopper.down_fwd(one, w2, None, y, routing)
    grads = [w1, up] if gated else [w1]
    hopper.dw(x, one, [w2.t()], routing, 1, 0)
    hopper.dw(x, pre, grads, routing, 1 + gated, 0)
    for part in range(2 * gated):
        hopper.dw(x, pre, [up], routing, 2, part)
    hopper.down_fwd(pre, w1.t(), None if up is None else up.t(), y, routing)

for activation in ("swiglu", "relu_squared"):
    for turned in (False, True):
        launch_all(EVEN, torch.bfloat16, activation, turned)
    launch_all(UNEVEN, torch.bfloat16, activation, turned=activation == "swiglu")
    launch_all(ODD, torch.bfloat16, activation)
launch_all(EVEN, torch.float16, "geglu_tanh")
for activation in ACTIVATIONS:
    for routing in (EVEN, UNEVEN):
        launch_all(routing, torch.bfloat16, activation, of_dh_alone=True)
for K in (1, 8):
    launch_all(routed(512, 64, 0, 128, K=K), torch.bfloat16, "swiglu", of_dh_alone=True)
"""


@pytest.mark.timeout(600)  # a minute and a half alone
def test_compiles_to_what_hopper_is_fast_at() -> None:
    kernels = [kernel for kernel in compiled_by(PROGRAM, 90) if kernel]
    assert {kernel["name"] for kernel in kernels} == {
        f"grouped_gemm_{name}_hopper_kernel" for name in ("up", "down", "dh", "dw")
    }
    for kernel in kernels:
        assert kernel["shared"] <= MAX_SHARED_MEMORY, kernel
        assert kernel["registers"] <= MAX_REGISTERS, kernel
        assert kernel["serialized"] == 0, kernel
        assert kernel["wgmma"] == 8, kernel  # 4 a stage, for each of two consumers
        # A producer's threads copy gathered rows, and what is left of an expert after its last panel.
        assert kernel["wide_copies"] >= 8 or ("_down_" in kernel["name"] and kernel["even"]), kernel
        if "_up_" in kernel["name"]:
            parts, (keeps_pre, keeps_act) = 1 + kernel["gated"], kernel["kept"]  # of 256 columns in pieces of 64
            assert kernel["stores"] == 2 * (parts * keeps_pre + keeps_act) * 4 // parts, kernel  # two consumers
        if "_down_" in kernel["name"]:
            assert (kernel["wide_copies"] == 0) == kernel["even"], kernel
            assert kernel["boxes"] == 2, kernel  # a panel, and weights
        if "_dw_" in kernel["name"]:
            assert kernel["boxes"] in ((2, 4) if kernel["even"] else (0,)), kernel  # panels
        assert kernel["spill"] == 0, kernel


def test_bad_input() -> None:
    inputs = inputs_for(Case(8, 64, (64, 128), 2, "swiglu", reason="no Hopper"), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"^backend: expected"):
        run(moe_mlp, inputs, backend="hopper")


def test_building_blocks_have_no_hopper_kernels() -> None:
    with pytest.raises(ValueError, match=r"^backend: expected auto, triton or torch"):
        functional.route(torch.zeros(4, 1, dtype=torch.int32), ExpertLayout((64,)), backend="hopper")


@pytest.mark.parametrize(
    ("hidden_size", "dtype", "message"),
    [
        (64, torch.float32, "x: expected bfloat16 or float16"),
        (96, torch.bfloat16, "x: expected H a multiple of 64"),
    ],
)
def test_what_it_cannot_take(
    hidden_size: int, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "_is_hopper", lambda device: True)
    inputs = inputs_for(Case(8, hidden_size, (64, 100), 2, "swiglu", reason="not for Hopper"), dtype, KERNEL_DEVICE)
    with pytest.raises(ValueError, match=f"^{message}"):
        run(kernels, inputs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of memory that nobody fills
def test_a_layer_runs_here_as_a_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that only count in the place of ours, whose results nobody looks at."""
    from triton_moe.kernels.hopper import launch as hopper

    called: list[str] = []

    def counted(name: str) -> Any:
        return lambda *args, **options: called.append(name)

    for name in ("up_fwd", "down_fwd", "dh", "dw"):
        monkeypatch.setattr(hopper, name, counted(name))
    monkeypatch.setattr(hopper, "fits", lambda *given: True)
    monkeypatch.setattr(functional, "_is_hopper", lambda device: True)
    for bias in (False, True):
        case = Case(9, 64, (64, 24), 2, "swiglu", bias=bias, reason="who is called")
        inputs = inputs_for(case, torch.float16, KERNEL_DEVICE)
        run(kernels, inputs)
        operands = {name: value for name, value in vars(inputs).items() if name != "dout"}
        kernels(**operands)  # no gradients asked for
        there = [] if bias else ["up_fwd", "down_fwd", "dh", "dw", "dw", "down_fwd", "up_fwd", "down_fwd"]
        assert called == there, bias
        called.clear()


def test_the_choice_looks_at_nothing_that_hooks_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_moe.kernels.hopper import launch as hopper

    monkeypatch.setattr(hopper, "fits", lambda *given: True)
    w, layout = torch.zeros(64, 4096, dtype=torch.bfloat16), ExpertLayout((2048,) * 2)
    for view in (w, w.t().contiguous().t(), torch.zeros(64, 4097, dtype=torch.bfloat16)[:, 1:]):
        assert hopper.takes(2**20, layout, "auto", view)


hopper_only = pytest.mark.skipif(not has_hopper(), reason="needs compute capability 9.0")
CASES = (
    Case(300, 192, (128, 64, 0, 512), 2, "swiglu", reason="the usual"),
    Case(1, 64, (64, 128), 1, "swiglu", reason="one row"),
    Case(700, 128, (64, 256, 128), 2, "swiglu", routing="one expert", reason="many row blocks of one expert"),
    Case(130, 64, (64, 192, 320), 3, "swiglu", reason="K = E"),
    Case(90, 128, (64,) * 24, 2, "swiglu", reason="fewer rows than a tile"),
    Case(40, 64, (64, 128, 64), 2, "swiglu", routing="idle expert", reason="an expert without rows"),
    Case(40, 64, (64, 128), 2, "swiglu", routing="all dropped", reason="no rows at all"),
    Case(0, 64, (64, 128), 2, "swiglu", reason="no tokens"),
    Case(200, 320, (64, 1088), 1, "relu_squared", reason="one very wide expert, H no multiple of a tile"),
    Case(257, 64, (256, 256, 256), 2, "relu_squared", routing="dropped", reason="one width, some slots dropped"),
    Case(300, 192, (96, 40, 0, 200, 16), 2, "swiglu", reason="widths that are no multiples of 64"),
    Case(260, 128, (33, 65, 30, 128), 2, "relu_squared", reason="odd widths"),
    Case(400, 64, (100, 4, 24, 300, 524), 2, "gelu", reason="a gradient that is not 0 past the width"),
    Case(280, 192, (33, 64, 30, 130), 2, "swiglu", reason="an odd total width"),
    Case(190, 64, (7, 0, 1, 131), 2, "swiglu", routing="dropped", reason="a null expert between odd ones"),
    Case(300, 64, (104, 72, 8), 2, "swiglu", routing="one expert", reason="rows of one uneven expert alone"),
)

TWO_TILES = Case(300, 192, (300, 40, 0, 520), 2, "swiglu", reason="uneven widths of more than one tile")


def turned(inputs: Inputs) -> Inputs:
    """The same weights, transposed in memory."""
    weights = {name: getattr(inputs, name) for name in ("w1", "w2", "w3")}
    weights = {name: None if w is None else w.t().contiguous().t() for name, w in weights.items()}
    return Inputs(**{**vars(inputs), **weights})


@pytest.fixture
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many programs as asked for, so that each has many tiles; None: one a multiprocessor."""
    from triton_moe.kernels.hopper import launch as hopper

    if request.param is not None:
        monkeypatch.setattr(hopper, "_num_programs", lambda device: request.param)
    hopper._launcher.cache_clear()
    yield
    hopper._launcher.cache_clear()


@pytest.mark.gpu
@hopper_only
@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("programs", [None, 1, 3], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    inputs = inputs_for(case, dtype, "cuda")
    with poison_empty():
        check_against_oracle(kernels, inputs)
        first, second = run(kernels, inputs), run(kernels, turned(inputs))
        assert all(torch.equal(value, run(kernels, inputs)[name]) for name, value in first.items())
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[13]], ids=lambda case: case.reason)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation_memory", ["bounded", "exact"])
def test_memory_options_change_no_bit(case: Case, recompute: bool, activation_memory: str) -> None:
    """Neither in a first backward pass nor in a second, for which the pre-activation is computed anew."""
    inputs = inputs_for(case, torch.bfloat16, "cuda")
    expected = run(kernels, inputs)
    names = ("dx", "dtopk_weights", "dtopk_ids", "dw1", "dw2", "dw3")
    first: dict[str, torch.Tensor | None] = {}

    def twice(x: torch.Tensor, *operands: torch.Tensor, **options: Any) -> torch.Tensor:
        out = kernels(x, *operands, recompute=recompute, activation_memory=activation_memory, **options)
        out.backward(inputs.dout, retain_graph=True)
        for name, leaf in zip(names, (x, *operands), strict=True):
            first[name], leaf.grad = leaf.grad, None
        return out

    second = run(twice, inputs)
    assert first.pop("dtopk_ids") is None
    assert {"out", *first} == expected.keys()
    for results in (second, {**first, "out": second["out"]}):
        assert all(torch.equal(value, results[name]) for name, value in expected.items())


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("wanted", ["w1", "w3"])
@pytest.mark.parametrize("case", [*CASES[:1], *CASES[13:14], TWO_TILES], ids=lambda case: case.reason)
def test_the_gradient_of_one_part_alone(case: Case, wanted: str) -> None:
    """The other's weight is frozen: the same bits, whichever way the weights lie."""
    inputs = inputs_for(case, torch.bfloat16, "cuda")
    expected = run(kernels, inputs)[f"d{wanted}"]
    for given in (inputs, turned(inputs)):
        operands = {name: value for name, value in vars(given).items() if name != "dout"}
        leaf = operands[wanted].detach().requires_grad_()
        with poison_empty():
            kernels(**{**operands, wanted: leaf}).backward(inputs.dout)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected)


@pytest.mark.gpu
@hopper_only
def test_biases_go_to_the_portable_kernels() -> None:
    case = Case(300, 192, (128, 64, 0, 40), 2, "swiglu", bias=True, reason="no Hopper kernels have biases")
    inputs = inputs_for(case, torch.bfloat16, "cuda")
    check_against_oracle(kernels, inputs)
    portable = run(functools.partial(moe_mlp, backend="triton"), inputs)
    assert all(torch.equal(value, portable[name]) for name, value in run(kernels, inputs).items())


@pytest.mark.gpu
@hopper_only
def test_weights_anywhere_in_memory() -> None:
    """Rows that start where TMA cannot read: the kernels get copies."""
    inputs = inputs_for(CASES[0], torch.bfloat16, "cuda")

    def askew(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(weight, (1, 2))[:, 1:-2]

    def of_askew(x, topk_weights, topk_ids, w1, w2, w3, **options):
        return kernels(x, topk_weights, topk_ids, askew(w1), askew(w2), askew(w3), **options)

    expected, actual = run(kernels, inputs), run(of_askew, inputs)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    for widths in ((128, 64, 0, 192), (100, 33, 0, 192)):
        case = Case(12 if "re" in activation else 150, 128, widths, 2, activation, reason="every activation")
        check_against_oracle(kernels, inputs_for(case, torch.bfloat16, "cuda"))


@pytest.mark.gpu
@hopper_only
@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("programs", [None, 1, 3], indirect=True)
@pytest.mark.parametrize("widths", [(512, 64, 128), (200, 33, 97)], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 300, 9000])
def test_each_kernel_by_itself(num_tokens: int, widths: tuple[int, ...]) -> None:
    """Fewer tiles than programs, and many times as many. Twice: the first leaves the counter for the second.

    Each kernel by itself, on buffers that PyTorch has filled (`benchmarks/sanitize.py`).
    """
    from triton_moe.kernels.route import route
    from triton_moe.products import TOLERANCE, Shape, products

    shape, device = Shape(num_tokens, 320, ExpertLayout(widths), 2, "swiglu"), torch.device("cuda")
    routings: list[Routing] = []

    def routed(ids: torch.Tensor, layout: ExpertLayout, panels: bool) -> Routing:
        routings.append(route(ids, layout, panels))
        return routings[-1]

    portable = products(shape, "triton", torch.bfloat16, device)
    of_hopper = products(shape, "hopper", torch.bfloat16, device, routed)
    for name in ("up", "down", "dh", "dw2", "dw1", "dx"):
        product = of_hopper[name]
        portable[name].call()
        for _ in range(2):
            product.call()
            for actual, expected in zip(product.result(), portable[name].result(), strict=True):
                off = (actual.float() - expected.float()).norm()
                assert off <= TOLERANCE * expected.float().norm()
            for tensor in product.filled():
                tensor.zero_()
            assert routings[0].tiles is not None
            assert int(routings[0].tiles.numbers[3]) == 0


@pytest.mark.gpu
@hopper_only
def test_it_really_runs() -> None:
    from triton_moe.kernels.hopper import launch as hopper

    w = torch.zeros(64, 192, device="cuda", dtype=torch.bfloat16)
    for widths in ((64, 128), (63, 129)):
        assert hopper.takes(16, ExpertLayout(widths), "hopper", w)
        assert not hopper.takes(16, ExpertLayout(widths), "auto", w)
        assert not hopper.takes(16, ExpertLayout(widths), "hopper", w, None, w, None)


@pytest.mark.gpu
@hopper_only
def test_large_products_come_here_by_themselves() -> None:
    from triton_moe.kernels.hopper import launch as hopper

    fewest = hopper._WORTH_IT // (1024 * 512)
    layout = ExpertLayout.from_widths((512,) * 8)
    w = torch.zeros(1024, 4096, device="cuda", dtype=torch.bfloat16)
    assert hopper.takes(fewest, layout, "auto", w)
    assert not hopper.takes(fewest - 8, layout, "auto", w)
    assert not hopper.takes(fewest, layout, "triton", w)
    assert not hopper.takes(fewest, layout, "auto", w.float())
