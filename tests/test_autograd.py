"""The layer among PyTorch's other features: checkpointing, frozen weights, retained graphs, memory options."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from operators import BACKENDS, inputs_for
from triton_moe import ExpertLayout, MoEConfig, MoEMLP, moe_mlp
from triton_moe.testing import Case, run

pytest.importorskip("triton")

CASE = Case(50, 32, (16, 24, 0, 40), 2, "swiglu", reason="the usual")


def layer_on(device: str, hidden_size: int = 32, dtype: torch.dtype = torch.float32, **changes: Any) -> MoEMLP:
    torch.manual_seed(0)
    options: dict[str, Any] = {"activation": "swiglu", "backend": "triton", **changes}
    return MoEMLP(MoEConfig([(2, 16), (1, 5), (2, 40)], 2, hidden_size, **options), device=device, dtype=dtype)


def kernels(*args: Any, **kwargs: Any) -> Tensor:
    return moe_mlp(*args, backend="triton", **kwargs)


LOSSES = ("router_z_loss", "load_balance_loss", "compute_loss")
READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__iter__")
"""Methods by which a tensor's values come to the host."""
EXACT, RECOMPUTE = {"activation_memory": "exact"}, {"recompute": True}


@pytest.mark.parametrize(
    ("backend", "options"),
    [("triton", EXACT), ("triton", RECOMPUTE), ("triton", {**EXACT, **RECOMPUTE}), ("torch", RECOMPUTE)],
)
def test_memory_options_change_no_bit(backend: str, options: dict[str, Any], device: str) -> None:
    inputs = inputs_for(CASE, torch.float32, device)
    expected = run(moe_mlp, inputs, backend=backend)
    actual = run(moe_mlp, inputs, backend=backend, **options)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def saved_bytes(layer: MoEMLP, x: Tensor) -> int:
    """Of distinct storages that autograd keeps, parameters apart."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    for parameter in layer.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def test_what_is_saved(device: str) -> None:
    """x and the exact pre-activation, within 5%, and 20 bytes a row; with recompute, x and those. No logits."""
    T, K, H = 512, 2, 32
    x = torch.randn(T, H, device=device, requires_grad=True)
    layer = layer_on(device, activation_memory="exact", aux_losses=False)
    _, _, f = layer(x)
    rows = (f * T * K).round().tolist()
    pre = sum(2 * n * width for n, width in zip(rows, layer.layout.widths, strict=True))
    element = 4
    assert saved_bytes(layer, x) <= 1.05 * element * (T * H + pre) + 20 * T * K
    layer = layer_on(device, recompute=True, aux_losses=False)
    assert saved_bytes(layer, x) <= element * T * H + 20 * T * K + 2048


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 0), (RECOMPUTE, 0), (EXACT, 1), ({**EXACT, **RECOMPUTE}, 2)], ids=str
)
def test_what_is_read_back(
    options: dict[str, Any], expected: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number, and that for "exact" alone; if the pre-activation is computed once more, once more."""
    layer, x = layer_on(device, **options), torch.randn(9, 32, device=device, requires_grad=True)
    read: list[str] = []

    def spy(name: str) -> Any:
        method = getattr(Tensor, name)

        def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            read.append(name)
            return method(self, *args, **kwargs)

        return watched

    for _ in range(3):  # made, recorded if it can be, and repeated
        read.clear()
        with monkeypatch.context() as patch:
            for name in READS:
                patch.setattr(Tensor, name, spy(name))
            out, aux, _ = layer(x)
            (out.square().sum() + sum(aux[name] for name in LOSSES)).backward()
        assert read == ["__int__"] * expected


