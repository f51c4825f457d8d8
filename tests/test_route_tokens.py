"""The fused router against its definition: choice, weights, losses, statistics, gradients."""

from typing import Any

import pytest
import torch
from conftest import KERNEL_DTYPES
from torch import Tensor

from triton_moe.kernels import router as kernels
from triton_moe.kernels.router import multiplies
from triton_moe.layout import ExpertLayout
from triton_moe.losses import compute_loss, load_balance_loss, router_z_loss
from triton_moe.ops import router as ops
from triton_moe.router import ROUTERS, RouterOutput, route_tokens, router_logits, router_scores
from triton_moe.testing import assert_within_budget, poison_empty

LAYOUT = ExpertLayout.from_sizes([(3, 16), (2, 8), (1, 5), (1, 0)])
E, H = LAYOUT.num_experts, 40
LOSSES = ("router_z_loss", "load_balance_loss", "compute_loss")


def tensors(T: int, dtype: torch.dtype, device: str, num_experts: int = E, H: int = H) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(T, H, generator=generator)
    weight = torch.randn(num_experts, H, generator=generator) / H**0.5
    return x.to(device, dtype), weight.to(device, dtype)


def by_definition(
    x: Tensor, weight: Tensor, topk_ids: Tensor, router: str, normalize: bool, layout: ExpertLayout = LAYOUT,
    scale: float = 1.0,
) -> RouterOutput:  # fmt: skip
    """For a given choice, in the dtype of x (fp32 if that has 16 bits)."""
    logits = router_logits(x, weight)
    probs = router_scores(logits, router)
    chosen = probs.gather(1, topk_ids.long())
    weights = chosen / (chosen.sum(1, keepdim=True) + 1e-20) if normalize else chosen
    f = torch.bincount(topk_ids.flatten(), minlength=layout.num_experts).to(probs) / max(topk_ids.numel(), 1)
    losses = router_z_loss(logits), load_balance_loss(probs, f, layout), compute_loss(probs, layout)
    zero = logits.new_zeros(())
    largest, mean = (logits.abs().max(), logits.mean()) if logits.numel() else (zero, zero)
    weights = (scale * weights).to(x.dtype)
    return RouterOutput(weights, topk_ids, f.to(x.dtype), f, *losses, largest.detach(), mean.detach())


