import math

import pytest
import torch

from triton_moe.layout import ExpertLayout
from triton_moe.losses import (
    compute_loss,
    load_balance_loss,
    mean_over_tokens,
    router_z_loss,
    sequence_load_balance_loss,
)

SIZES = {
    "uniform": [(6, 32)],
    "one expert": [(1, 32)],
    "two classes": [(4, 32), (2, 100)],
    "a class in two places": [(2, 32), (3, 8), (2, 32)],
    "a singleton among classes": [(2, 32), (1, 77), (3, 5)],
    "all singletons": [(1, 9), (1, 11), (1, 13)],
    "null experts": [(4, 32), (3, 0)],
    "one null expert": [(4, 32), (1, 0)],
}
layouts = pytest.mark.parametrize("layout", [ExpertLayout.from_sizes(sizes) for sizes in SIZES.values()], ids=SIZES)


def _scores(layout, T=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(T, layout.num_experts, generator=generator, dtype=dtype)
    f = torch.rand(layout.num_experts, generator=generator, dtype=dtype)
    return probs, f / f.sum()


def _load_balance_by_definition(probs, f, widths):
    E, T = len(widths), len(probs)
    p = [sum(probs[t][e] for t in range(T)) / T for e in range(E)]
    if len(set(widths)) == 1:
        return E * sum(f[e] * p[e] for e in range(E))
    terms = []
    for width in set(widths):
        members = [e for e in range(E) if widths[e] == width]
        if len(members) > 1:
            terms.append(len(members) * sum(f[e] * p[e] for e in members))
    if not terms:
        return sum(f[e] * p[e] for e in range(E))
    return sum(terms) / len(terms)


@layouts
def test_load_balance_loss_is_its_definition(layout):
    probs, f = _scores(layout)
    expected = _load_balance_by_definition(probs.tolist(), f.tolist(), layout.widths)
    assert load_balance_loss(probs, f, layout).item() == pytest.approx(expected, rel=1e-12)


def _choices(layout, T, K=2):
    return torch.rand(T, layout.num_experts, generator=torch.Generator().manual_seed(1)).topk(K).indices


@layouts
@pytest.mark.parametrize("sequence_length", [1, 4, 12])
def test_sequence_load_balance_loss_is_its_definition(layout, sequence_length):
    if layout.num_experts < 2:
        layout = ExpertLayout((32, 32))
    (probs, _), ids = _scores(layout, T=12), _choices(layout, 12)
    losses = []
    for first in range(0, 12, sequence_length):
        own = ids[first : first + sequence_length].flatten().tolist()
        f = [own.count(e) / len(own) for e in range(layout.num_experts)]
        rows = [[p / sum(row) for p in row] for row in probs[first : first + sequence_length].tolist()]
        losses.append(_load_balance_by_definition(rows, f, layout.widths))
    for dtype in (torch.int32, torch.int64):
        loss = sequence_load_balance_loss(probs, ids.to(dtype), sequence_length, layout)
        assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_even_sequences_pull_at_no_score():
    """Whatever the scores, which as sigmoids add up to any number."""
    layout, ids = ExpertLayout((8,) * 6), torch.arange(12).view(6, 2) % 6
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss = sequence_load_balance_loss(logits.sigmoid(), ids, 3, layout)
    assert loss.item() == pytest.approx(1)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, f, ids, layout: router_z_loss(p[None]), r"logits: expected \(T, E\), got shape \(1, 6, 4\)"),
        (lambda p, f, ids, layout: load_balance_loss(p[None], f, layout), r"probs: expected \(T, 4\) or \(4,\), got"),
        (lambda p, f, ids, layout: load_balance_loss(p, f[:3], layout), r"f: expected \(4,\), got shape \(3,\)"),
        (lambda p, f, ids, layout: compute_loss(p[:, :3], layout), r"probs: .*, got shape \(6, 3\)"),
        (lambda p, f, ids, layout: sequence_load_balance_loss(p[0], ids, 2, layout), r"topk_ids: expected \(T, K\)"),
        (lambda p, f, ids, layout: sequence_load_balance_loss(p, ids[:5], 2, layout), "topk_ids: .*, got shape"),
        (
            lambda p, f, ids, layout: sequence_load_balance_loss(p, ids, 4, layout),
            "sequence_length: expected an int that divides T = 6, got 4",
        ),
        (lambda p, f, ids, layout: sequence_load_balance_loss(p, ids, True, layout), "sequence_length: .*, got True"),
    ],
)
def test_shapes_that_would_mean_something_else(call, message):
    layout = ExpertLayout((8,) * 4)
    with pytest.raises(ValueError, match=f"^{message}"):
        call(*_scores(layout, T=6), _choices(layout, 6), layout)


