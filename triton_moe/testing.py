"""What "correct" means here: the cases, the inputs they stand for, and the error budget.

The tests, the stress run and the benchmarks' correctness gate share this module, so that none has a tolerance of its
own. Letters as in `triton_moe.reference`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload
from unittest import mock

import torch
from torch import Tensor

from triton_moe import reference
from triton_moe.layout import ExpertLayout


@dataclass(frozen=True)
class Case:
    """One shape, and why it is tested.

    `routing` is one of
        random       K distinct experts for each token
        repeated     experts drawn with replacement; the first token has one expert K times
        one expert   every slot on the widest expert
        idle expert  as random, but nobody chooses the first expert; needs K < E
        dropped      as random, but the first token and a third of the other slots have id E
        all dropped  every slot has id E
    """

    num_tokens: int
    hidden_size: int
    widths: tuple[int, ...]
    top_k: int
    activation: str
    routing: str = "random"
    reason: str = field(kw_only=True)


CASES = (
    Case(21, 24, (16, 5, 0, 33), 2, "relu_squared", reason="uneven widths and a null expert"),
    Case(0, 16, (8, 5), 1, "swiglu", reason="zero tokens"),
    Case(1, 24, (16, 5, 8), 2, "swiglu", reason="one token, as in decoding"),
    Case(9, 16, (16, 8, 24), 1, "gelu", "idle expert", reason="an expert with no tokens"),
    Case(19, 16, (8, 20, 5), 1, "silu", "one expert", reason="all tokens on one expert"),
    Case(7, 16, (8, 16, 4), 3, "relu", reason="K = E"),
    Case(11, 16, (16, 8), 1, "gelu_tanh", reason="K = 1"),
    Case(10, 33, (16, 7), 2, "geglu", reason="odd H"),
    Case(13, 1, (3, 9), 1, "silu", reason="H = 1"),
    Case(12, 16, (0, 1, 8, 100), 2, "swiglu", reason="widths 0, 1, 8 and 100"),
    Case(8, 16, (4, 130, 8), 2, "geglu_tanh", reason="one very wide expert"),
    Case(2, 16, (8, 3, 0, 8, 16, 1, 8, 5, 8), 1, "reglu", reason="more experts than rows"),
    Case(15, 16, (8, 16, 5), 2, "relu_squared", "dropped", reason="ids equal to E"),
    Case(5, 16, (8, 5), 2, "swiglu", "all dropped", reason="all slots dropped"),
    Case(10, 16, (8, 16, 5), 3, "silu", "repeated", reason="repeated ids within one token"),
    Case(10, 16, (8, 16), 2, "none", reason="linear experts"),
    Case(50, 70, (33, 64), 1, "relu_squared", reason="several tiles in every dimension"),
)
"""Small enough for a slow interpreter with tiles of 16, and the tests of every operator run all of them."""

_SEED_CONFIGS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "8exp_uniform": (2, [(8, 512)]),
    "8exp_variable": (2, [(4, 512), (4, 256)]),
    "16exp_uniform": (2, [(16, 256)]),
    "16exp_variable": (2, [(4, 512), (8, 256), (4, 128)]),
    "64exp_uniform": (8, [(64, 256)]),
    "64exp_variable": (8, [(16, 512), (32, 256), (16, 128)]),
    "128exp_uniform": (8, [(128, 256)]),
    "128exp_variable": (8, [(32, 512), (64, 256), (32, 128)]),
}


def _seed_case(config: str, activation: str, hidden_size: int = 256) -> Case:
    top_k, sizes = _SEED_CONFIGS[config]
    widths = ExpertLayout.from_sizes(sizes).widths
    reason = f"{config}, {activation}, H = {hidden_size}"
    return Case(4096, hidden_size, widths, top_k, activation, reason=reason)


SEED_CASES = (
    *(_seed_case(config, "relu_squared") for config in _SEED_CONFIGS),
    _seed_case("8exp_variable", "swiglu"),
    _seed_case("64exp_variable", "swiglu"),
    _seed_case("64exp_uniform", "relu_squared", hidden_size=768),
)
"""Full-size configurations, 8 x 512 tokens: for a GPU."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of `moe_mlp`, and `dout (T, H)`, the gradient that comes back."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    w1: Tensor
    w2: Tensor
    w3: Tensor | None
    dout: Tensor
    layout: ExpertLayout
    activation: str


