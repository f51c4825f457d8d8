"""ExpertLayout: what it derives from the widths, and that a bad description is named."""

import dataclasses
import doctest
import re

import pytest
import torch

from triton_moe import ExpertLayout, layout, reference


def test_docstrings() -> None:
    results = doctest.testmod(layout)
    assert results.attempted >= 3
    assert results.failed == 0


def test_derived_fields() -> None:
    made = ExpertLayout.from_sizes([(2, 5), (1, 0), (0, 9), (1, 7), (1, 5)])
    assert made.widths == (5, 5, 0, 7, 5)
    assert made.offsets == (0, 5, 10, 10, 17)
    assert (made.num_experts, made.total_width, made.max_width) == (5, 22, 7)
    assert made.width_classes == {5: (0, 1, 4), 0: (2,), 7: (3,)}
    assert list(made.width_classes) == [5, 0, 7]
    assert [made.columns(e) for e in (0, 2, 3)] == [slice(0, 5), slice(10, 10), slice(10, 17)]


@pytest.mark.parametrize("widths", [[3, 0, 4], (3, 0, 4), iter([3, 0, 4]), torch.tensor([3, 0, 4])], ids=type)
def test_any_sequence_of_integers(widths) -> None:
    made = ExpertLayout.from_widths(widths)
    assert made == ExpertLayout((3, 0, 4)) == ExpertLayout.from_sizes([(1, 3), (1, 0), [1, 4]])
    assert all(type(width) is int for width in made.widths)


def test_equal_layouts_are_one_key() -> None:
    assert hash(ExpertLayout((3, 4))) == hash(ExpertLayout.from_widths([3, 4]))
    assert ExpertLayout((3, 4)) != ExpertLayout((4, 3))
    with pytest.raises(AttributeError):
        ExpertLayout((3,)).widths = (4,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (5, "widths: expected a sequence of integers, got 5"),
        ("12", "widths: expected a sequence of integers, got '12'"),
        (b"12", "widths: expected a sequence of integers, got b'12'"),
        ([], "widths: expected at least one expert, got none"),
        ([4, 2.5], "widths[1]: expected an integer, got 2.5"),
        ([None], "widths[0]: expected an integer, got None"),
        ([4, -1], "widths[1]: expected 0 or more, got -1"),
        ([0, 0], "widths: expected at least one expert wider than 0, got 2 of width 0"),
    ],
)
def test_bad_widths(widths, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExpertLayout.from_widths(widths)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (5, "expert_sizes: expected a sequence of (count, width) pairs, got 5"),
        ("12", "expert_sizes: expected a sequence of (count, width) pairs, got '12'"),
        ([5], "expert_sizes[0]: expected a (count, width) pair, got 5"),
        ([(1, 2), (1, 2, 3)], "expert_sizes[1]: expected a (count, width) pair, got (1, 2, 3)"),
        ([(1.0, 2)], "expert_sizes[0] count: expected an integer, got 1.0"),
        ([(1, "2")], "expert_sizes[0] width: expected an integer, got '2'"),
        ([(-1, 2)], "expert_sizes[0]: expected count and width of 0 or more, got (-1, 2)"),
        ([(1, -2)], "expert_sizes[0]: expected count and width of 0 or more, got (1, -2)"),
        ([], "expert_sizes: expected at least one expert, got none"),
        ([(0, 8)], "expert_sizes: expected at least one expert, got none"),
        ([(3, 0)], "expert_sizes: expected an expert wider than 0, got 3 of width 0"),
    ],
)
def test_bad_sizes(sizes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExpertLayout.from_sizes(sizes)


def test_sizes_of_a_routing() -> None:
    made = reference.route(torch.tensor([[1, 0], [2, 1], [0, 3]]), ExpertLayout((3, 2, 0)))
    assert (made.num_tokens, made.top_k, made.num_rows) == (3, 2, 6)
    assert made.ragged_numel() == 6 * 8 + 64 * 3
    assert made.ragged_numel(parts=2) == 2 * made.ragged_numel()


def test_exact_buffers_are_never_empty() -> None:
    assert reference.route(torch.full((3, 2), 2), ExpertLayout((3, 2))).read_ragged_numel() == 64


@pytest.mark.parametrize("parts", [1, 2])
def test_blocks_of_panels(parts: int) -> None:
    """Panels of 64 columns of the one part, then of the other, then what is left of each; null experts have nothing."""
    made = reference.route(torch.tensor([[0, 2], [0, 1], [3, 2], [0, 0]]), ExpertLayout((133, 64, 5, 0)))
    made = dataclasses.replace(made, panels=True)
    buffer = torch.arange(made.ragged_numel(parts))
    for expert, count in enumerate((4, 1, 2, 0)):
        start, width = parts * int(made.ragged_offsets[expert]), made.layout.widths[expert]
        whole, rest = divmod(-(-width // 8) * 8, 64)
        for part in range(parts):
            block = made.ragged_block(buffer, expert, part, parts)
            assert block.shape == (count, width)
            for row in range(count):
                for col in range(width):
                    panels = start + ((part * whole + col // 64) * count + row) * 64
                    left = start + (parts * whole * 64 + part * rest) * count + row * rest
                    assert block[row, col] == (panels if col < 64 * whole else left) + col % 64


@pytest.mark.parametrize("parts", [1, 2])
def test_blocks_of_a_ragged_buffer_do_not_overlap(parts: int) -> None:
    made = reference.route(torch.tensor([[0, 2], [0, 1], [3, 2], [0, 0]]), ExpertLayout((40, 1, 5, 0)))
    buffer = torch.zeros(made.ragged_numel(parts), dtype=torch.int64)
    shapes = []
    for expert in range(4):
        for part in range(parts):
            block = made.ragged_block(buffer, expert, part, parts)
            block += 1
            assert block.numel() == 0 or block.stride(0) % layout.ROW_ALIGNMENT == 0
        shapes.append(tuple(block.shape))
    assert shapes == [(4, 40), (1, 1), (2, 5), (0, 0)]
    assert buffer.max() == 1
    assert buffer.sum() == parts * (4 * 40 + 1 + 2 * 5)
    assert not (made.ragged_offsets % layout.RAGGED_ALIGNMENT).any()