def forward_backward(function: Any, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Results and gradients, from a gradient of the weights and of each loss."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    routed = function(x, weight)
    slots = torch.arange(routed.topk_weights.numel(), device=x.device).view_as(routed.topk_weights)
    loss = (routed.topk_weights * (slots * 0.7).cos().to(x.dtype)).to(routed.router_z_loss.dtype).sum()
    for i, name in enumerate(LOSSES):
        loss = loss + (i + 1) * getattr(routed, name)
    loss.backward()
    assert x.grad is not None
    assert weight.grad is not None
    results = {name: value for name, value in routed._asdict().items() if name != "topk_ids"}
    return {**results, "dx": x.grad, "dweight": weight.grad}


@pytest.mark.pairs
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("T", "K"), [(50, 2), (1, 1), (33, 7), (0, 2)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_matches_the_definition(
    router: str, normalize: bool, T: int, K: int, scale: float, device: str, dtype: torch.dtype
) -> None:
    x, weight = tensors(T, dtype, device)
    options: dict[str, Any] = {"router": router, "normalize_weights": normalize, "weights_scale": scale}

    def ours(x: Tensor, weight: Tensor) -> RouterOutput:
        return route_tokens(x, weight, layout=LAYOUT, num_active_experts=K, backend="triton", **options)

    def definition(x: Tensor, weight: Tensor) -> RouterOutput:
        return by_definition(x, weight, topk_ids, router, normalize, scale=scale)

    with poison_empty():
        actual = forward_backward(ours, x, weight)
    topk_ids = ours(x, weight).topk_ids
    scores = router_scores(router_logits(x, weight), router)
    assert torch.equal(topk_ids.long(), scores.sort(dim=1, descending=True, stable=True).indices[:, :K])
    plain = forward_backward(definition, x, weight)
    truth = forward_backward(definition, x.double(), weight.double())
    assert_within_budget(actual, truth, plain, eps_dtype=dtype, name="route_tokens")


ASKED = [(1, 8), (16, 64), (60, 200), (128, 256)]
"""Numbers of experts, and H, of which the kernels multiply."""
HALVES = [dtype for dtype in KERNEL_DTYPES if dtype.itemsize == 2]


def strided(num_experts: int, hidden_size: int, dtype: torch.dtype, device: str) -> tuple[ExpertLayout, Tensor, Tensor]:
    """Several tiles of tokens, and rows that are apart."""
    x, weight = tensors(150, dtype, device, num_experts, 2 * hidden_size)
    return ExpertLayout((8,) * num_experts), x[:, :hidden_size], weight[:, :hidden_size]


@pytest.mark.parametrize(("num_experts", "hidden_size"), ASKED)
@pytest.mark.parametrize("half", HALVES)
def test_the_kernels_multiply(num_experts: int, hidden_size: int, half: torch.dtype, device: str) -> None:
    layout, x, weight = strided(num_experts, hidden_size, half, device)
    assert multiplies(x, num_experts)

    def ours(x: Tensor, weight: Tensor) -> RouterOutput:
        return route_tokens(x, weight, layout=layout, num_active_experts=min(2, num_experts), backend="triton")

    def definition(x: Tensor, weight: Tensor) -> RouterOutput:
        return by_definition(x, weight, topk_ids, "sigmoid", True, layout)

    with poison_empty():
        actual, topk_ids = forward_backward(ours, x, weight), ours(x, weight).topk_ids
    assert torch.equal(ours(x, weight.float()).topk_ids, topk_ids)
    plain, truth = forward_backward(definition, x, weight), forward_backward(definition, x.double(), weight.double())
    assert_within_budget(actual, truth, plain, eps_dtype=half, name="route_tokens")


@pytest.mark.parametrize(("num_experts", "hidden_size"), ASKED)
@pytest.mark.parametrize("half", HALVES)
def test_who_multiplies_makes_no_difference(
    num_experts: int, hidden_size: int, half: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to the choice nor to a gradient of x that the router's is added to."""
    layout, x, weight = strided(num_experts, hidden_size, half, device)
    options = layout.widths, min(2, num_experts), False, True, 1.0, True
    other_dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device, half)

    def ids_and_dx() -> tuple[Tensor, Tensor]:
        _, ids, _, load, *_ = ops.forward(x, weight, None, *options)
        one, dx = torch.ones((), device=device), other_dx.clone()
        dweights = torch.ones(ids.shape, dtype=half, device=device)
        assert ops.gradients_onto(dx, x, weight, ids, load, dweights, one, one, one, (True, False), *options) == []
        return ids, dx

    ids, dx = ids_and_dx()
    assert not torch.equal(dx, other_dx)
    monkeypatch.setattr(kernels, "_MAX_H", 0)
    assert not multiplies(x, num_experts)
    expected_ids, expected_dx = ids_and_dx()
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(dx, expected_dx)


def test_a_bias_changes_the_choice_but_not_the_weights(device: str) -> None:
    x, weight = tensors(20, torch.float32, device)
    bias = torch.tensor([0.0, 0.0, 10.0, 0.0, 0.0, 5.0, 0.0], device=device)
    routed = route_tokens(x, weight, bias, layout=LAYOUT, num_active_experts=2, backend="triton")
    assert torch.equal(routed.topk_ids, torch.tensor([[2, 5]], device=device).expand(20, 2).int())
    scores = router_logits(x, weight).sigmoid()[:, [2, 5]]
    torch.testing.assert_close(routed.topk_weights, scores / scores.sum(1, keepdim=True))


def test_equal_scores_go_to_the_lowest_ids(device: str) -> None:
    x, weight = torch.ones(3, H, device=device), torch.zeros(E, H, device=device)
    routed = route_tokens(x, weight, layout=LAYOUT, num_active_experts=3, backend="triton")
    assert routed.topk_ids.tolist() == [[0, 1, 2]] * 3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy, of NaN
def test_nan_stays_with_its_token(device: str) -> None:
    x, weight = tensors(5, torch.float32, device)
    expected = route_tokens(x, weight, layout=LAYOUT, num_active_experts=2, backend="triton")
    x[3] = torch.nan
    routed = route_tokens(x, weight, layout=LAYOUT, num_active_experts=2, backend="triton")
    assert routed.topk_weights[3].isnan().all()
    assert routed.topk_ids[3].tolist() == [0, 1]
    others = [0, 1, 2, 4]
    assert torch.equal(routed.topk_weights[others], expected.topk_weights[others])
    assert routed.router_logits_abs_max.isnan()


@pytest.mark.parametrize("num_experts", [1, 512, 513])
def test_number_of_experts(num_experts: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 512 in the kernel, more in PyTorch."""
    from triton_moe.kernels.tuning import forget
    from triton_moe.ops import router

    calls: list[None] = []
    kernel = router.router_fwd
    monkeypatch.setattr(router, "router_fwd", lambda *args: (calls.append(None), kernel(*args))[1])
    forget()  # a repeated call would not come by here
    layout = ExpertLayout((8,) * num_experts)
    x, weight = tensors(6, torch.float32, device, num_experts)
    K = min(8, num_experts)
    routed = route_tokens(x, weight, layout=layout, num_active_experts=K, backend="triton")
    assert len(calls) == (num_experts <= 512)
    expected = by_definition(x, weight, routed.topk_ids, "sigmoid", True, layout)
    scores = router_logits(x, weight).sigmoid()
    assert torch.equal(scores.gather(1, routed.topk_ids.long()), scores.topk(K).values)
    for name, value in routed._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("num_experts", [512, 513])
def test_gradients_of_many_experts(num_experts: int, router: str, device: str) -> None:
    """Those of autograd through the formulas, in the kernel (512) and in PyTorch (513)."""
    layout = ExpertLayout(tuple(8 + e % 3 for e in range(num_experts)))
    x, weight = tensors(6, torch.float32, device, num_experts)

    def ours(x: Tensor, weight: Tensor) -> RouterOutput:
        return route_tokens(x, weight, layout=layout, num_active_experts=8, router=router, backend="triton")

    topk_ids = ours(x, weight).topk_ids

    def formulas(x: Tensor, weight: Tensor) -> RouterOutput:
        logits = x @ weight.t()
        probs = logits.sigmoid() if router == "sigmoid" else logits.softmax(1)
        chosen = probs.gather(1, topk_ids.long())
        f = torch.nn.functional.one_hot(topk_ids.long(), num_experts).sum((0, 1)).to(x) / topk_ids.numel()
        widths, sizes = (torch.tensor(values).to(x) for values in (layout.widths, layout.num_rivals))
        losses = (
            logits.logsumexp(1).square().mean(),
            (sizes * f * probs.mean(0)).sum() / 3,
            (widths * probs.mean(0)).sum() / widths.mean(),
        )
        statistics = logits.detach().abs().max(), logits.detach().mean()
        return RouterOutput(chosen / chosen.sum(1, keepdim=True), topk_ids, f, f, *losses, *statistics)

    actual, plain = forward_backward(ours, x, weight), forward_backward(formulas, x, weight)
    truth = forward_backward(formulas, x.double(), weight.double())
    assert_within_budget(actual, truth, plain, eps_dtype=torch.float32, name="route_tokens")


def test_without_aux_losses_they_are_zero(device: str) -> None:
    x, weight = tensors(20, torch.float32, device)
    whole = route_tokens(x, weight, layout=LAYOUT, num_active_experts=2, backend="triton")
    routed = route_tokens(x, weight, layout=LAYOUT, num_active_experts=2, aux_losses=False, backend="triton")
    assert all(torch.equal(getattr(routed, name), getattr(whole, name)) for name in ("topk_weights", "topk_ids", "f"))
    names = (*LOSSES, "router_logits_abs_max", "router_logits_mean")
    assert not any(getattr(routed, name) for name in names)
    assert all(getattr(whole, name) for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3)}, r"x: expected a float tensor \(T, H\), got torch.float32 of shape \(3,\)"),
        ({"x": torch.zeros(3, H).long()}, "x: expected a float tensor"),
        ({"weight": torch.zeros(E, H + 1)}, rf"weight: expected floats of shape \({E}, {H}\)"),
        ({"bias": torch.zeros(E + 1)}, rf"bias: expected floats of shape \({E},\)"),
        ({"bias": torch.zeros(E, device="meta")}, "bias: expected a tensor on cpu, got meta"),
        ({"num_active_experts": 0}, f"num_active_experts: expected 1 <= K <= E = {E}, got 0"),
        ({"num_active_experts": E + 1}, f"num_active_experts: expected 1 <= K <= E = {E}, got {E + 1}"),
        ({"layout": (8, 8)}, "layout: expected an ExpertLayout, got tuple"),
        ({"num_active_experts": 1.0}, f"num_active_experts: expected 1 <= K <= E = {E}, got 1.0"),
        ({"normalize_weights": 1}, "normalize_weights: expected True or False, got 1"),
        ({"aux_losses": "no"}, "aux_losses: expected True or False, got 'no'"),
        ({"weights_scale": "2"}, "weights_scale: expected a finite number, got '2'"),
        ({"weights_scale": float("nan")}, "weights_scale: expected a finite number, got nan"),
        ({"sequence_length": 2}, "sequence_length: expected an int that divides T = 3, got 2"),
        ({"sequence_length": 3.0}, "sequence_length: expected an int that divides T = 3, got 3.0"),
        ({"groups": (2, 1)}, r"groups: expected a GroupLimit or None, got \(2, 1\)"),
        ({"router": "tanh"}, "router: expected one of sigmoid, softmax, got 'tanh'"),
        ({"backend": "cuda"}, "backend: expected one of auto, hopper, triton, torch, got 'cuda'"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(3, H), "weight": torch.zeros(E, H), "layout": LAYOUT, "num_active_experts": 2}
    with pytest.raises(ValueError, match=message):
        route_tokens(**{**arguments, **changes})


def test_a_strided_bias(device: str) -> None:
    x, weight = tensors(20, torch.float32, device)
    table = torch.zeros(E, 3, device=device)
    table[5, 1] = 10.0
    routed = route_tokens(x, weight, table[:, 1], layout=LAYOUT, num_active_experts=1, backend="triton")
    assert (routed.topk_ids == 5).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_losses_that_are_off_have_no_gradient(backend: str, device: str) -> None:
    x, weight = (tensor.requires_grad_() for tensor in tensors(20, torch.float32, device))
    routed = route_tokens(x, weight, layout=LAYOUT, num_active_experts=2, aux_losses=False, backend=backend)
    (0 * routed.topk_weights.sum() + sum(getattr(routed, name) for name in LOSSES)).backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_backward_pass_under_autocast_rounds_nothing(backend: str, device: str) -> None:
    x, weight = tensors(20, torch.float32, device)

    def gradients(autocasts: bool) -> list[Tensor | None]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        routed = route_tokens(*leaves, layout=LAYOUT, num_active_experts=2, backend=backend)
        with torch.autocast(device, torch.bfloat16, enabled=autocasts):
            (routed.topk_weights.sum() + routed.router_z_loss).backward()
        return [leaf.grad for leaf in leaves]

    for actual, expected in zip(gradients(autocasts=True), gradients(autocasts=False), strict=True):
        assert expected is not None
        assert actual is not None
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_the_losses_alone_over_many_tokens(router: str, device: str, dtype: torch.dtype) -> None:
    """Each token's share is small: that of float16 would be lost in its own dtype."""
    x, weight = tensors(4096, dtype, device)

    def dweight(function: Any, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = weight.to(kind, copy=True).requires_grad_()
        routed = function(x.to(kind), leaf)
        (1e-2 * routed.load_balance_loss + 1e-3 * routed.router_z_loss).backward()
        assert leaf.grad is not None
        return leaf.grad, routed.topk_ids

    def ours(x: Tensor, weight: Tensor) -> RouterOutput:
        return route_tokens(x, weight, layout=LAYOUT, num_active_experts=2, router=router, backend="triton")

    def definition(x: Tensor, weight: Tensor) -> RouterOutput:
        return by_definition(x, weight, topk_ids, router, True)

    actual, topk_ids = dweight(ours, dtype)
    (plain, _), (truth, _) = dweight(definition, dtype), dweight(definition, torch.float64)
    assert_within_budget(actual, truth, plain, eps_dtype=dtype, name="dweight")
