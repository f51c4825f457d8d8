"""Bias balancing: its formulas, what it counts and when, across micro-steps, recomputation and processes."""

import copy
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_moe import BiasBalancing, MoEConfig, MoEMLP, update_expert_biases
from triton_moe.balancing import METHODS
from triton_moe.testing import poison_empty

H, E, K = 16, 5, 2
SIZES = [(2, 8), (2, 24), (1, 0)]
SMEBU = BiasBalancing("smebu", speed=0.02, kappa=3.0, beta=0.75)
SIGN = BiasBalancing("sign", speed=0.02)
IN_FORWARD = BiasBalancing("smebu", speed=0.02, kappa=3.0, beta=0.75, update_in_forward=True)
both = pytest.mark.parametrize("balancing", [SMEBU, SIGN], ids=METHODS)


def layer_with(balancing: BiasBalancing | None, **changes: Any) -> MoEMLP:
    torch.manual_seed(0)
    return MoEMLP(MoEConfig(SIZES, K, H, balancing=balancing, **changes))


def tokens(num_tokens: int = 24, seed: int = 0) -> Tensor:
    """Around a common direction, so that the choice is uneven."""
    return torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(seed)) + 0.5


def train(call: Callable[[Tensor], tuple], *batches: Tensor) -> Tensor:
    """Forward and backward of each. -> the times that each expert was chosen"""
    counts = torch.zeros(E)
    for x in batches:
        out, aux, f = call(x)
        (out.square().sum() + aux["load_balance_loss"]).backward()
        counts += f.detach().cpu() * x.shape[0] * K
    return counts.round()


def by_definition(balancing: BiasBalancing, history: list[list[float]]) -> tuple[list[float], list[float]]:
    """Bias and momentum after updates by these counts."""
    bias, momentum = [0.0] * E, [0.0] * E
    for counts in history:
        mean = sum(counts) / E
        if balancing.method == "sign":
            momentum = [balancing.speed * ((mean > n) - (mean < n)) for n in counts]
        else:
            d = [balancing.speed * math.tanh(balancing.kappa * (mean - n) / mean) for n in counts]
            d = [value - sum(d) / E for value in d]
            momentum = [balancing.beta * m + (1 - balancing.beta) * value for m, value in zip(momentum, d, strict=True)]
        bias = [b + m for b, m in zip(bias, momentum, strict=True)]
    return bias, momentum


@both
def test_is_its_definition(balancing: BiasBalancing) -> None:
    layer, history = layer_with(balancing), []
    for step in range(4):
        history.append(train(layer, tokens(seed=step)).tolist())
        assert layer.expert_counts.tolist() == history[-1]
        update_expert_biases(layer)
        assert not layer.expert_counts.any()
    bias, momentum = by_definition(balancing, history)
    assert len(set(map(tuple, history))) > 1
    torch.testing.assert_close(layer.expert_bias, torch.tensor(bias), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer.expert_bias_momentum, torch.tensor(momentum), rtol=1e-5, atol=1e-7)


@both
def test_evens_out_the_experts(balancing: BiasBalancing) -> None:
    layer, x = layer_with(balancing), tokens(512) + 0.5
    loads = []
    for _ in range(80):
        loads.append(layer(x)[2])
        update_expert_biases(layer)
    assert loads[0].max() > 1.4 / E
    assert loads[-1].max() < 1.2 / E
    assert loads[-1].min() > 0.8 / E


def test_micro_steps_count_as_one_batch() -> None:
    x, layer, other = tokens(48), layer_with(SMEBU), layer_with(SMEBU)
    train(layer, x[:8], x[8:])
    train(other, x)
    for model in (layer, other):
        update_expert_biases(model)
    assert torch.equal(layer.expert_bias, other.expert_bias)
    assert layer.expert_bias.any()


def test_aux_has_the_bias_of_the_choice() -> None:
    layer = layer_with(IN_FORWARD)
    layer(tokens())
    before = layer.expert_bias.clone()
    _, aux, _ = layer(tokens(seed=1))
    assert not torch.equal(layer.expert_bias, before)
    assert torch.equal(aux["expert_bias_vector"], before)
    assert aux["expert_bias_abs_max"] == before.abs().max()
    assert aux["expert_bias_abs_mean"] == before.abs().mean()
    assert not any(aux[name].requires_grad for name in aux if name.startswith("expert_bias"))


