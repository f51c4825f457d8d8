"""The contestants' adapters, with stand-ins that compute in plain PyTorch what each library documents."""

import sys
from types import ModuleType, SimpleNamespace

import contestants
import gate
import layers
import peers
import pytest
import stacked
import torch
from cases import BenchCase, bench_case, select
from torch import Tensor, nn

CPU = torch.device("cpu")


def fault(case: BenchCase, contestant: str, dtype: torch.dtype = torch.float32) -> str | None:
    state = gate.initial_state(case, dtype, CPU)
    x, dout = gate.tokens(case, dtype, CPU)
    return gate.Gate(case, state, x, dout).fault(contestant, contestants.CONTESTANTS[contestant](case.config, state))


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters may build on the CPU."""
    monkeypatch.setattr(peers, "_check", lambda *_: None)


def test_stacked_weights_are_the_packed_ones() -> None:
    layout = bench_case("", 1, 6, [(2, 8), (1, 3)], 1, "swiglu").config.layout
    packed = torch.randn(6, layout.total_width)
    experts = stacked.stack(packed, layout, range(3), 8)
    assert experts.shape == (3, 6, 8)
    assert not experts[2, :, 3:].any()
    again = torch.empty_like(packed)
    stacked.unstack(experts, again, layout, range(3))
    assert torch.equal(again, packed)


def test_stacked_weights_interleave() -> None:
    form = stacked.Form(transposed=True, interleaved=True)
    gate_part, up_part = torch.randn(2, 3, 6, 8)
    joined = form.joined([gate_part, up_part])
    assert torch.equal(joined[:, :, 0::2], gate_part)
    assert all(map(torch.equal, form.parted(joined, 2), (gate_part, up_part)))


# 600 tokens, so that the gate looks at all of them once more; three widths, one of them a single expert's.
WIDTHS = bench_case("widths", 600, 16, [(2, 24), (1, 8), (3, 16)], 2, "swiglu")


@pytest.mark.parametrize("contestant", ["grouped_mm", "grouped_mm_by_width", "torch_loop", "block_sparse"])
@pytest.mark.parametrize("activation", ["swiglu", "relu_squared"])
def test_contestants_pass_the_gate(contestant: str, activation: str) -> None:
    case = bench_case("widths", 600, 16, WIDTHS.config.expert_sizes, 2, activation)  # type: ignore[arg-type]
    assert fault(case, contestant) is None


def test_an_expert_that_is_wrong_only_at_full_size_is_found() -> None:
    state = gate.initial_state(WIDTHS, torch.float32, CPU)
    x, dout = gate.tokens(WIDTHS, torch.float32, CPU)
    judge = gate.Gate(WIDTHS, state, x, dout)
    right = contestants.torch_loop(WIDTHS.config, state)
    seen = [0]

    def forward(x: Tensor) -> Tensor:
        seen[0] = len(x)
        return right.forward(x)

    def gradients() -> dict[str, Tensor]:
        found = right.gradients()
        if seen[0] > gate.GATE_TOKENS:
            found["dw3"][:, WIDTHS.config.layout.columns(2)] = 0
        return found

    said = judge.fault("torch_loop", layers.Layer(forward, right.parameters, gradients))
    assert said is not None
    assert said.startswith("on all 600 tokens dw3 of expert 2 is ")


def test_the_dense_ceiling_has_the_flops() -> None:
    state = gate.initial_state(WIDTHS, torch.float32, CPU)
    layer = contestants.dense_ceiling(WIDTHS.config, state)
    widths = WIDTHS.config.layout.widths
    assert layer.another_function
    assert [tuple(weight.shape) for weight in layer.parameters] == [(16, 35), (35, 16), (16, 35)]
    assert round(2 * sum(widths) / len(widths)) == 35
    assert fault(WIDTHS, "dense_ceiling") is None


@pytest.mark.parametrize("contestant", ["triton_moe_graph", "grouped_mm_graph"])
def test_a_cuda_graph_needs_a_gpu(contestant: str) -> None:
    with pytest.raises(layers.CannotRun, match="CUDA graphs need a GPU"):
        fault(WIDTHS, contestant)


@pytest.mark.gpu
@pytest.mark.parametrize("contestant", ["triton_moe_graph", "grouped_mm_graph", "triton_moe_compiled"])
def test_contestants_that_are_captured_or_compiled_pass_the_gate(contestant: str) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    (case,) = select(["16exp_variable"])
    state = gate.initial_state(case, dtype, device)
    x, dout = gate.tokens(case, dtype, device)
    layer = contestants.CONTESTANTS[contestant](case.config, state)
    assert gate.Gate(case, state, x, dout).fault(contestant, layer) is None


@pytest.mark.gpu
def test_a_stale_replay_is_found() -> None:
    """What is right when it is called or captured, and in a replay on other inputs gives what it gave then."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    (case,) = select(["8exp_uniform"])
    state = gate.initial_state(case, dtype, device)
    x, dout = gate.tokens(case, dtype, device)
    layer = contestants.triton_moe(case.config, state)
    kept: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        out = layer.forward(x)
        if torch.cuda.is_current_stream_capturing():
            return out - out.detach() + kept[-1]
        kept[:] = [out.detach().clone()]
        return out

    judge = gate.Gate(case, state, x, dout)
    assert judge.fault("triton_moe", layers.Layer(forward, layer.parameters, layer.gradients)) is None
    replayed = layers.Layer(forward, layer.parameters, layer.gradients, replayed=True)
    assert "out" in (judge.fault("triton_moe", replayed) or "")


