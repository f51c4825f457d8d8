"""`MoEMLP` in the place of the first users' own layer: state dict, numbers, meta device, optimizers, training."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from first_user import FirstUserMoE
from triton_moe import BiasBalancing, MoEConfig, MoEMLP
from triton_moe.testing import assert_within_budget, poison_empty

H = 24
LAYERS = {
    "uniform": ([(6, 16)], 3),
    "two widths": ([(3, 8), (3, 40)], 2),
    "null experts": ([(4, 16), (2, 0)], 2),
    "all of another width": ([(1, 9), (1, 11), (1, 13)], 2),
    "a singleton among classes": ([(2, 16), (1, 5), (2, 40)], 2),
}
LOSSES = ("router_z_loss", "load_balance_loss", "compute_loss")
layers = pytest.mark.parametrize(("sizes", "top_k"), list(LAYERS.values()), ids=list(LAYERS))
biases = pytest.mark.parametrize("smebu", [False, True], ids=["", "smebu"])
activations = pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "Muon": torch.optim.Muon,
}

SMEBU: dict[str, Any] = {"speed": 0.05, "kappa": 3.0, "beta": 0.75}
"""Fast enough that a few steps change the choice."""
trained = pytest.mark.parametrize(
    ("activation", "smebu"), [("relu_squared", False), ("swiglu", True)], ids=["relu_squared", "swiglu-smebu"]
)


def balancing(smebu: bool) -> BiasBalancing | None:
    return BiasBalancing(**SMEBU, update_in_forward=True) if smebu else None


def pair(sizes, top_k: int, activation: str, smebu: bool = False, **changes) -> tuple[MoEMLP, FirstUserMoE]:
    """Ours and theirs, with their weights; ours moves its bias where theirs does."""
    torch.manual_seed(0)
    theirs = FirstUserMoE(sizes, top_k, H, activation, **(SMEBU if smebu else {}))
    ours = MoEMLP(MoEConfig(sizes, top_k, H, activation=activation, balancing=balancing(smebu), **changes))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def tokens(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 1) -> Tensor:
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def step(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Everything that a layer returns, and every gradient of its output and its losses."""
    x = x.detach().clone().requires_grad_()
    out, aux, f = layer(x)
    dout = tokens(*x.shape[:-1], dtype=x.dtype, device=str(x.device), seed=2)
    loss = (out * dout).to(aux["router_z_loss"].dtype).sum()
    (loss + sum((i + 1) * aux[name] for i, name in enumerate(LOSSES))).backward()
    grads = {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {key: value.detach() for key, value in {"out": out, **aux, "f": f, "dx": x.grad, **grads}.items()}  # type: ignore[union-attr]


def cast(layer: FirstUserMoE, dtype: torch.dtype) -> FirstUserMoE:
    """The parameters alone."""
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    return layer


def check(ours: MoEMLP, theirs: FirstUserMoE, dtype: torch.dtype, device: str) -> None:
    """Three steps: with a bias the later ones choose by what the earlier ones made of it."""
    ours.to(device, dtype)
    plain = cast(theirs.to(device), dtype)
    truth = copy.deepcopy(plain).double()
    for i in range(3):
        x = tokens(2, 13, dtype=dtype, device=device, seed=i)
        for layer in (ours, plain, truth):
            layer.zero_grad()
        with poison_empty():
            actual = step(ours, x)
        expected, exact = step(plain, x), step(truth, x.double())
        exact |= {name: value.double() for name, value in exact.items()}
        assert_within_budget(actual, exact, expected, eps_dtype=dtype, name="MoEMLP")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])


