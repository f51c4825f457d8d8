"""docs/coming_from.md: each block of ours runs, and what it converts computes what the other library would."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from triton_moe import ExpertLayout, Experts

DOCUMENT = Path(__file__).parent.parent / "docs" / "coming_from.md"
H, E, I, K, T = 64, 8, 32, 2, 20


def sections() -> dict[str, list[str]]:
    """Title -> its blocks of ours."""
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(), flags=re.MULTILINE)
    return {
        title: re.findall(r"^```python\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def run(title: str, **given: Any) -> dict[str, Any]:
    """The section's blocks, one after another, in one namespace of the given names and torch's -> that namespace."""
    namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, **given}
    for number, block in enumerate(sections()[title]):
        exec(compile(block, f"{DOCUMENT.name}, {title}, block {number}", "exec"), namespace)
    return namespace


def mixed(x: Tensor, weights: Tensor, ids: Tensor, outputs: Tensor) -> Tensor:
    """Every expert's output for every token, `outputs (E, T, H)`, mixed by the router's choice."""
    return (weights[..., None] * outputs[ids, torch.arange(len(x))[:, None]]).sum(1)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(T, H)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape) * shape[-1] ** -0.5


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected)


def test_megablocks(x: Tensor) -> None:
    router, w1, v1, w2 = randn(E, H), randn(E * I, H), randn(E * I, H), torch.randn(E * I, H) * I**-0.5
    state = {"router.layer.weight": router, "experts.mlp.w1": w1, "experts.mlp.v1": v1, "experts.mlp.w2": w2}
    found = run("MegaBlocks' dMoE", x=x, megablocks_state=state)
    weights, ids = (x @ router.t()).softmax(-1).topk(K)
    hidden = F.gelu(x @ w1.view(E, I, H).mT, approximate="tanh") * (x @ v1.view(E, I, H).mT)
    close(found["layer"](x)[0].detach(), mixed(x, weights, ids, hidden @ w2.view(E, I, H)))
    assert found["loss"].requires_grad


def test_scattermoe(x: Tensor) -> None:
    up_and_gate, output = randn(E, 2 * I, H), randn(E, H, I)
    router = nn.Linear(H, E, bias=False)
    found = run(
        "ScatterMoE", x=x, router=router,
        scattermoe_state={"experts.weight": up_and_gate, "output_experts.weight": output},
    )  # fmt: skip
    weights, ids = router(x).softmax(-1).topk(K)
    up, gate = (x @ up_and_gate.mT).chunk(2, dim=-1)
    expected = mixed(x, weights, ids, (F.silu(gate) * up) @ output.mT)
    close(found["experts"](x, weights, ids), expected)
    found["experts"](x, weights, ids).sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.any()


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(H, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_own_loop(x: Tensor) -> None:
    x = 4 * x  # the initial weights of nn.Linear are small
    loop_moe = nn.Module()
    loop_moe.gate = nn.Linear(H, 6, bias=False)
    loop_moe.experts = nn.ModuleList(SwiGLU(width) for width in (48, 48, 32, 32, 32, 7))
    found = run("Your own: a list of experts and a loop", x=x, loop_moe=loop_moe)
    weights, ids = loop_moe.gate(x).softmax(-1).topk(K)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = mixed(x, weights, ids, torch.stack([expert(x) for expert in loop_moe.experts]))
    close(found["layer"](x)[0], expected)


def test_stacked(x: Tensor) -> None:
    gate_up_proj, down_proj = randn(E, 2 * I, H), randn(E, H, I)
    weights, ids = torch.rand(T, E).topk(K)
    names = {"x": x, "weights": weights, "ids": ids, "ExpertLayout": ExpertLayout, "Experts": Experts}
    block: Any = nn.Module()
    given = {"gate_up_proj": gate_up_proj, "down_proj": down_proj, "block": block}
    found = run("Hugging Face's stacked experts", **given, **names)
    assert torch.equal(block.experts(x, ids, weights), found["experts"](x, weights, ids))
    gate, up = (x @ gate_up_proj.mT).chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    close(found["experts"](x, weights, ids).detach(), mixed(x, weights, ids, hidden @ down_proj.mT))
    masks = torch.stack([torch.zeros(I).index_fill(0, neurons, 1) for neurons in found["kept"]])
    assert masks.sum(1).tolist() == list(range(8, 32, 3))
    close(found["out"].detach(), mixed(x, weights, ids, (hidden * masks[:, None]) @ down_proj.mT))


def test_training_loop(x: Tensor) -> None:
    found = run("A training loop", batches=[x] * 30)
    assert found["loss"] < 1.5  # 2 at the start: the batch's own square, and that of the output
    assert found["model"].expert_bias.any()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
def test_several_gpus(x: Tensor) -> None:
    model = run("Several GPUs", batches=[x] * 5, device="cpu")["model"]
    for layer in model:
        assert layer.expert_bias.any()
        assert 20 < layer.w2.full_tensor().norm() < 25  # sqrt(8 experts * H)


def test_every_section_is_run() -> None:
    """And has blocks; what is not ours is marked."""
    counts = {title: len(blocks) for title, blocks in sections().items()}
    assert list(counts.values()) == [2, 2, 2, 3, 1, 1]
    assert all(
        line in ("```", "```python", "```python theirs") for line in re.findall("^```.*$", DOCUMENT.read_text(), re.M)
    )