class MoMoE(nn.Module):
    """x `(B, S, D)`, mask `(N, M)`, scores `(N, M)`; of `x Wl1`, the first half times silu of the second."""

    def __init__(self, D: int, H: int, N: int, K: int, save_percent: int, Wl1: Tensor, Wl2: Tensor) -> None:
        super().__init__()
        assert (Wl1.shape, Wl2.shape, save_percent) == ((N, D, 2 * H), (N, H, D), 100)
        self.Wl1_ND2H, self.Wl2_NHD = nn.Parameter(Wl1.clone()), nn.Parameter(Wl2.clone())
        self.K = K

    def forward(self, x: Tensor, mask: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        assert mask.dtype == torch.int32
        assert bool((mask.sum(0) == self.K).all())
        assert not scores[mask == 0].any()
        a, b = (x[0] @ self.Wl1_ND2H).chunk(2, dim=2)
        y = (a * nn.functional.silu(b)) @ self.Wl2_NHD
        return (scores[..., None] * y.float()).sum(0)[None].to(x.dtype), mask.sum(1)


def test_momoe(monkeypatch: pytest.MonkeyPatch, without_a_gpu: None) -> None:
    monkeypatch.setitem(sys.modules, "momoe", ModuleType("momoe"))
    monkeypatch.setitem(sys.modules, "momoe.momoe", SimpleNamespace(MoMoE=MoMoE))  # type: ignore[arg-type]
    (case,) = select(["quick_variable"])
    uniform = bench_case("uniform", 64, 32, [(4, 16)], 2, "swiglu")
    assert fault(uniform, "momoe", torch.bfloat16) is None
    with pytest.raises(layers.CannotRun, match="SwiGLU in bfloat16 alone"):
        fault(case, "momoe")


def sonic(
    x: Tensor, scores: Tensor, token_ids: Tensor, expert_ids: Tensor, w1: Tensor, b1: None, w2: Tensor, b2: None,
    num_experts: int, stream: int, activation: str,
) -> tuple[Tensor, None]:  # fmt: skip
    """`w1 (2 I, H, E)`, rows of gate and up in turn, `w2 (H, I, E)`, both contiguous as `(E, ...)`; sorted tokens."""
    assert activation == "swiglu value"
    assert w1.permute(2, 0, 1).is_contiguous()
    assert w2.permute(2, 0, 1).is_contiguous()
    assert (scores.dtype, token_ids.dtype, expert_ids.dtype) == (torch.float32, torch.int32, torch.int32)
    assert bool((token_ids.diff() >= 0).all())
    h = torch.einsum("rh,ihr->ri", x[token_ids], w1[:, :, expert_ids])
    y = torch.einsum("ri,hir->rh", nn.functional.silu(h[:, 0::2]) * h[:, 1::2], w2[:, :, expert_ids])
    return torch.zeros_like(x).index_add(0, token_ids, scores[:, None] * y), None


def test_sonic_moe(monkeypatch: pytest.MonkeyPatch, without_a_gpu: None) -> None:
    enums = SimpleNamespace(ActivationType=SimpleNamespace(SWIGLU="swiglu value"))
    monkeypatch.setitem(sys.modules, "sonicmoe", SimpleNamespace(moe_general_routing_inputs=sonic))  # type: ignore
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)  # type: ignore[arg-type]
    assert fault(bench_case("uniform", 64, 32, [(4, 16)], 2, "swiglu"), "sonic_moe") is None
    with pytest.raises(layers.CannotRun, match="SonicMoE has no geglu of this definition"):
        fault(bench_case("geglu", 64, 32, [(4, 16)], 2, "geglu"), "sonic_moe")


@pytest.mark.parametrize("contestant", ["scattermoe", "sonic_moe", "momoe"])
def test_libraries_take_one_width_on_a_gpu(contestant: str) -> None:
    with pytest.raises(layers.CannotRun, match="takes experts of one width"):
        fault(WIDTHS, contestant)
    with pytest.raises(layers.CannotRun, match="runs on CUDA alone"):
        fault(bench_case("uniform", 64, 32, [(4, 16)], 2, "swiglu"), contestant)


def test_what_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)  # type: ignore[arg-type]
    with pytest.raises(layers.CannotRun, match=r"^transformers cannot be imported: "):
        fault(WIDTHS, "transformers_grouped_mm")
