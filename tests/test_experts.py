"""Experts behind a router of one's own, a shared expert beside the routed ones, null experts with one logit."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from triton_moe import DenseMLP, ExpertLayout, Experts, MoEConfig, MoEMLP, moe_mlp, reference
from triton_moe.activations import ACTIVATIONS, is_gated
from triton_moe.router import router_logits, select_experts, weigh_experts
from triton_moe.testing import BIASES, Case, check_against_oracle, make_inputs, poison_empty

H = 16
SIZES = [(2, 8), (2, 0), (2, 24), (1, 0)]
LAYOUT = ExpertLayout.from_sizes(SIZES)


class NoisyRouter(nn.Module):
    """A user's module: it adds noise to the logits in training, and takes the rest from the package."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(LAYOUT.num_experts, H) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = router_logits(x, self.weight)
        scores = (logits + 0.1 * torch.randn_like(logits) if self.training else logits).softmax(-1)
        ids = select_experts(scores, 2)
        return weigh_experts(scores, ids).to(x.dtype), ids


@pytest.mark.parametrize("layer", [True, False], ids=["Experts", "moe_mlp"])
@pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
def test_a_router_of_ones_own(activation: str, layer: bool, device: str) -> None:
    """Output and every gradient, the router's too, are those of plain PyTorch behind the same noise."""
    torch.manual_seed(0)
    backend = "triton" if device == "cpu" else "auto"
    experts = Experts(LAYOUT, H, activation, device=device, backend=backend)
    router = NoisyRouter().to(device)
    assert set(experts.state_dict()) == {"w1", "w2", *(["w3"] if activation == "swiglu" else [])}
    x, dout = (torch.randn(2, 9, H, device=device) for _ in range(2))
    x.requires_grad_()
    options = {"layout": LAYOUT, "activation": activation}

    def ours(weights: Tensor, ids: Tensor) -> Tensor:
        if layer:
            return experts(x, weights, ids)
        return moe_mlp(x.view(-1, H), weights, ids, experts.w1, experts.w2, experts.w3, backend=backend, **options)

    def plain(weights: Tensor, ids: Tensor) -> Tensor:
        return reference.moe_mlp(x.view(-1, H), weights, ids, experts.w1, experts.w2, experts.w3, **options)

    results = []
    for run in (ours, plain):
        torch.manual_seed(1)  # for the noise
        out = run(*router(x.view(-1, H))).view(x.shape)
        of = {"x": x, **dict(router.named_parameters()), **dict(experts.named_parameters())}
        grads = torch.autograd.grad((out * dout).sum(), list(of.values()))
        results.append({"out": out, **dict(zip(of, grads, strict=True))})
    assert results[1]["weight"].abs().max() > 0.01
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.pairs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_is_moe_mlp(activation: str, bias: bool, device: str, dtype: torch.dtype) -> None:
    """Output and gradients within the budget, the module's weights taken from the inputs."""
    pytest.importorskip("triton")
    case = Case(21, H, LAYOUT.widths, 2, activation, bias=bias, reason="null experts among others")
    inputs = make_inputs(case, dtype, device)
    experts = Experts(LAYOUT, H, activation, bias=bias, device=device, dtype=dtype, backend="triton")

    def run(x, topk_weights, topk_ids, w1, w2, w3, *, layout, activation, **biases):
        weights = {"w1": w1, "w2": w2, **biases} | ({} if w3 is None else {"w3": w3})
        assert set(weights) == set(experts.state_dict())
        return torch.func.functional_call(experts, weights, (x, topk_weights, topk_ids))

    with poison_empty():
        check_against_oracle(run, inputs)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_layer_with_biases(activation: str) -> None:
    """They start at 0, where the layer is the one without; each has a gradient; and the shared expert has none."""
    torch.manual_seed(0)
    layer = MoEMLP(MoEConfig(SIZES, 2, H, activation=activation, bias=True, shared_width=4))
    other = MoEMLP(MoEConfig(SIZES, 2, H, activation=activation, shared_width=4))
    names = {"b1", "b2", "b3"} if activation == "swiglu" else {"b1", "b2"}
    assert set(layer.state_dict()) == {*other.state_dict(), *names}
    assert layer.b2 is not None
    assert layer.b2.shape == (LAYOUT.num_experts, H)
    for name in names:
        assert not getattr(layer, name).any()
    other.load_state_dict({name: value for name, value in layer.state_dict().items() if name not in names})
    x = torch.randn(5, H)
    assert torch.equal(layer(x)[0], other(x)[0])
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert all(getattr(layer, name).grad.any() for name in names)
    with pytest.raises(ValueError, match="bias: expected one of True, False, got 1"):
        MoEConfig(SIZES, 2, H, bias=1)  # type: ignore[arg-type]