@layers
@activations
@biases
def test_state_dicts_are_exchanged_both_ways(sizes, top_k: int, activation: str, smebu: bool) -> None:
    ours, theirs = pair(sizes, top_k, activation, smebu)
    names = {"router.weight", "w1", "w2"} | ({"w3"} if activation == "swiglu" else set())
    assert set(ours.state_dict()) == names | ({"expert_bias", "expert_bias_momentum"} if smebu else set())
    theirs(tokens(2, 9))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    state = ours.state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    other = FirstUserMoE(sizes, top_k, H, activation, **(SMEBU if smebu else {}))
    other.load_state_dict(state, strict=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.pairs
@layers
@activations
@biases
def test_numbers_on_the_kernels(
    sizes, top_k: int, activation: str, smebu: bool, device: str, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    check(*pair(sizes, top_k, activation, smebu, backend="triton"), dtype, device)


@layers
@activations
@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_in_plain_pytorch(sizes, top_k: int, activation: str, smebu: bool, dtype: torch.dtype) -> None:
    check(*pair(sizes, top_k, activation, smebu, backend="torch"), dtype, "cpu")


def from_meta(config: MoEConfig, device: str = "cpu") -> MoEMLP:
    layer = MoEMLP(config, device="meta")
    with poison_empty():
        layer.to_empty(device=device)
    layer.init_params()
    layer._init_buffers()
    return layer


def test_meta_build_has_the_distribution_of_a_direct_one() -> None:
    """For each expert by itself, so that none starts dead."""
    config = MoEConfig([(3, 40), (3, 200)], 2, 160, activation="swiglu")
    torch.manual_seed(0)
    built = [MoEMLP(config), from_meta(config)]
    for e in range(config.layout.num_experts):
        own = config.layout.columns(e)
        for name in ("w1", "w3", "w2"):
            matrices = [getattr(layer, name)[own] if name == "w2" else getattr(layer, name)[:, own] for layer in built]
            stds = [matrix.std().item() for matrix in matrices]
            assert stds[0] > 0
            assert stds[1] == pytest.approx(stds[0], rel=0.1), (name, e)
            assert abs(matrices[1].mean().item()) < 0.1 * stds[0]
    assert built[1].router.weight.std().item() == pytest.approx(built[0].router.weight.std().item(), rel=0.1)


@trained
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_moves_at_every_step(optimizer: str, activation: str, smebu: bool, device: str) -> None:
    """Matrices all, with a gradient each step; two experts get no tokens."""
    config = MoEConfig([(3, 8), (1, 16)], 1, H, activation=activation, balancing=balancing(smebu))
    layer = from_meta(config, device)
    with torch.no_grad():
        layer.router.weight.zero_()[:2] = torch.stack([torch.ones(H), -torch.ones(H)])
    optimize = OPTIMIZERS[optimizer](layer.parameters())
    for _ in range(2):
        before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
        out, aux, f = layer(tokens(2, 9, device=device))
        assert f[2:].tolist() == [0, 0]
        (out.square().mean() + sum(aux[name] for name in LOSSES)).backward()
        assert all(p.dim() == 2 and p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        optimize.step()
        optimize.zero_grad()
        for name, parameter in layer.named_parameters():
            assert not torch.equal(parameter, before[name]), name


@layers
@trained
def test_trains_fifty_steps_from_a_meta_build(sizes, top_k: int, activation: str, smebu: bool, device: str) -> None:
    """A layer learns what another one computes, every expert with it."""
    torch.manual_seed(0)
    config = MoEConfig(sizes, top_k, H, activation=activation, balancing=balancing(smebu))
    layer, teacher = from_meta(config, device), nn.Linear(H, H).to(device)
    start = copy.deepcopy(layer)
    optimizer, losses = torch.optim.AdamW(layer.parameters(), lr=1e-2), []
    used = torch.zeros(layer.layout.num_experts, device=device)
    for i in range(50):
        x = tokens(2, 32, device=device, seed=i)
        out, aux, f = layer(x)
        loss = (out - teacher(x).detach()).square().mean()
        (loss + 0.05 * aux["load_balance_loss"] + 0.001 * aux["router_z_loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        used += f
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert not smebu or layer.expert_bias.any()
    for e, share in enumerate(used.tolist()):
        own = layer.layout.columns(e)
        assert share > 0, e
        assert layer.layout.widths[e] == 0 or not torch.equal(layer.w2[own], start.w2[own]), e
