"""The layer among PyTorch's other features: checkpointing, frozen weights, retained graphs, memory options."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from operators import inputs_for
from triton_moe import ExpertLayout, MoEConfig, MoEMLP, moe_mlp
from triton_moe.testing import Case, run

pytest.importorskip("triton")

CASE = Case(50, 32, (16, 24, 0, 40), 2, "swiglu", reason="the usual")


def layer_on(device: str, **changes: Any) -> MoEMLP:
    torch.manual_seed(0)
    options: dict[str, Any] = {"activation": "swiglu", "backend": "triton", **changes}
    return MoEMLP(MoEConfig([(2, 16), (1, 5), (2, 40)], 2, 32, **options), device=device)


def kernels(*args: Any, **kwargs: Any) -> Tensor:
    return moe_mlp(*args, backend="triton", **kwargs)


LOSSES = ("router_z_loss", "load_balance_loss", "compute_loss")
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
    """x and the exact pre-activation, within 5%, and 20 bytes a row; with recompute, x and those; the router's logits
    beside them."""
    T, K, H = 512, 2, 32
    x = torch.randn(T, H, device=device, requires_grad=True)
    layer = layer_on(device, activation_memory="exact", aux_losses=False)
    _, _, f = layer(x)
    rows = (f * T * K).round().tolist()
    pre = sum(2 * n * width for n, width in zip(rows, layer.layout.widths, strict=True))
    element, router = 4, 4 * T * layer.layout.num_experts
    assert saved_bytes(layer, x) <= 1.05 * element * (T * H + pre) + 20 * T * K + router
    layer = layer_on(device, recompute=True, aux_losses=False)
    assert saved_bytes(layer, x) <= element * T * H + 20 * T * K + router + 2048


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
    from triton_moe.ops import moe_mlp as operator
    from triton_moe.ops import up_backward

    calls = []
    dw = operator.grouped_gemm_dw
    for module in (operator, up_backward):
        monkeypatch.setattr(module, "grouped_gemm_dw", lambda *args: (calls.append(1), dw(*args)))
    layer = layer_on(device)
    x = torch.randn(40, 32, device=device, requires_grad=True)
    layer(x)[0].sum().backward()
    assert len(calls) == 2
    expected, x.grad = x.grad, None
    layer.zero_grad()
    for weight in (layer.w1, layer.w2, layer.w3):
        assert weight is not None
        weight.requires_grad_(False)
    layer(x)[0].sum().backward()
    assert len(calls) == 2
    assert layer.router.weight.grad is not None
    assert layer.w1.grad is None
    assert expected is not None
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_keeps_nothing_and_training_may_follow(mode: Any, device: str) -> None:
    layer, x = layer_on(device), torch.randn(60, 32, device=device)  # too many to be decoding
    with mode():
        out, _, _ = layer(x)
    trained, _, _ = layer(x)
    assert torch.equal(out, trained)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_swapped_storage_is_seen(device: str) -> None:
    """Nothing keeps a pointer from one call to the next."""
    layer, other, x = layer_on(device), layer_on(device), torch.randn(40, 32, device=device)
    layer(x)
    with torch.no_grad():
        for mine, new in zip(layer.parameters(), other.parameters(), strict=True):
            new.normal_()
            mine.data = new.detach().clone()
    assert torch.equal(layer(x)[0], other(x)[0])


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


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # make_dual's own import
def test_forward_mode_raises(device: str) -> None:
    layer, x = layer_on(device), torch.randn(9, 32, device=device)
    message = "the kernels have no forward-mode derivatives"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))