def test_in_forward_is_an_update_after_each_forward() -> None:
    by_itself, by_the_loop = layer_with(IN_FORWARD), layer_with(SMEBU)
    for step in range(3):
        train(by_itself, tokens(seed=step))
        train(by_the_loop, tokens(seed=step))
        update_expert_biases(by_the_loop)
        update_expert_biases(by_itself)  # leaves it alone
    assert torch.equal(by_itself.expert_bias, by_the_loop.expert_bias)


def test_an_optimizer_hook() -> None:
    model = nn.ModuleList([layer_with(SMEBU), layer_with(SIGN), layer_with(None)])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: update_expert_biases(model))
    histories = [[train(layer, tokens(), tokens(seed=1)).tolist()] for layer in model[:2]]
    optimizer.step()
    for layer, balancing, history in zip(model, (SMEBU, SIGN), histories, strict=False):
        expected, _ = by_definition(balancing, history)
        torch.testing.assert_close(layer.expert_bias, torch.tensor(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("balancing", [SMEBU, IN_FORWARD], ids=["loop", "in forward"])
def test_only_training_counts(balancing: BiasBalancing) -> None:
    layer = layer_with(balancing)
    before = copy.deepcopy(dict(layer.named_buffers()))
    with torch.inference_mode():
        layer(tokens())
    layer.eval()
    train(layer, tokens())
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    train(layer.train(), tokens())
    assert any(not torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


class Checkpointed(nn.Module):
    def __init__(self, layer: MoEMLP, use_reentrant: bool) -> None:
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, x: Tensor) -> Any:
        def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            out, aux, f = self.layer(x)
            return out, aux["load_balance_loss"], f  # a reentrant checkpoint knows no gradients in a dictionary

        out, loss, f = checkpoint(run, x, use_reentrant=self.use_reentrant)  # type: ignore[misc]
        return out, {"load_balance_loss": loss}, f


@pytest.mark.pairs
@pytest.mark.parametrize("compiled", ["nothing", "the layer", "the whole"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("balancing", [SMEBU, IN_FORWARD], ids=["loop", "in forward"])
def test_checkpointing_doubles_nothing(
    balancing: BiasBalancing, use_reentrant: bool, compiled: str, device: str
) -> None:
    """And chooses as the first pass did, though the bias has moved since: the gradients are those without it."""
    pytest.importorskip("triton")
    torch.compiler.reset()
    layer, plain = (layer_with(balancing, backend="triton").to(device) for _ in range(2))
    model = Checkpointed(layer, use_reentrant)
    if compiled == "the layer":
        layer.compile(fullgraph=True)
    call = torch.compile(model, fullgraph=True) if compiled == "the whole" else model
    for step in range(3):
        x = tokens(seed=step).to(device).requires_grad_()
        assert torch.equal(train(call, x), train(plain, x))
        for buffer, other in zip(layer.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(buffer, other)
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_after_a_step_without_backward(use_reentrant: bool) -> None:
    """As one whose loss was not finite: the next is told, those after it are right, in all layers."""
    layers = [Checkpointed(layer_with(IN_FORWARD), use_reentrant) for _ in range(3)]

    def model(x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        for layer in layers:
            x, losses, f = layer(x)
        return x, losses, f

    model(tokens().requires_grad_())
    with pytest.raises(ValueError, match=r"^update_in_forward: expected .*, got 2 passes"):
        train(model, tokens(seed=1).requires_grad_())
    for seed in (2, 3):
        train(model, tokens(seed=seed).requires_grad_())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_two_passes_before_backward(use_reentrant: bool) -> None:
    """Which of them is repeated with which bias cannot be told; where the loop moves the bias it is the same one."""
    model = Checkpointed(layer_with(IN_FORWARD), use_reentrant)
    first, second = (tokens(seed=seed).requires_grad_() for seed in range(2))
    loss = sum(model(x)[0].sum() for x in (first, second))
    with pytest.raises(ValueError, match=r"^update_in_forward: expected .*, got 2 passes"):
        loss.backward()  # type: ignore[union-attr]
    model, plain = Checkpointed(layer_with(SMEBU), use_reentrant), layer_with(SMEBU)
    for layer in (model, plain):
        (layer(first)[0] + layer(second)[0]).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_pass_between_that_nothing_is_learnt_from() -> None:
    """It takes the bias as it is, and leaves what backward will repeat."""
    model, plain = Checkpointed(layer_with(IN_FORWARD), False), layer_with(IN_FORWARD)
    for layer in (model, plain):
        out = layer(tokens().requires_grad_())[0]
        with torch.inference_mode():
            layer(tokens(seed=1))
        out.sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double, nn.Module.float])
def test_stays_in_fp32(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_with(SMEBU)
    train(layer, tokens(), tokens(seed=1))
    update_expert_biases(layer)
    before = copy.deepcopy(dict(layer.named_buffers()))
    cast(nn.Sequential(layer))
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name]), name
    x = tokens().to(layer.w1.dtype)
    layer(x)
    assert layer.expert_counts.sum() == x.shape[0] * K


def test_large_counts_are_exact_in_16_bits() -> None:
    """f_i is rounded to x's dtype, what is counted is not."""
    layer = layer_with(SMEBU).bfloat16()
    x = tokens(3001).bfloat16()
    layer(x)
    assert layer.expert_counts.sum() == 3001 * K


@pytest.mark.parametrize("balancing", [SMEBU, IN_FORWARD], ids=["loop", "in forward"])
def test_from_meta(balancing: BiasBalancing) -> None:
    layer = MoEMLP(MoEConfig(SIZES, K, H, balancing=balancing), device="meta", dtype=torch.bfloat16)
    with poison_empty():
        layer.to_empty(device="cpu")
    layer.init_params()
    layer._init_buffers()
    assert all(not buffer.any() for buffer in layer.buffers())
    assert layer.expert_bias.dtype == torch.float32
    assert layer.expert_bias.device.type == "cpu"


def test_a_subclass_keeps_its_own_buffers() -> None:
    layer = layer_with(SMEBU)
    layer.register_buffer("of_a_user", torch.ones(3))
    train(layer, tokens())
    update_expert_biases(layer)
    layer.reset_parameters()
    assert not layer.expert_bias.any()
    assert layer.get_buffer("of_a_user").all()


@pytest.mark.parametrize("balancing", [SMEBU, IN_FORWARD], ids=["loop", "in forward"])
def test_a_state_dict_in_16_bits_is_assigned(balancing: BiasBalancing) -> None:
    """To a layer on the meta device too, where what the state dict does not have has no memory."""
    saved = layer_with(balancing)
    saved.expert_bias.fill_(0.5)
    state = {name: value.bfloat16() for name, value in saved.state_dict().items()}
    with torch.device("meta"):
        layer = MoEMLP(MoEConfig(SIZES, K, H, balancing=balancing))
    layer.load_state_dict(state, assign=True)
    assert layer.w1.dtype == torch.bfloat16
    layer.bfloat16()(tokens().bfloat16())
    if balancing is SMEBU:
        assert layer.expert_counts.sum() == 24 * K
        update_expert_biases(layer)
    assert layer.expert_bias.dtype == layer.expert_bias_momentum.dtype == torch.float32
    assert 0 < (layer.expert_bias - 0.5).abs().max() < 2 * balancing.speed


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_go_their_own_way(clone: Callable[[MoEMLP], MoEMLP]) -> None:
    layer = layer_with(SMEBU)
    other = clone(layer)
    train(other, tokens())
    update_expert_biases(other)
    assert other.expert_bias.any()
    assert not layer.expert_bias.any()


def test_an_update_without_tokens_is_finite() -> None:
    layer = layer_with(SMEBU)
    layer(tokens(0))
    update_expert_biases(layer)
    assert not layer.expert_bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adam"}, "method: expected one of smebu, sign, got 'adam'"),
        ({"speed": -1.0}, r"speed: expected 0 or more, got -1\.0"),
        ({"speed": "1"}, "speed: expected 0 or more, got '1'"),
        ({"kappa": math.nan}, "kappa: expected 0 or more, got nan"),
        ({"beta": None}, "beta: expected 0 <= beta < 1, got None"),
        ({"beta": 1.0}, r"beta: expected 0 <= beta < 1, got 1\.0"),
        ({"update_in_forward": 1}, "update_in_forward: expected True or False, got 1"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        BiasBalancing(**changes)


def work(rank: int, store: str, results: str) -> None:
    """One of two processes: its half of each batch."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = nn.ModuleList([layer_with(SMEBU), layer_with(SIGN), layer_with(IN_FORWARD)])
    for step in range(2):
        for layer in model:
            train(layer, tokens(32, seed=step).chunk(2)[rank])
        update_expert_biases(model)
    torch.save(model.state_dict(), Path(results) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file")
def test_counts_are_summed_over_processes(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    alone = nn.ModuleList([layer_with(SMEBU), layer_with(SIGN), layer_with(IN_FORWARD)])
    for step in range(2):
        for layer in alone:
            train(layer, tokens(32, seed=step))
        update_expert_biases(alone)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in alone.state_dict().items():
        assert torch.equal(states[0][name], value), name
        assert torch.equal(states[1][name], value), name
    assert alone.get_buffer("0.expert_bias").any()
