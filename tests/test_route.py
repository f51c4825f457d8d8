"""The counting sort and the tile schedule against the oracle's loops."""

import pytest
import torch

from operators import inputs_for, routings
from triton_moe import functional, reference
from triton_moe.layout import ExpertLayout, Routing
from triton_moe.testing import CASES, Case, poison_empty

FIELDS = ("counts", "row_offsets", "ragged_offsets", "row_to_slot", "slot_to_row", "expert_order")


def assert_same_routing(ours: Routing, theirs: Routing) -> None:
    for field in FIELDS:
        actual, expected = getattr(ours, field), getattr(theirs, field)
        assert actual.dtype == expected.dtype, field
        torch.testing.assert_close(
            actual.cpu(), expected.cpu(), rtol=0, atol=0, msg=lambda m, field=field: f"{field}: {m}"
        )


def assert_schedule_covers_rows(routing: Routing) -> None:
    """Every row of every expert is in exactly one block, widest experts come first, then sentinels."""
    widths, blocks = routing.layout.widths, routing.row_blocks.tolist()
    rows = routing.row_offsets.diff().tolist()
    used = [(e, i) for e, i in blocks if e >= 0]
    assert sorted(used) == [(e, i) for e, n in enumerate(rows) for i in range(-(-n // routing.block_m))]
    assert all(pair == [-1, -1] for pair in blocks[len(used) :])
    assert [widths[e] for e, _ in used] == sorted((widths[e] for e, _ in used), reverse=True)


def assert_tiles_cover_experts(routing: Routing) -> None:
    """Every block of columns of every expert is listed once, and once for each of its row blocks; in order."""
    widths, rows, tiles = routing.layout.widths, routing.row_offsets.diff().tolist(), routing.tiles
    assert tiles is not None
    row_blocks = [-(-n // routing.block_m) for n in rows]
    assert tiles.numbers[0] == sum(row_blocks)
    for number, columns in zip(tiles.numbers[1:3].tolist(), (128, 256), strict=True):
        blocks = [-(-width // columns) for width in widths]
        ragged = tiles.ragged[columns][: 2 * number].view(-1, 2).tolist()
        assert sorted(ragged) == [[e, i] for e, n in enumerate(row_blocks) for i in range(n * blocks[e])]
        assert [widths[e] for e, _ in ragged] == sorted((widths[e] for e, _ in ragged), reverse=True)
        weights = tiles.weights[columns][: 2 * sum(blocks)].view(-1, 2).tolist()
        assert weights == [[e, i] for e in routing.expert_order.tolist() for i in range(blocks[e])]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_route_matches_the_oracle(case: Case, device: str, ids_dtype: torch.dtype) -> None:
    inputs = inputs_for(case, torch.float32, device, ids_dtype=ids_dtype)
    with poison_empty():
        ours, theirs = routings(inputs)
    assert_same_routing(ours, theirs)
    assert_schedule_covers_rows(ours)
    assert_tiles_cover_experts(ours)
    assert_same_routing(functional.route(inputs.topk_ids, inputs.layout, backend="torch"), theirs)


def test_ids_out_of_range_are_dropped(device: str) -> None:
    """-1 and the extremes of int64, whose low 32 bits are valid ids, touch no memory and no count."""
    layout = ExpertLayout((3, 0, 5))
    ids = torch.tensor([[0, -1], [2**32, 1], [-(2**63), 2], [3, 2**32 + 2], [4, 2**63 - 1]], device=device)
    with poison_empty():
        ours = functional.route(ids, layout, backend="triton")
    assert_same_routing(ours, reference.route(ids, layout))
    assert ours.counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(700, 3, 40), (130, 2, 300)])
def test_several_spans(num_tokens: int, top_k: int, num_experts: int, device: str) -> None:
    """More slots than one program counts, and more experts than a tile of 64 slots has room for."""
    layout = ExpertLayout(tuple(e % 5 * 3 for e in range(num_experts)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, num_experts + 1, (num_tokens, top_k), generator=generator).to(device)
    with poison_empty():
        ours = functional.route(ids, layout, backend="triton")
    assert_same_routing(ours, reference.route(ids, layout))
    assert_schedule_covers_rows(ours)
