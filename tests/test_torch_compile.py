"""The layer under torch.compile and torch.export: one graph, one compilation, the results of eager."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from triton_moe import BiasBalancing, ExpertLayout, GroupLimit, MoEConfig, MoEMLP
from triton_moe.functional import gather_autograd, route
from triton_moe.testing import assert_within_budget
from triton_moe.train.config import TrainConfig
from triton_moe.train.gpt import GPT

pytest.importorskip("triton")

H = 32
SIZES = [(2, 16), (1, 5), (2, 40), (1, 0)]
LOSSES = ("router_z_loss", "load_balance_loss", "compute_loss")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def layer_on(device: str, **changes: object) -> MoEMLP:
    torch.manual_seed(0)
    options = {"activation": "swiglu", "backend": "triton", **changes}
    return MoEMLP(MoEConfig(SIZES, 2, H, **options), device=device)  # type: ignore[arg-type]


def step(layer: nn.Module, call: Callable, x: Tensor) -> dict[str, Tensor]:
    """Results and gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out, aux, f = call(x)
    (out.square().sum() + sum(aux[name] for name in LOSSES)).backward()
    assert x.grad is not None
    grads = {f"d{name}": p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "f": f, **aux, "dx": x.grad, **grads}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to the order in which a sum of two gradients is rounded."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_within_budget(
            value.detach(), expected[name].double().detach(), expected[name].detach(), eps_dtype=value.dtype, name=name
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recompute": True},
        {"activation": "gelu", "aux_losses": False},
        {"bias": True},
        {"balancing": BiasBalancing()},
        {"balancing": BiasBalancing(update_in_forward=True)},
        {"load_balance": "sequence"},
        {"groups": GroupLimit(3, 2, 1), "weights_scale": 2.5},
        {"shared_null_logit": True, "shared_width": 8, "weights_scale": 2.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic: bool, changes: dict, device: str) -> None:
    layer = layer_on(device, **changes)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    x = torch.randn(3, 5, H, device=device)
    compiled_step = step(layer, compiled, x)
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer._init_buffers()
    assert_same(compiled_step, step(layer, layer, x))
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(state[name], buffer)