def _draw_ids(case: Case, generator: torch.Generator) -> Tensor:
    """`(T, K)` int64 ids as `case.routing` says."""
    shape, num_experts = (case.num_tokens, case.top_k), len(case.widths)
    scores = torch.rand(case.num_tokens, num_experts, generator=generator)
    match case.routing:
        case "random":
            return scores.argsort(dim=1)[:, : case.top_k]
        case "repeated":
            ids = torch.randint(num_experts, shape, generator=generator)
            ids[:1] = ids[:1, :1]
            return ids
        case "one expert":
            return torch.full(shape, case.widths.index(max(case.widths)))
        case "idle expert":
            return scores[:, 1:].argsort(dim=1)[:, : case.top_k] + 1
        case "dropped":
            ids = scores.argsort(dim=1)[:, : case.top_k]
            ids[torch.rand(shape, generator=generator) < 1 / 3] = num_experts
            ids[:1] = num_experts
            return ids
        case "all dropped":
            return torch.full(shape, num_experts)
    raise ValueError(f"routing: expected one of those that Case lists, got {case.routing!r}")


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    weights_dtype: torch.dtype | None = None,
    ids_dtype: torch.dtype = torch.int32,
) -> Inputs:
    """Inputs at unit scale, the same on every device.

    x and dout are standard normal, w1, w2 and w3 too, divided by the root of their fan-in (`I_e` for expert e's rows of
    w2). topk_weights are positive, sum to 1 for each token, and are fp32 unless `weights_dtype` says otherwise.
    Everything is rounded to its dtype here, so that the fp64 truth is computed from the values that the kernels see.
    """
    layout = ExpertLayout(case.widths)
    generator = torch.Generator().manual_seed(seed)
    shape, packed = (case.num_tokens, case.hidden_size), (case.hidden_size, layout.total_width)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def rounded(tensor: Tensor, to: torch.dtype = dtype) -> Tensor:
        return tensor.to(to).to(device)

    x, dout, w1, w3 = normal(*shape), normal(*shape), normal(*packed), normal(*packed)
    width = torch.tensor([width for width in layout.widths for _ in range(width)], dtype=torch.float64)
    w2 = normal(*reversed(packed)) / width.sqrt()[:, None]
    share = torch.rand(case.num_tokens, case.top_k, generator=generator, dtype=torch.float64) + 0.1
    return Inputs(
        x=rounded(x),
        topk_weights=rounded(share / share.sum(1, keepdim=True), weights_dtype or torch.float32),
        topk_ids=rounded(_draw_ids(case, generator), ids_dtype),
        w1=rounded(w1 / math.sqrt(case.hidden_size)),
        w2=rounded(w2),
        w3=rounded(w3 / math.sqrt(case.hidden_size)) if case.activation in reference.GATED else None,
        dout=rounded(dout),
        layout=layout,
        activation=case.activation,
    )