def test_a_retained_graph_gives_the_same_gradients_again(device: str) -> None:
    """Although the first backward gives the pre-activation's memory back."""
    inputs = inputs_for(CASE, torch.float32, device)
    leaves = [getattr(inputs, name).clone().requires_grad_() for name in ("x", "topk_weights", "w1", "w2", "w3")]
    x, weights, *experts = leaves
    out = kernels(x, weights, inputs.topk_ids, *experts, layout=inputs.layout, activation="swiglu")
    first = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
    *_, pre, _ = cast(Any, out.grad_fn).saved_tensors
    assert pre.numel() > 0
    assert pre.untyped_storage().nbytes() == 0
    for again in range(2):
        second = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=again == 0)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, device: str) -> None:
    layer = layer_on(device)
    x = torch.randn(40, 32, device=device)
    results = []

    def run_layer(x: Tensor) -> tuple[Tensor, Tensor]:
        out, aux, _ = layer(x)
        return out, aux["load_balance_loss"]  # the reentrant kind sees no tensors inside a dict

    for wrap in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out, loss = checkpoint(run_layer, leaf, use_reentrant=use_reentrant) if wrap else run_layer(leaf)  # type: ignore[misc]
        (out.square().sum() + loss).backward()
        results.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_experts_cost_no_weight_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_moe.kernels.tuning import forget
    from triton_moe.ops import moe_mlp as operator
    from triton_moe.ops import up_backward

    calls: list[list[bool]] = []
    dw = operator.grouped_gemm_dw

    def watched(x: Tensor, d: Tensor, grads: Any, *args: Any) -> None:
        calls.append([grad is not None for grad in grads])
        dw(x, d, grads, *args)

    for module in (operator, up_backward):
        monkeypatch.setattr(module, "grouped_gemm_dw", watched)
    layer = layer_on(device)
    x = torch.randn(40, 32, device=device)

    def gradients_of(*names: str) -> dict[str, Tensor]:
        forget()  # a repeated call would not come by here
        calls.clear()
        leaf = x.clone().requires_grad_()
        for name in ("w1", "w2", "w3"):
            getattr(layer, name).requires_grad_(name in names).grad = None
        layer.router.weight.grad = None
        layer(leaf)[0].sum().backward()
        found = {name: getattr(layer, name).grad for name in ("w1", "w2", "w3")}
        return found | {"x": leaf.grad, "router": layer.router.weight.grad}

    expected = gradients_of("w1", "w2", "w3")
    assert calls == [[True], [True, True]]
    for names, made in (
        ((), []), (("w2",), [[True]]), (("w1",), [[True, False]]), (("w3",), [[False, True]]),
        (("w1", "w3"), [[True, True]]),
    ):  # fmt: skip
        found = gradients_of(*names)
        assert calls == made, names
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]) if name in (*names, "x", "router") else grad is None, name


