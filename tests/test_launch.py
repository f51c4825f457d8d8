"""The launcher's short way, on a stand-in for a compiled kernel: which launches take it, and with which arguments."""

import importlib
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from triton_moe.kernels.launch import RELEASE


class Kernel:
    """Counts Triton's own launches, and notes what the short way hands over."""

    arg_names = ("x", "offsets", "size", "number", "BLOCK")
    do_not_specialize = ("number",)

    def __init__(self) -> None:
        self.slow: list[tuple] = []
        self.fast: list[tuple] = []
        self.scratch = 0

    def __getitem__(self, grid: tuple) -> Any:
        def launch(*args: Any, **options: Any) -> SimpleNamespace:
            self.slow.append((grid, *args))
            return SimpleNamespace(run=Run(self), function="f", packed_metadata="m")

        return launch


class Run:
    """What a compiled kernel is launched by: itself, or the C function behind it."""

    launch_cooperative_grid, launch_pdl, profile_scratch_size, gsan_enabled = "cooperative", "pdl", 0, False
    arg_annotations, kernel_signature = "annotations", "signature"

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.global_scratch_size = kernel, kernel.scratch

    def __call__(self, *args: Any) -> None:
        self.kernel.fast.append(args)

    def launch(self, *args: Any) -> None:
        self.kernel.fast.append(("C", *args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    from triton_moe.kernels import launch

    active = SimpleNamespace(get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "RELEASE", None)
    return Kernel()


@pytest.mark.parametrize("release", ["3.6", "3.9"])
@pytest.mark.parametrize("scratch", [0, 16])
def test_only_what_needs_scratch_memory_goes_where_it_is_looked_for(
    scratch: int, release: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton_moe.kernels import launch

    monkeypatch.setattr(launch, "RELEASE", release)
    kernel.scratch = scratch
    launcher, x, offsets = launch.Launcher(kernel, BLOCK=8), torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    for _ in range(2):
        launcher._launch((4,), 0, (x, offsets, 16, 3))
    given = x.data_ptr(), offsets.data_ptr(), 16, 3, 8
    past: tuple = "C", 4, 1, 1, "stream", "f", "cooperative", "pdl"
    if release == "3.6":
        past += None, None, "m", None, None, None, *given
    else:
        past += "m", None, None, None, None, None, "annotations", "signature", given
    assert kernel.fast == [(4, 1, 1, "stream", "f", "m", None, None, None, *given) if scratch else past]
    again = launcher._again((4,), 0, (x, offsets, 16, 3))
    assert again is not None
    assert [again.arguments[place] for place in again.pointers] == [x.data_ptr(), offsets.data_ptr()]
    packed = release == "3.9" and not scratch
    assert again.packed == (len(past) - 2 if packed else None)
    assert again.arguments[-5:] == list(given)


def test_only_what_compiles_anew_takes_tritons_way(kernel: Kernel) -> None:
    from triton_moe.kernels.launch import Launcher

    launcher, x, offsets = Launcher(kernel, BLOCK=8), torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    known = (x, offsets, 16, 3)
    launcher._launch((4,), 0, known)
    assert (len(kernel.slow), len(kernel.fast)) == (1, 0)
    launcher._launch((5, 2), 0, (x, offsets, 16, 7))  # `number` is not specialised
    launcher._launch((4,), 0, (x[4:], offsets, 16, 3))
    assert len(kernel.slow) == 1
    common = ("stream", "f", "m", None, None, None)
    assert kernel.fast[0] == (5, 2, 1, *common, x.data_ptr(), offsets.data_ptr(), 16, 7, 8)
    assert kernel.fast[1] == (4, 1, 1, *common, x[4:].data_ptr(), offsets.data_ptr(), 16, 3, 8)
    others = ((x, offsets, 32, 3), (x.double(), offsets, 16, 3), (None, offsets, 16, 3), (x, offsets, 16, 2**31))
    for number, args in enumerate(others, start=2):
        for _ in range(2):
            launcher._launch((4,), 0, args)
        assert len(kernel.slow) == number
    launcher._launch((4,), 1, known)  # another device
    for _ in range(2):
        launcher._launch((4,), 0, (x[1:], offsets, 16, 3))  # not aligned to 16 bytes
    assert len(kernel.slow) == 8
    assert kernel.fast[4][9] is None


def test_a_piece_is_its_view(kernel: Kernel) -> None:
    from triton_moe import ExpertLayout
    from triton_moe.kernels.launch import Launcher, Piece
    from triton_moe.kernels.route import packed_numel, trimmed, unpack

    layout, ids = ExpertLayout((8, 8, 4)), torch.zeros(5, 2, dtype=torch.int32)
    packed = torch.arange(packed_numel(ids.numel(), layout), dtype=torch.int32)
    pieces, views = unpack(packed, ids, layout), trimmed(packed, ids, layout)
    for name in ("counts", "row_offsets", "ragged_offsets", "row_to_slot", "slot_to_row", "row_blocks", "expert_order"):
        piece, view = getattr(pieces, name), getattr(views, name)
        assert isinstance(piece, Piece)
        assert piece.address == view.data_ptr()
        assert piece.dtype == view.dtype
        assert torch.equal(piece.view()[: view.numel()], view.flatten())
    assert pieces.read_ragged_numel() == views.read_ragged_numel()
    launcher, x = Launcher(kernel, BLOCK=8), torch.zeros(64)
    for _ in range(2):
        launcher._launch((4,), 0, (x, pieces.row_offsets, 16, 3))
    ((_, _, shown, *_),), (given,) = kernel.slow, kernel.fast
    assert shown.data_ptr() == given[10] == views.row_offsets.data_ptr()


def test_past_tritons_encoding_of_descriptors(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where what is known of each is there, and only of what Triton puts before its C function."""
    from triton_moe.kernels import launch

    def encoding(tensordesc_meta: list) -> Any:
        launcher = kernel.fast.append
        return lambda *args: launcher((args, tensordesc_meta))

    known, unknown = encoding([{"swizzle": 3}]), encoding([None])
    assert launch._past_encoding(known) == (known, [])
    monkeypatch.setattr(launch, "RELEASE", "3.9")
    assert launch._past_encoding(known) == (kernel.fast.append, [{"swizzle": 3}])
    for run in (unknown, encoding([]), lambda *args: None, Run(kernel).launch, print):
        assert launch._past_encoding(run) == (run, [])


def test_a_descriptor_of_another_address() -> None:
    from triton_moe.kernels.hopper.launch import _piece_boxes
    from triton_moe.kernels.launch import _descriptor_at

    matrix = torch.zeros(128, 96, dtype=torch.bfloat16)
    memory, at = weakref.ref(matrix), _descriptor_at(_piece_boxes(matrix), None)
    (other,) = at(4096)
    assert other.base.data_ptr() == 4096
    assert (list(other.shape), list(other.strides), other.block_shape) == ([128, 96], [96, 1], [64, 64])
    assert at(8192)[0].base.data_ptr() == 8192
    del matrix
    assert memory() is None


@pytest.mark.skipif(RELEASE is None, reason="only known releases of Triton let us past their encoding")
def test_an_encoded_descriptor_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its own wrapper hands to the C function, but encoded once for each address, in whatever place."""
    from triton_moe.kernels import launch
    from triton_moe.kernels.hopper.launch import _piece_boxes

    nvidia: Any = importlib.import_module("triton.backends.nvidia.driver")
    encoded: list[tuple] = []

    def fill(*args: Any) -> str:
        encoded.append(args)
        return f"map {args[0]}"

    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(utils=utils))
    matrix, given = torch.zeros(128, 96, dtype=torch.bfloat16), []
    descriptor = _piece_boxes(matrix)
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [64, 64], "fp4_padded": False}
    wrapped = nvidia.wrap_handle_tensordesc(lambda *args: given.append(args), {0: "tensordesc<bf16[64,64]>"}, [meta])
    packs = RELEASE == "3.9"
    before = range(16 if packs else nvidia._BASE_ARGS_FORMAT_LEN)
    wrapped(*before, (descriptor,) if packs else descriptor)
    raw, (known,) = launch._past_encoding(wrapped)
    for _ in range(2):
        at = launch._descriptor_at(descriptor, known)(matrix.data_ptr())
        raw(*before, *((tuple(at),) if packs else at))
    assert [_listed(each) for each in given] == [_listed(given[0])] * 3
    assert len(encoded) == 2
    assert _listed(encoded[1]) == _listed(encoded[0])


def _listed(args: tuple) -> list:
    return [list(arg) if isinstance(arg, tuple) else arg for arg in args]