def run(
    moe_mlp_fn: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Forward and backward of a function with `moe_mlp`'s signature, on copies of the inputs, cast to `dtype` if given.

    Returns out, dx, dtopk_weights, dw1, dw2, and dw3 if there is a w3. `kwargs` go to the function.
    """
    leaves: dict[str, Tensor | None] = {}
    for name in ("x", "topk_weights", "w1", "w2", "w3"):
        given: Tensor | None = getattr(inputs, name)
        leaves[name] = None if given is None else given.detach().to(dtype or given.dtype, copy=True).requires_grad_()
    out = moe_mlp_fn(
        leaves["x"], leaves["topk_weights"], inputs.topk_ids, leaves["w1"], leaves["w2"], leaves["w3"],
        layout=inputs.layout, activation=inputs.activation, **kwargs,
    )  # fmt: skip
    out.backward(inputs.dout.to(out.dtype))
    results = {"out": out.detach()}
    for name, leaf in leaves.items():
        if leaf is not None:
            assert leaf.grad is not None, f"d{name}: expected a gradient, got None"
            results[f"d{name}"] = leaf.grad
    return results


class Errors(NamedTuple):
    """Root mean square errors against the fp64 truth."""

    err: float
    plain_err: float


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


def _max(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _kind(tensor: Tensor) -> Tensor:
    """0 where finite, and a number each for NaN, Inf and -Inf."""
    return tensor.isnan() * 1 + tensor.isposinf() * 2 + tensor.isneginf() * 3


@overload
def assert_within_budget(
    actual: Tensor, truth: Tensor, plain: Tensor, *, eps_dtype: torch.dtype, name: str
) -> Errors: ...
@overload
def assert_within_budget(
    actual: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    *,
    eps_dtype: torch.dtype,
    name: str,
) -> dict[str, Errors]: ...
def assert_within_budget(actual, truth, plain, *, eps_dtype, name):
    """Assert that `actual` is at most twice as far from the fp64 `truth` as the `plain` computation in the same dtype.

    With n elements, eps that of `eps_dtype`, and `scale(norm) = max(norm(truth), 1 / sqrt(n))`:

        max |actual - truth| <= 2 * max |plain - truth| + (2 * eps + order) * scale(max)
        rms(actual - truth)  <= 2 * rms(plain - truth)  + ((1 + 1 / sqrt(n)) * eps + order) * scale(rms)
        order = 16 * eps of fp32

    besides the same shape, plain's dtype, and NaN and infinities where plain or the truth has them.

    Why two norms: the rms sees a small error everywhere (a gradient scaled by 1.05, an accumulator that is too narrow),
    and is blind to one stale tile in a large matrix; the maximum sees that, and not the other.

    Why a slack: a result is rounded to eps / 2 whatever came before, and a few more roundings lie on the way (the
    pre-activation, the activation, the expert's output). Over many elements plain's error is a fair yardstick for them;
    over a handful plain may be lucky in all. The maximum allows for four worst-case roundings, the rms, over which
    roundings average out, for two; one element has but one norm, so there the two bounds meet. `order` is for the order
    of summation in fp32 accumulators: next to nothing in 16 bits, but in fp32 the only error there is, and its tails
    are long. It is a thousandth of what TF32 would cost.

    Why the scale is the truth's own and not 1: gradients of unit-scale data are not of unit scale (that of a wide
    expert's w1 goes like `sqrt(H / I_e) / K`), and eps of bf16 times 1 would swallow them. Only a tensor of few
    elements may be small by cancellation of terms that were rounded at unit scale; hence the floor, which vanishes as n
    grows.

    What no budget can cover: relu's derivative jumps at 0, so where plain and actual disagree on the sign of a
    pre-activation, the gradients of relu and reglu differ by whole terms. With fp32 accumulators that is about one
    pre-activation in ten million: keep these two to small cases.

    Takes three tensors, or three dicts of tensors with the same keys, and returns the rms errors. `name` stands in the
    message of the AssertionError.
    """
    if isinstance(actual, Mapping):
        assert actual.keys() == truth.keys() == plain.keys(), f"{name}: expected {list(plain)}, got {list(actual)}"
        return {
            key: assert_within_budget(actual[key], truth[key], plain[key], eps_dtype=eps_dtype, name=f"{name} {key}")
            for key in actual
        }
    assert truth.dtype == torch.float64, f"{name}: expected the truth in fp64, got {truth.dtype}"
    assert actual.shape == plain.shape == truth.shape, (
        f"{name}: expected shape {tuple(plain.shape)}, got {tuple(actual.shape)}"
    )
    assert actual.dtype == plain.dtype, f"{name}: expected {plain.dtype}, got {actual.dtype}"
    error, plain_error = actual.double() - truth, plain.double() - truth
    finite = error.isfinite() & plain_error.isfinite()
    if not finite.all():
        kind = _kind(actual)
        strange = (kind != _kind(plain)) & (kind != _kind(truth))
        assert not strange.any(), (
            f"{name}: {int(strange.sum())} of {strange.numel()} elements are NaN or infinite where they should not be, "
            f"or finite where they should not be, first at {tuple(strange.nonzero()[0].tolist())}"
        )
        error, plain_error, truth = (torch.where(finite, tensor, 0) for tensor in (error, plain_error, truth))
    eps, order = torch.finfo(eps_dtype).eps, 16 * torch.finfo(torch.float32).eps
    few = 1 / math.sqrt(max(truth.numel(), 1))
    budgets = {
        "max": (_max, (2 * eps + order) * max(_max(truth), few)),
        "rms": (_rms, ((1 + few) * eps + order) * max(_rms(truth), few)),
    }
    figures = {norm: (measure(error), measure(plain_error), slack) for norm, (measure, slack) in budgets.items()}
    if not all(err <= 2 * plain_err + slack for err, plain_err, slack in figures.values()):
        worst = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
        lines = [
            f"  {norm} error {err:.3g}, allowed {2 * plain_err + slack:.3g} = 2 * {plain_err:.3g} + {slack:.3g}"
            for norm, (err, plain_err, slack) in figures.items()
        ]
        where = f"  worst at {worst}: {actual[worst].item():.6g}, truth {truth[worst].item():.6g}"
        raise AssertionError("\n".join([f"{name}: error budget exceeded", *lines, where]))
    return Errors(*figures["rms"][:2])


def _of_expert(results: Mapping[str, Tensor], layout: ExpertLayout, expert: int) -> dict[str, Tensor]:
    """One expert's part of the weights' gradients."""
    columns = layout.columns(expert)
    parts = {name: results[name][:, columns] for name in ("dw1", "dw3") if name in results}
    return {**parts, "dw2": results["dw2"][columns]}


def check_against_oracle(moe_mlp_fn: Callable[..., Tensor], inputs: Inputs, **kwargs: Any) -> dict[str, Errors]:
    """Assert that a function with `moe_mlp`'s signature stays within the error budget: its output and every gradient.

    The weights' gradients are compared as a whole and for each expert by itself: their scale depends on the expert's
    width, and a fault in a wide expert's small gradient would go unnoticed beside a narrow one's. Returns the rms
    errors, the function's and plain PyTorch's, of each tensor. `kwargs` go to the function.
    """
    actual = run(moe_mlp_fn, inputs, **kwargs)
    plain = run(reference.moe_mlp, inputs)
    truth = run(reference.moe_mlp, inputs, dtype=torch.float64)
    errors = assert_within_budget(actual, truth, plain, eps_dtype=inputs.x.dtype, name="moe_mlp")
    for expert in range(inputs.layout.num_experts):
        parts = (_of_expert(results, inputs.layout, expert) for results in (actual, truth, plain))
        assert_within_budget(*parts, eps_dtype=inputs.x.dtype, name=f"expert {expert}")
    return errors


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(torch.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 3)

    return allocate_and_fill


@contextmanager
def poison_empty() -> Iterator[None]:
    """While active, Python code gets no memory that happens to be zero.

    `torch.empty`, `torch.empty_like`, `torch.empty_strided` and `Tensor.new_empty` return NaN, or for integers a third
    of the largest, far out of any table's range: a read of what was never written then shows. In every thread, as
    backward may run in another; code that took `empty` out of the torch module beforehand is not reached.
    """
    with ExitStack() as patches:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patches.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield
