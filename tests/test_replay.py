"""Calls that repeat what the host did for one like them: the same bits, no more memory, and only where that is safe."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from operators import has_hopper, inputs_for
from triton_moe import MoEConfig, MoEMLP, moe_mlp
from triton_moe.testing import CASES, Case, Inputs, poison_empty, run

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from triton_moe.constants import on_device  # noqa: E402
from triton_moe.kernels import launch, replay  # noqa: E402
from triton_moe.kernels.config import allows_tf32, capability  # noqa: E402
from triton_moe.kernels.launch import Launcher, watching  # noqa: E402
from triton_moe.kernels.tuning import configure, forget, table  # noqa: E402


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < n
    tl.store(out + place, tl.load(x + place, mask=mask) + tl.load(y + place, mask=mask), mask=mask)


LAUNCHER = Launcher(add_kernel, BLOCK=16)


def add(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    LAUNCHER((-(-x.numel() // 16),), x, y, out, x.numel())
    return out


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each call that is repeated. No kind of call is known yet."""
    forget()
    made: list[None] = []
    repeat = replay.Recording.repeat

    def counted(self: replay.Recording, *args: Any) -> Any:
        made.append(None)
        return repeat(self, *args)

    monkeypatch.setattr(replay.Recording, "repeat", counted)
    return made


def normal(size: int, device: str) -> Tensor:
    return torch.randn(size, device=device)


def check_repeated(
    inputs: list[Inputs], backend: str, repeats: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Forward and backward of three calls of one kind: as it stands, recorded, repeated."""
    with monkeypatch.context() as patch:
        patch.setattr(replay, "is_hooked", lambda: True)
        expected = [run(moe_mlp, given, backend=backend) for given in inputs]
    assert not repeats
    for number, given in enumerate(inputs):
        with poison_empty() if number == 2 else torch.enable_grad():
            actual = run(moe_mlp, given, backend=backend)
        assert all(torch.equal(actual[name], expected[number][name]) for name in actual)
    assert len(repeats) == 2  # forward and backward


@pytest.mark.parametrize("case", [case for case in CASES[::3] if case.num_tokens], ids=lambda case: case.reason)
def test_a_repeated_call_is_the_call(
    case: Case, device: str, dtype: torch.dtype, repeats: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other values and another routing."""
    inputs = [inputs_for(case, dtype, device, seed=seed) for seed in range(3)]
    check_repeated(inputs, "triton", repeats, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not has_hopper(), reason="needs compute capability 9.0")
def test_a_repeated_call_copies_weights_again(repeats: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that TMA cannot read where they are."""
    case = Case(280, 192, (33, 64, 30, 130), 2, "swiglu", reason="an odd total width")
    inputs = [inputs_for(case, torch.bfloat16, "cuda", seed=seed) for seed in range(3)]
    check_repeated(inputs, "hopper", repeats, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not has_hopper(), reason="needs compute capability 9.0")
def test_descriptors_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each address, in repeated calls, where Triton's release is one we know."""
    once, utils = launch.RELEASE is not None, triton.runtime.driver.active.utils
    name = "fill_tma_descriptor" if launch.RELEASE == "3.6" else "fill_tma_descriptor_tiled"
    encode, encoded = getattr(utils, name), []
    monkeypatch.setattr(utils, name, lambda address, *rest: encoded.append(address) or encode(address, *rest))
    torch.manual_seed(0)
    layer = MoEMLP(MoEConfig([(4, 128)], 2, 256, backend="hopper"), device="cuda", dtype=torch.bfloat16)
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    counts = []
    with torch.no_grad():
        expected = layer(x)[0]
        for _ in range(6):
            encoded.clear()
            assert torch.equal(layer(x)[0], expected)
            counts.append(len(encoded))
        assert (counts[-1] == 0) == once
        layer.w2.data = layer.w2 + 1
        changed = layer(x)[0]
        assert not torch.equal(changed, expected)
        monkeypatch.setattr(replay, "is_hooked", lambda: True)
        assert torch.equal(layer(x)[0], changed)


def test_the_whole_layer_is_repeated(device: str, repeats: list[None]) -> None:
    torch.manual_seed(0)
    layer = MoEMLP(MoEConfig([(2, 16), (1, 5), (2, 40)], 2, 32, activation="swiglu", backend="triton"), device=device)

    def step(x: Tensor) -> list[Tensor]:
        out, aux, _ = layer(x)
        loss = out.square().sum() + aux["router_z_loss"] + aux["load_balance_loss"] + aux["compute_loss"]
        return [out.detach(), *torch.autograd.grad(loss, list(layer.parameters()))]

    x = torch.randn(20, 32, device=device, requires_grad=True)
    first, second, third = step(x), step(x), step(x)
    assert len(repeats) == 2  # both ways
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    step(torch.randn(21, 32, device=device, requires_grad=True))
    assert len(repeats) == 2


def test_arguments_are_told_apart(device: str, repeats: list[None]) -> None:
    """By size, stride, dtype, alignment, by what is None, and by which are the same."""
    call = replay.replayed(lambda x, y, *_: add(x, y))
    x, y = normal(64, device), normal(64, device)
    for _ in range(3):
        assert torch.equal(call(x, y), x + y)
    assert len(repeats) == 1
    double = x.double()
    others: list[tuple] = [
        (x, x),
        (x[:32], y[:32]),
        (double, double + 1),
        (x, y, None),
        (x, y, 16),
        (x[1:33], y[:32]),
    ]
    for number, args in enumerate(others):
        for _ in range(2):
            assert torch.equal(call(*args), args[0] + args[1])
        assert len(repeats) == 1, number
    z = normal(64, device)
    assert torch.equal(call(z, z), z + z)
    assert torch.equal(call(z, y), z + y)
    assert len(repeats) == 3


def three_calls(function: Any, *args: Tensor) -> list[Any]:
    """Results of as many as it takes to see a call repeated that can be."""
    call = replay.replayed(function)
    return [call(*args) for _ in range(3)]


def test_what_pytorch_computes_is_not_repeated(device: str, repeats: list[None]) -> None:
    x, y = normal(64, device), normal(64, device)
    for result in three_calls(lambda x, y: add(x.sin(), y), x, y):
        assert torch.equal(result, x.sin() + y)
    for result in three_calls(lambda x, y: add(x, y.flip(0)), x, y):
        assert torch.equal(result, x + y.flip(0))
    three_calls(lambda x, y: add(x[: 16 + int(y.max() > 100)], y), x, y)  # reads a number back
    assert not repeats


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda y: y.t().contiguous(),
    "reshape": lambda y: y.t().reshape(4096),
    "to": lambda y: y.to(torch.float32),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_not_taken_for_views(copy: str, device: str, repeats: list[None]) -> None:
    """In inference mode PyTorch shows these operators themselves, of which it says that they make views. What they make
    may lie where a tensor before it was."""

    def with_copy(y: Tensor, x: Tensor) -> Tensor:
        torch.empty_like(x)  # whose memory is free again
        return add(COPIES[copy](y), x)

    call, x = replay.replayed(with_copy), normal(4096, device)
    with torch.inference_mode():
        for _ in range(4):
            y = normal(4096, device).view(64, 64).to(torch.float16 if copy == "to" else torch.float32)
            assert torch.equal(call(y, x).flatten(), COPIES[copy](y).flatten() + x)
    assert not repeats


def test_a_switch_of_pytorch_that_hides_another(device: str) -> None:
    """Once fp32's precision is set for one backend, PyTorch no longer says what it is in general."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert allows_tf32()
        run(moe_mlp, inputs_for(CASES[0], torch.float16, device), backend="triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not allows_tf32()


def test_products_are_repeated(device: str, repeats: list[None]) -> None:
    """With operands transposed or new, in place, and with options; not with what begins elsewhere in an argument."""

    def products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = add(x, y)
        return torch.mm(both, y.t()), add(x, y).addmm_(both.t(), x)

    call = replay.replayed(products)
    for number in range(4):
        x, y = normal(64, device).view(8, 8), normal(64, device).view(8, 8)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(call(x, y), products(x, y), strict=True))
        assert len(repeats) == max(0, number - 1)
    for result in three_calls(lambda x, y: torch.mm(x[4:], y), x, y):
        assert torch.equal(result, x[4:] @ y)
    assert len(repeats) == 2


def test_memory_of_nobodys_is_not_repeated(device: str, repeats: list[None]) -> None:
    """A pointer into a tensor from elsewhere, or an argument that is handed back: nobody says what the next call's is.
    A table of constants is the same for every call."""
    x, elsewhere = normal(64, device), normal(64, device)
    for result in three_calls(lambda x: add(x, elsewhere), x):
        assert torch.equal(result, x + elsewhere)
    three_calls(lambda x: (add(x, x), x), x)
    three_calls(lambda x: add(x, x)[:32], x)
    assert not repeats
    (constants,) = on_device([[1.0] * 64], torch.float32, torch.device(device, 0) if device == "cuda" else x.device)
    for result in three_calls(lambda x: add(x, constants), x):
        assert torch.equal(result, x + 1)
    assert len(repeats) == 1


def test_tensors_of_a_subclass_are_not_repeated(device: str, repeats: list[None]) -> None:
    """Nor kept."""

    class Special(torch.nn.Parameter):
        pass

    x = Special(normal(64, device), requires_grad=False)
    for result in three_calls(lambda x: add(x, x), x):
        assert torch.equal(result, x + x)
    assert not repeats
    gone = weakref.ref(x)
    del x, result
    gc.collect()
    assert gone() is None


def test_arguments_that_overlap_are_not_repeated(device: str, repeats: list[None]) -> None:
    memory = normal(128, device)
    for result in three_calls(add, memory[:64], memory[32:96]):
        assert torch.equal(result, memory[:64] + memory[32:96])
    assert not repeats


def test_memory_is_let_go(device: str, repeats: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a repeated call allocates only its results outlive it; it keeps no argument, and gives back what the call
    did."""

    def sum_of_four(x: Tensor, y: Tensor) -> list[Any]:
        out = add(add(x, y), add(x, y))
        replay.give_back(y)
        return [out, None]

    call, born = replay.replayed(sum_of_four), []
    empty_strided = replay._empty_strided(torch.device(device).type)

    def watched(*args: Any) -> Tensor:
        tensor = empty_strided(*args)
        born.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(replay, "_empty_strided", lambda device_type: watched)
    x = normal(64, device)
    for number in range(4):
        y = normal(64, device)
        expected = (x + y) + (x + y)
        out, nothing = call(x, y)
        assert torch.equal(out, expected)
        assert nothing is None
        assert y.untyped_storage().nbytes() == 0
        assert len(repeats) == max(0, number - 1)
    assert [reference() is not None for reference in born] == [False] * 5 + [True]
    given = weakref.ref(x)
    del x
    gc.collect()
    assert given() is None


def test_another_configuration_is_another_call(device: str, repeats: list[None]) -> None:
    call, x = replay.replayed(add), normal(64, device)
    for _ in range(3):
        call(x, x)
    assert len(repeats) == 1
    configure("up", capability(x.device), table()["any", "up"])
    call(x, x)
    assert len(repeats) == 1


def test_a_recording_does_not_import_torch_compile() -> None:
    """Which takes seconds of a first step."""
    program = """
import sys, torch
from triton_moe import MoEConfig, MoEMLP
layer = MoEMLP(MoEConfig([(2, 16)], 1, 16, backend="triton"), device=sys.argv[1])
for _ in range(3):
    layer(torch.ones(2, 16, device=sys.argv[1]))[0].sum().backward()
from triton_moe.ops.moe_layer import _forward
(known,) = [cell.cell_contents for cell in _forward.__closure__ if isinstance(cell.cell_contents, dict)]
assert any(known.values()), known
assert "torch._dynamo" not in sys.modules
"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subprocess.run([sys.executable, "-c", program, device], check=True)


def test_an_error_ends_the_watch(device: str, repeats: list[None]) -> None:
    def fails(x: Tensor, y: Tensor) -> Tensor:
        add(x, y)
        raise KeyError("x")

    call, x = replay.replayed(fails), normal(64, device)
    for _ in range(3):
        with pytest.raises(KeyError):
            call(x, x)
        assert watching.by is None
    assert not repeats


def test_kinds_do_not_pile_up(device: str, repeats: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MAX_KINDS", 4)
    call, x = replay.replayed(add), normal(56, device)
    for size in range(16, 16 + 41):
        assert torch.equal(call(x[:size], x[:size]), x[:size] + x[:size])
    for _ in range(3):
        assert torch.equal(call(x, x), x + x)
    assert len(repeats) == 2
