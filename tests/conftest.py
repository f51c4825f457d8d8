"""Without a GPU the kernels run in Triton's interpreter, with small tiles; with one they run natively."""

import functools
import os
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# A compiled graph holds our backward as it was traced, and is cached on disk under the operators' names alone.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
torch.set_num_threads(1)  # tensors this small only wait for each other's threads, and the workers take all cores
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, hence before anything imports them
    if find_spec("triton"):
        from triton.runtime import interpreter

        # It puts itself in the place of Triton's language at every launch and at every call of a device function, which
        # takes a third of its time. Here that is done once for each function, and stays.
        interpreter._patch_lang = functools.cache(interpreter._patch_lang)
        interpreter._LangPatchScope.restore = lambda self: None

KERNEL_DEVICE = "cuda" if HAS_GPU else "cpu"
# The interpreter's bfloat16 dot is wrong, so bfloat16 is tested on GPUs alone.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16) if HAS_GPU else (torch.float32, torch.float16)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `device` runs the kernels there, one that also asks for `dtype` in each dtype they take."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(KERNEL_DEVICE, marks=[pytest.mark.gpu] if HAS_GPU else [])])
    if {"device", "dtype"} <= set(metafunc.fixturenames):
        metafunc.parametrize("dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, what is marked `gpu` is skipped, and of a test marked `pairs` half the combinations are left out.

    Those stay whose values have places, among the values of their parameter, of an even sum: so with three parameters
    or more each value still meets each of every other parameter.
    """
    if HAS_GPU:
        return
    values: defaultdict[tuple[object, str], list[object]] = defaultdict(list)

    def place(test: object, name: str, value: object) -> int:
        known = values[test, name]
        if value not in known:
            known.append(value)
        return known.index(value)

    def is_kept(item: Any) -> bool:
        return sum(place(item.function, *given) for given in item.callspec.params.items()) % 2 == 0

    items[:] = [item for item in items if "pairs" not in item.keywords or is_kept(item)]
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and round and round it goes.\n" * 40)
    return path