@pytest.mark.parametrize("autocasts", [False, True])
@pytest.mark.parametrize("changes", [{}, {"weights_scale": 2.5, "router": "softmax", "bias": True}], ids=str)
def test_one_operator_each_way(changes: dict, autocasts: bool, device: str) -> None:
    """What graphs have of ours: the layer in the forward pass's, its gradients in the backward pass's, nothing else."""
    graphs: list[list[str]] = []

    def noted(graph: torch.fx.GraphModule, _inputs: object) -> Callable:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([name for name in called if name.startswith("triton_moe.")])
        return make_boxed_func(graph.forward)

    layer = layer_on(device, **changes)
    backend = aot_autograd(fw_compiler=noted, bw_compiler=noted)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)

    def call(x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        with torch.autocast(device, torch.float16, enabled=autocasts):
            return compiled(x)

    step(layer, call, torch.randn(9, H, device=device))
    assert graphs == [["triton_moe.moe_layer.default"], ["triton_moe.moe_layer_backward.default"]]
    with torch.no_grad():
        call(torch.randn(9, H, device=device))
    assert graphs[2:] == [["triton_moe.moe_layer_inference.default"]]


def test_a_new_batch_size_compiles_nothing(device: str) -> None:
    layer = layer_on(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    step(layer, compiled, torch.randn(9, H, device=device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (30, 7, 200):
            x = torch.randn(num_tokens, H, device=device)
            assert_same(step(layer, compiled, x), step(layer, layer, x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_swapped_storage_is_seen(dynamic: bool, device: str) -> None:
    layer, x = layer_on(device), torch.randn(9, H, device=device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    before = step(layer, compiled, x)
    old = [weight.data for weight in layer.parameters()]  # nothing new gets its memory while it is held
    for weight in layer.parameters():
        weight.data = 2 * weight.data.roll(1, dims=0)
    after = step(layer, compiled, x)
    assert_same(after, step(layer, layer, x))
    assert not torch.equal(after["out"], before["out"])
    assert not any(torch.equal(a, b) for a, b in zip(old, layer.parameters(), strict=True))


def test_another_layout_is_another_graph(device: str) -> None:
    """One compiled function, two layers whose packed weights have the same shapes."""
    one, x = layer_on(device), torch.randn(9, H, device=device)
    config = dataclasses.replace(one.config, expert_sizes=tuple(reversed(SIZES)))
    other = MoEMLP(config, device=device)
    other.load_state_dict(one.state_dict())
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True)
    results = [step(layer, functools.partial(compiled, layer), x) for layer in (one, other, one)]
    for layer, found in zip((one, other, one), results, strict=True):
        assert_same(found, step(layer, layer, x))
    assert not torch.equal(results[0]["out"], results[1]["out"])


def test_decoding_compiles_once(device: str) -> None:
    """Whatever the number of tokens, few enough for tiles of 16 rows or not."""
    layer = layer_on(device, bias=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        compiled(torch.randn(9, H, device=device))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for num_tokens in (2, 16, 64, 200):
                x = torch.randn(num_tokens, H, device=device)
                assert torch.equal(compiled(x)[0], layer(x)[0])


GPT_CONFIG = TrainConfig(
    expert_sizes=((2, 16), (1, 24)), hidden_size=32, num_layers=2, num_heads=2, context=16, backend="triton"
)


def gpt_on(device: str, **changes: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(GPT_CONFIG, **changes)).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():  # some begin at 0, and then most of the gradients are 0
            parameter.normal_(std=GPT_CONFIG.hidden_size**-0.5)
    return model


def gpt_step(model: GPT, call: Callable, text: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = call(text)
    (out.logits.float().square().mean() + out.load_balance_loss + out.router_z_loss).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len([*model.parameters()])
    return {"logits": out.logits.detach(), **grads}


@pytest.mark.parametrize("autocasts", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_gpt_is_one_graph(dynamic: bool, autocasts: bool, device: str) -> None:
    """Its logits and every gradient within the error budget, eager being what they may err twice as much as."""
    model, text = gpt_on(device), torch.randint(0, 256, (3, 8), device=device)
    exact = gpt_on(device, backend="torch").double()
    exact.load_state_dict(model.state_dict())
    # Inductor's own code for fp16 is not what is tested here.
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager" if autocasts else "inductor")

    def autocasted(call: Callable) -> Callable:
        return torch.autocast(device, torch.float16, enabled=autocasts)(call)

    plain, actual = (gpt_step(model, autocasted(call), text) for call in (model, compiled))
    truth = {name: value.double() for name, value in gpt_step(exact, exact, text).items()}
    for name, value in actual.items():
        assert value.any(), name
        eps_dtype = torch.float16 if autocasts else torch.float32
        assert_within_budget(value, truth[name], plain[name], eps_dtype=eps_dtype, name=name)


def test_the_gpt_at_a_new_batch_size_compiles_nothing(device: str) -> None:
    model = gpt_on(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    gpt_step(model, compiled, torch.randint(0, 256, (3, 8), device=device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((5, 8), (2, 16), (7, 4)):
            gpt_step(model, compiled, torch.randint(0, 256, shape, device=device))


def half_of(layer: MoEMLP, x: Tensor) -> Tensor:
    return x.half()


def double_of(layer: MoEMLP, x: Tensor) -> Tensor:
    return x.double()


def with_w2_on_meta(layer: MoEMLP, x: Tensor) -> Tensor:
    layer.w2 = nn.Parameter(layer.w2.detach().to("meta"))
    return x


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("misuse", "autocasts", "message"),
    [
        (half_of, False, r"x: expected torch\.float32 on .* as the weights, got torch\.float16 on "),
        (double_of, True, r"x: expected torch\.float32 on .* as the weights, got torch\.float64 on "),
        (with_w2_on_meta, False, r"w2: expected torch\.float32 on .* as x, got torch\.float32 on meta"),
    ],
    ids=["dtype", "autocast", "device"],
)
def test_misuse_is_told_in_our_words(
    misuse: Callable, autocasts: bool, message: str, fullgraph: bool, device: str
) -> None:
    """By the ValueError of eager, or, where that would break the graph, in what Dynamo raises about it."""
    layer = layer_on(device)
    x = misuse(layer, torch.randn(9, H, device=device))
    with (
        torch.autocast(device, torch.float16, enabled=autocasts),
        pytest.raises(RuntimeError if fullgraph else ValueError, match=message),
    ):
        torch.compile(layer, fullgraph=fullgraph)(x)


def test_right_calls_after_a_wrong_one(device: str) -> None:
    """Compiled in parts, where Dynamo runs the frame that raised as it stands ever after: this layer's, and another."""
    layer, other, x = layer_on(device), layer_on(device), torch.randn(9, H, device=device)
    compiled, w2 = torch.compile(layer, backend="aot_eager"), layer.w2
    with pytest.raises(ValueError, match=r"^w2: expected"):
        compiled(with_w2_on_meta(layer, x))
    layer.w2 = w2
    for right, call in ((layer, compiled), (other, torch.compile(other, backend="aot_eager"))):
        assert torch.equal(call(x)[0], right(x)[0])


def test_export_of_the_forward_pass(device: str) -> None:
    layer = layer_on(device)
    dynamic_shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(9, H, device=device),), dynamic_shapes=dynamic_shapes)
        x = torch.randn(17, H, device=device)
        out, _, f = program.module()(x)
        expected, _, expected_f = layer(x)
    assert torch.equal(out, expected)
    assert torch.equal(f, expected_f)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_losses_of_sequences(strict: bool) -> None:
    """Of any number and length."""
    layer = layer_on("cpu", load_balance="sequence", backend="torch").eval()
    sizes = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("L", min=2, max=64)}
    with torch.no_grad():
        x = torch.randn(3, 5, H)
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": sizes}, strict=strict)
        for shape in ((3, 5), (7, 9)):
            x = torch.randn(*shape, H)
            torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("recompute", [False, True])
def test_exact_memory(recompute: bool, device: str) -> None:
    """Its sizes are read back: under torch.compile they are unbacked, and the results those of eager."""
    layer = layer_on(device, activation_memory="exact", recompute=recompute)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    x = torch.randn(9, H, device=device)
    assert_same(step(layer, compiled, x), step(layer, layer, x))
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], layer(x)[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_building_blocks(dynamic: bool, device: str) -> None:
    """A routing is made of views in the graph itself."""
    layout = ExpertLayout((8, 8, 4))

    def gathered(x: Tensor, ids: Tensor) -> Tensor:
        return gather_autograd(x, routing=route(ids, layout, backend="triton"))

    x, ids = torch.randn(5, H, device=device), torch.tensor([[0, 2], [1, 0], [2, 2], [0, 1], [1, 3]], device=device)
    compiled = torch.compile(gathered, backend="eager", fullgraph=True, dynamic=dynamic)
    assert torch.equal(compiled(x, ids), gathered(x, ids))