def test_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="options: expected backend, activation_memory and recompute, got top_k"):
        Experts(LAYOUT, H, top_k=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Experts([(4, 8)], H), r"layout: expected an ExpertLayout, got \[\(4, 8\)\]"),  # type: ignore[arg-type]
        (lambda: Experts(LAYOUT, 0), "hidden_size: expected an integer of 1 or more, got 0"),
        (lambda: Experts(LAYOUT, 16.0), "hidden_size: expected an integer of 1 or more, got 16.0"),  # type: ignore[arg-type]
        (lambda: Experts(LAYOUT, H, bias="none"), "bias: expected one of True, False, got 'none'"),  # type: ignore[arg-type]
        (lambda: Experts(LAYOUT, H, backend="tritn"), "backend: expected one of auto, .*, got 'tritn'"),
        (lambda: Experts(LAYOUT, H, recompute="no"), "recompute: expected one of True, False, got 'no'"),
        (lambda: DenseMLP(H, 0), "width: expected an integer of 1 or more, got 0"),
        (lambda: DenseMLP(-1, 8), "hidden_size: expected an integer of 1 or more, got -1"),
        (lambda: MoEMLP({"hidden_size": H}), "config: expected a MoEConfig, got {'hidden_size'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_built(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_modules_from_the_meta_device() -> None:
    """By the method that PyTorch's own modules have, each of them."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(H, H), DenseMLP(H, 8, "swiglu"), Experts(LAYOUT, H, bias=True))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    for module in model:
        module.reset_parameters()  # type: ignore[operator]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_mlp_is_an_expert_for_all_tokens(activation: str) -> None:
    torch.manual_seed(0)
    mlp, layout = DenseMLP(H, 24, activation, dtype=torch.float64), ExpertLayout((24,))
    x = torch.randn(2, 5, H, dtype=torch.float64)
    ones, ids = torch.ones(10, 1, dtype=torch.float64), torch.zeros(10, 1, dtype=torch.int64)
    expected = reference.moe_mlp(x.view(-1, H), ones, ids, mlp.w1, mlp.w2, mlp.w3, layout=layout, activation=activation)
    torch.testing.assert_close(mlp(x), expected.view(x.shape))
    assert (mlp.w3 is not None) == is_gated(activation)


@pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
def test_a_shared_expert_is_added(activation: str) -> None:
    torch.manual_seed(0)
    config = MoEConfig(SIZES, 2, H, activation=activation, shared_width=12)
    layer, routed = MoEMLP(config), MoEMLP(MoEConfig(SIZES, 2, H, activation=activation))
    own = {name: value for name, value in layer.state_dict().items() if not name.startswith("shared.")}
    routed.load_state_dict(own, strict=True)
    names = {"shared.w1", "shared.w2", *(["shared.w3"] if activation == "swiglu" else [])}
    assert set(layer.state_dict()) == {*own, *names}
    x = torch.randn(3, 5, H)
    assert layer.shared is not None
    assert torch.equal(layer(x)[0], routed(x)[0] + layer.shared(x))
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
def test_null_experts_with_one_logit(activation: str) -> None:
    """The layer is one whose null experts' router rows are equal, and its row's gradient the sum of theirs."""
    torch.manual_seed(0)
    layer = MoEMLP(MoEConfig(SIZES, 3, H, activation=activation, shared_null_logit=True))
    rows = [0, 1, 4, 4, 2, 3, 4]
    other = MoEMLP(MoEConfig(SIZES, 3, H, activation=activation))
    state = copy.deepcopy(layer.state_dict())
    assert state["router.weight"].shape == (5, H)
    other.load_state_dict(state | {"router.weight": state["router.weight"][rows]}, strict=True)
    x = torch.randn(4, 8, H)
    results = []
    for module in (layer, other):
        out, aux, f = module(x)
        (out.square().sum() + aux["load_balance_loss"] + aux["router_z_loss"] + aux["compute_loss"]).backward()
        results.append((out, f, *aux.values()))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
    assert layer.router.weight.grad is not None
    assert other.router.weight.grad is not None
    expected = torch.zeros(5, H).index_add(0, torch.tensor(rows), other.router.weight.grad)
    torch.testing.assert_close(layer.router.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_all_options_from_meta() -> None:
    config = MoEConfig(SIZES, 2, H, activation="swiglu", bias=True, shared_null_logit=True, shared_width=12)
    layer = MoEMLP(config, device="meta")
    with poison_empty():
        layer.to_empty(device="cpu")
    layer.init_params()
    layer._init_buffers()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert all(bool(parameter.any()) != (name in BIASES) for name, parameter in layer.named_parameters())
    assert layer(torch.randn(5, H))[0].isfinite().all()
