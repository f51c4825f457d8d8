"""Layers under FSDP, whose parameters have other memory at every step: two processes on two GPUs, or on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from triton_moe import MoEConfig, MoEMLP

HAS_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
WORLD, STEPS, T, H = 2, 4, 24, 32
DEVICE = "cuda" if HAS_GPU else "cpu"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoEMLP(MoEConfig([(2, 16), (1, 8), (2, 40)], 2, H, activation="swiglu"))

    def forward(self, x: Tensor) -> Tensor:
        out, aux, _ = self.moe(x)
        return x + out + 0 * aux["router_z_loss"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).to(DEVICE)


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(T, H, generator=generator).to(DEVICE)


def trained(layers: nn.Module, ranks: tuple[int, ...]) -> list[Tensor]:
    """Parameters after a few steps of SGD on the mean loss of these ranks' batches."""
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.05)
    for step in range(STEPS):
        for rank in ranks:
            (layers(batch(step, rank)).square().mean() / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in layers.parameters()]


@contextmanager
def process_group(rank: int, folder: str) -> Iterator[None]:
    if HAS_GPU:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    backend, store = "nccl" if HAS_GPU else "gloo", f"file://{folder}/store"
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=WORLD)
    yield
    distributed.destroy_process_group()


def shard(layers: nn.Sequential) -> nn.Sequential:
    for block in layers:
        fully_shard(block, reshard_after_forward=True)
    fully_shard(layers)
    return layers


def train_shard(rank: int, folder: str) -> None:
    """One process: train its shard, and leave the whole parameters behind."""
    with process_group(rank, folder):
        parameters = trained(shard(model()), (rank,))
        if rank == 0:
            torch.save([p.detach().cpu() for p in parameters], f"{folder}/parameters.pt")


def make_real(rank: int, folder: str) -> None:
    """One process: shard a model that has no memory, give it some, draw it, and leave the parameters behind."""
    with process_group(rank, folder):
        with torch.device("meta"):
            layers = nn.Sequential(Block(), Block())
        shard(layers).to_empty(device=DEVICE)
        for parameter in layers.parameters():
            nn.init.constant_(parameter, torch.nan)
        torch.manual_seed(0)
        for block in layers:
            assert isinstance(block, Block)
            block.moe.reset_parameters()
        layout, weights = block.moe.layout, dict(block.moe.named_parameters())
        assert len(layout.split(weights["w1"], dim=1)) == layout.num_experts
        with pytest.raises(ValueError, match=r"^packed: expected a tensor that is whole along dim 0, got \(Shard"):
            layout.split(weights["w2"], dim=0)
        whole = {name: p.full_tensor().detach().cpu() for name, p in weights.items() if isinstance(p, DTensor)}
        if rank == 0:
            torch.save(whole, f"{folder}/parameters.pt")


@pytest.mark.skipif(HAS_GPU and torch.cuda.device_count() < WORLD, reason="needs two CUDA devices")
def test_sharded_training_is_training(tmp_path: Path) -> None:
    """Two processes, each with half of every parameter and of the batch, end where one with all of both does."""
    mp.spawn(train_shard, (str(tmp_path),), nprocs=WORLD)  # type: ignore[attr-defined]
    sharded = torch.load(tmp_path / "parameters.pt")
    whole = trained(model(), tuple(range(WORLD)))
    before = list(model().parameters())
    assert len(sharded) == len(whole) == len(before)
    for ours, theirs, start in zip(sharded, whole, before, strict=True):
        moved = (theirs - start).cpu()
        assert moved.norm() > 0
        assert (ours - theirs.cpu()).norm() < 1e-3 * moved.norm()


@pytest.mark.skipif(HAS_GPU and torch.cuda.device_count() < WORLD, reason="needs two CUDA devices")
def test_a_sharded_model_becomes_real(tmp_path: Path) -> None:
    """Each expert's weights are drawn with the std of a layer that was never sharded."""
    mp.spawn(make_real, (str(tmp_path),), nprocs=WORLD)  # type: ignore[attr-defined]
    weights, layout = torch.load(tmp_path / "parameters.pt"), Block().moe.layout
    assert sorted(weights) == ["router.weight", "w1", "w2", "w3"]
    for name in ("router.weight", "w1", "w3"):
        assert abs(weights[name].std() * H**0.5 - 1) < 0.2
    for width, part in zip(layout.widths, layout.split(weights["w2"], dim=0), strict=True):
        assert abs(part.std() * width**0.5 - 1) < 0.2