def test_sequence_load_balance_loss_without_tokens():
    layout, weight = ExpertLayout((8, 8)), torch.ones((), requires_grad=True)
    loss = sequence_load_balance_loss(torch.zeros(0, 2) * weight, torch.zeros(0, 1).long(), 4, layout)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, weight)[0].item() == 0


@layouts
def test_compute_loss_is_its_definition(layout):
    probs, _ = _scores(layout)
    mean_width = sum(layout.widths) / len(layout.widths)
    rows = [sum(p * width / mean_width for p, width in zip(row, layout.widths, strict=True)) for row in probs.tolist()]
    assert compute_loss(probs, layout).item() == pytest.approx(sum(rows) / len(rows), rel=1e-12)


def test_router_z_loss_is_its_definition():
    logits = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits.tolist()]
    assert router_z_loss(logits).item() == pytest.approx(sum(rows) / len(rows), rel=1e-12)


def test_router_z_loss_of_large_logits_is_finite():
    assert router_z_loss(torch.full((2, 4), 1000.0)).item() == pytest.approx((1000 + math.log(4)) ** 2, rel=1e-6)


def test_even_use_of_uniform_experts_costs_one():
    layout = ExpertLayout.from_sizes([(8, 16)])
    even = torch.full((3, 8), 1 / 8)
    assert load_balance_loss(even, even[0], layout).item() == pytest.approx(1)
    assert compute_loss(even, layout).item() == pytest.approx(1)


@layouts
def test_the_mean_stands_for_the_scores(layout):
    probs, f = _scores(layout)
    mean = mean_over_tokens(probs)
    assert torch.equal(load_balance_loss(mean, f, layout), load_balance_loss(probs, f, layout))
    assert torch.equal(compute_loss(mean, layout), compute_loss(probs, layout))


@layouts
def test_gradients(layout):
    probs, f = _scores(layout, T=3)
    probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: load_balance_loss(p, f, layout), probs)
    assert torch.autograd.gradcheck(lambda p: compute_loss(p, layout), probs)
    assert torch.autograd.gradcheck(router_z_loss, probs)
    ids = _choices(layout, 3, K=1)
    assert torch.autograd.gradcheck(lambda p: sequence_load_balance_loss(p, ids, 1, layout), probs)


def test_no_gradient_reaches_f():
    layout = ExpertLayout.from_sizes([(4, 16)])
    probs, f = (tensor.requires_grad_() for tensor in _scores(layout))
    load_balance_loss(probs, f, layout).backward()
    assert f.grad is None
    assert probs.grad is not None


@layouts
def test_no_tokens_give_zeros_and_zero_gradients(layout):
    scores = torch.zeros(0, layout.num_experts, requires_grad=True)
    weight = torch.ones((), requires_grad=True)
    f = torch.zeros(layout.num_experts)
    for loss in (
        router_z_loss(scores * weight),
        load_balance_loss(scores * weight, f, layout),
        compute_loss(scores * weight, layout),
    ):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.item() == 0


def test_first_use_in_inference_mode_does_not_spoil_training():
    layout = ExpertLayout.from_sizes([(2, 41), (3, 43)])
    probs, f = _scores(layout)
    with torch.inference_mode():
        load_balance_loss(probs, f, layout)
        compute_loss(probs, layout)
    probs.requires_grad_()
    (load_balance_loss(probs, f, layout) + compute_loss(probs, layout)).backward()
    assert probs.grad is not None


@pytest.mark.parametrize("loss", [load_balance_loss, compute_loss])
def test_compiles_into_one_graph_per_layout(loss):
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for sizes in ([(4, 32), (2, 100)], [(4, 32), (2, 101)], [(3, 7), (3, 8)]):
        layout = ExpertLayout.from_sizes(sizes)
        probs, f = _scores(layout)
        arguments = (probs, f, layout) if loss is load_balance_loss else (probs, layout)
        torch.testing.assert_close(compiled(*arguments), loss(*arguments))


def test_tables_are_copied_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, probs = ExpertLayout((8, 8, 24)), torch.rand(5, 3)
    f = torch.rand(3)
    first = load_balance_loss(probs, f, layout), compute_loss(probs, layout)
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: pytest.fail("made anew"))
    second = load_balance_loss(probs, f, layout), compute_loss(probs, layout)
    assert first == second