def test_memory_that_a_hook_shares_out_is_left_alone(device: str) -> None:
    """Hooks on saved tensors may keep all in one buffer: nothing else in it is freed or written over."""
    buffer, used = torch.zeros(2**18, device=device), 0

    def pack(tensor: Tensor) -> Any:
        nonlocal used
        if tensor.dtype != buffer.dtype:
            return tensor
        start, used = used, used + tensor.numel()
        buffer[start:used] = tensor.detach().flatten()
        return start, tensor.shape

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        start, shape = packed
        return buffer[start : start + shape.numel()].view(shape)

    layer, x = layer_on(device), torch.randn(40, 32, device=device)
    expected = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out, neighbour = layer(x)[0], torch.ones(3, device=device, requires_grad=True)
        other = neighbour.square().sum()
    kept = buffer.clone()
    grads = torch.autograd.grad(out.sum(), list(layer.parameters()))
    assert all(torch.equal(grad, right) for grad, right in zip(grads, expected, strict=True))
    assert torch.equal(buffer.view(torch.int32), kept.view(torch.int32))  # bits: what was never written may be NaN
    assert torch.equal(torch.autograd.grad(other, neighbour)[0], torch.full((3,), 2.0, device=device))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_makes_no_pre_activation_and_training_may_follow(
    mode: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton_moe.kernels.tuning import forget
    from triton_moe.ops import moe_mlp as operator

    made: list[bool] = []
    up = operator.grouped_gemm_up_fwd

    def watched(x: Tensor, w1: Tensor, w3: Any, act: Any, pre: Any, *args: Any, **options: Any) -> None:
        made.append(pre is not None)
        up(x, w1, w3, act, pre, *args, **options)

    forget()  # a repeated call would not come by here
    monkeypatch.setattr(operator, "grouped_gemm_up_fwd", watched)
    layer, x = layer_on(device), torch.randn(60, 32, device=device)  # too many to be decoding
    with mode():
        out, _, _ = layer(x)
    assert made == [False]
    trained, _, _ = layer(x)
    assert made == [False, True]
    assert torch.equal(out, trained)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_swapped_storage_is_seen(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing keeps a pointer from one call to the next, not what repeats calls (`kernels/replay.py`) either."""
    from triton_moe.kernels import replay

    hidden_size, dtype = (64, torch.bfloat16) if backend == "hopper" else (32, torch.float32)
    layer, other = (layer_on(device, hidden_size, dtype, backend=backend) for _ in range(2))
    x = torch.randn(9, hidden_size, device=device, dtype=dtype)
    repeats: list[None] = []
    repeat = replay.Recording.repeat

    def counted(*args: Any) -> Any:
        repeats.append(None)
        return repeat(*args)

    def step(layer: MoEMLP) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        out, aux, _ = layer(leaves[0])
        loss = out.square().sum() + sum(aux[name] for name in LOSSES)
        return [out.detach(), *torch.autograd.grad(loss, leaves)]

    with torch.no_grad():
        for weight in other.parameters():
            weight.normal_()
    with monkeypatch.context() as patch:
        patch.setattr(replay, "is_hooked", lambda: True)  # nothing is recorded or repeated
        expected = step(other)
    monkeypatch.setattr(replay.Recording, "repeat", counted)
    for _ in range(3):
        step(layer)
    assert len(repeats) >= 2  # forward and backward
    old = [weight.data for weight in layer.parameters()]  # nothing new gets its memory while it is held
    for mine, new in zip(layer.parameters(), other.parameters(), strict=True):
        mine.data = new.detach().clone()
    num_repeats = len(repeats)
    actual = step(layer)
    assert len(repeats) == num_repeats + 2
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not any(torch.equal(a, b.data) for a, b in zip(old, layer.parameters(), strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("casts_x", [False, True])
@pytest.mark.parametrize("low", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_autocast_is_the_layer_in_that_dtype(low: torch.dtype, casts_x: bool, compiled: bool, device: str) -> None:
    """To the bit, whether x comes in fp32, as the parameters, or in that dtype."""
    torch.compiler.reset()
    layer, x = layer_on(device, bias=True), torch.randn(9, 32, device=device).to(torch.float32 if casts_x else low)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=32**-0.5)
    other = copy.deepcopy(layer).to(low)
    call: Any = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer

    def step(call: Any, layer: MoEMLP, x: Tensor, autocasts: bool) -> dict[str, Tensor]:
        leaves = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
        with torch.autocast(device, low, enabled=autocasts):
            out, aux, f = call(leaves["x"])
        loss = out.float().square().sum() + sum(aux[name] for name in LOSSES)
        grads = torch.autograd.grad(loss, [*leaves.values()])
        results = {"out": out, "f": f, **aux}
        return {name: value.detach() for name, value in results.items()} | dict(zip(leaves, grads, strict=True))

    actual, expected = step(call, layer, x.clone(), True), step(other, other, x.to(low), False)
    assert actual["out"].dtype == low
    assert {actual[name].dtype for name in dict(layer.named_parameters())} == {torch.float32}
    assert actual["x"].dtype == actual["f"].dtype == x.dtype
    for name, value in expected.items():
        assert value.any(), name
        assert torch.equal(actual[name].to(value.dtype), value), name


def test_autocast_is_off_where_it_is_disabled(device: str) -> None:
    layer, x = layer_on(device), torch.randn(9, 32, device=device)
    with torch.autocast(device, torch.float16):
        low = layer(x)[0]
        with torch.autocast(device, enabled=False):
            assert torch.equal(layer(x)[0], (expected := layer(x.clone())[0]))
            with pytest.raises(ValueError, match=r"^x: expected torch\.float32 on .* as the weights"):
                layer(x.half())
    assert low.dtype == torch.float16
    assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize(
    ("asked", "launched"),
    [("x router", {"dx", "router"}), ("x", {"dx", "router"}), ("router", {"router"}), ("", set())],
)
def test_only_the_gradients_asked_for_are_computed(
    asked: str, launched: set[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of x, by a kernel of its own, and of the router."""
    from triton_moe.kernels.tuning import forget
    from triton_moe.ops import router, up_backward

    called: set[str] = set()

    def noted(module: Any, name: str, what: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (called.add(what), function(*args, **kwargs))[1])

    noted(up_backward, "grouped_gemm_down_fwd", "dx")
    noted(router, "router_bwd", "router")
    forget()  # a repeated call would not come by here
    layer = layer_on(device)
    x = torch.randn(40, 32, device=device, requires_grad="x" in asked.split())
    layer.router.weight.requires_grad_("router" in asked)
    layer(x)[0].sum().backward()
    assert called == launched
    assert layer.w1.grad is not None


def test_gradients_accumulate_into_fp32(device: str) -> None:
    layer = layer_on(device).half()
    buffers = {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight in layer.parameters()}

    def accumulate(weight: Tensor) -> None:
        assert weight.grad is not None
        buffers[id(weight)].add_(weight.grad)
        weight.grad = None

    single = []
    x = torch.randn(2, 20, 32, device=device).half()
    for part in x:
        layer(part)[0].float().square().mean().backward()
        single.append([parameter.grad.float() for parameter in layer.parameters()])  # type: ignore[union-attr]
        layer.zero_grad()
    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(accumulate)
    for part in x:
        layer(part)[0].float().square().mean().backward()
    for parameter, first, second in zip(layer.parameters(), *single, strict=True):
        assert torch.equal(buffers[id(parameter)], first + second)


def test_split_gives_each_experts_own_matrix() -> None:
    layer = layer_on("cpu")
    views = layer.layout.split(layer.w1.detach(), dim=1), layer.layout.split(layer.w2.detach(), dim=0)
    for e in range(layer.layout.num_experts):
        columns = layer.layout.columns(e)
        assert torch.equal(views[0][e], layer.w1[:, columns])
        assert torch.equal(views[1][e], layer.w2[columns])
    views[0][2].zero_()
    assert not layer.w1[:, layer.layout.columns(2)].any()
    with pytest.raises(ValueError, match=r"packed: expected 117 along dim 0, got shape \(32, 117\)"):
        layer.layout.split(layer.w1, dim=0)
    with pytest.raises(ValueError, match=r"packed: expected a tensor, got None"):
        layer.layout.split(None, dim=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"packed: expected 8 along dim 2"):
        ExpertLayout((8,)).split(layer.w1, dim=2)


class Ignored(torch.autograd.Function):
    """Returns no gradient for its input."""

    @staticmethod
    def forward(ctx: Any, ignored: Tensor, used: Tensor) -> Tensor:
        return used.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, dout


@pytest.mark.parametrize("frozen", [(), ("x",), ("router.weight",), ("x", "router.weight"), ("w1", "w2", "w3")])
@pytest.mark.parametrize("used", ["out", "losses", "both"])
def test_one_operator_is_two(frozen: tuple[str, ...], used: str, device: str) -> None:
    """Router and experts in one operator give the bits they give one after the other, whatever is differentiated."""
    x = torch.randn(30, 32, device=device)

    def step(one_operator: bool) -> dict[str, Tensor]:
        layer = layer_on(device)
        layer._is_one_operator = one_operator
        leaves = {"x": x.clone(), **dict(layer.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in frozen)
        out, aux, f = layer(leaves["x"])
        assert all(aux[name].requires_grad == ({"x", "router.weight"} - {*frozen} != set()) for name in LOSSES)
        losses = [aux[name] for name in LOSSES]
        chosen = {"out": [out.sum()], "losses": losses, "both": [out.sum(), *losses]}[used]
        chosen = [result for result in chosen if result.requires_grad]
        if chosen:
            torch.stack(chosen).sum().backward()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"out": out.detach(), "f": f, **{name: value.detach() for name, value in aux.items()}, **grads}

    one, two = step(True), step(False)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_output_whose_gradient_is_undefined(device: str) -> None:
    layer, x = layer_on(device), torch.randn(9, 32, device=device, requires_grad=True)
    Ignored.apply(layer(x)[0], x).sum().backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_selective_checkpointing_sees_the_operators(device: str) -> None:
    """A policy that saves the layer's operator is asked, and the layer is not computed again."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    layer, x = layer_on(device), torch.randn(9, 32, device=device, requires_grad=True)
    seen = []

    def policy(_ctx: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        seen.append(str(operator))
        return CheckpointPolicy.MUST_SAVE if "triton_moe" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    def run_layer(x: Tensor) -> Tensor:
        return layer(x)[0]

    out = checkpoint(run_layer, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    out.square().sum().backward()  # type: ignore[union-attr]
    assert "triton_moe.moe_layer.default" in seen
    expected = torch.autograd.grad(layer(x)[0].square().sum(), x)[0]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_functional_call(device: str) -> None:
    layer, x = layer_on(device), torch.randn(9, 32, device=device)
    others = {name: 2 * value.detach() for name, value in layer.named_parameters()}
    out = torch.func.functional_call(layer, others, (x,))[0]
    layer.load_state_dict(others)
    assert torch.equal(out, layer(x)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # make_dual's own import
def test_forward_mode_raises(device: str) -> None:
    layer, x = layer_on(device), torch.randn(9, 32, device=device)
    message = "the kernels have no forward-mode derivatives"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))
