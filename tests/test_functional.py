"""What the public functions accept, and that anything else raises a ValueError that names the argument."""

import re
import subprocess
import sys

import pytest
import torch

from triton_moe import ExpertLayout, moe_mlp
from triton_moe.functional import gather, grouped_gemm_down, grouped_gemm_up, route, scatter

LAYOUT = ExpertLayout((4, 2, 0))


def arguments(**changes):
    """A valid call: T = 5, H = 3, K = 2, E = 3, S = 6."""
    generator = torch.Generator().manual_seed(0)
    valid = {
        "x": torch.randn(5, 3, generator=generator),
        "topk_weights": torch.rand(5, 2, generator=generator),
        "topk_ids": torch.randint(0, 3, (5, 2), generator=generator),
        "w1": torch.randn(3, 6, generator=generator),
        "w2": torch.randn(6, 3, generator=generator),
        "layout": LAYOUT,
    }
    return {**valid, **changes}


W = torch.zeros
BAD = [
    ("x", {"x": W(5, 3, dtype=torch.int32)}, "a float tensor"),
    ("x", {"x": torch.tensor(1.0)}, "a float tensor"),
    ("x", {"x": [[1.0]]}, "a tensor"),
    ("w1", {"x": W(5, 4)}, "shape (4, 6), got (3, 6)"),
    ("w1", {"w1": W(3, 7)}, "shape (3, 6), got (3, 7)"),
    ("w1", {"w1": W(3, 6, dtype=torch.float64)}, "torch.float32 on cpu as x, got torch.float64"),
    ("w1", {"w1": W(3, 6, device="meta")}, "torch.float32 on cpu as x, got torch.float32 on meta"),
    ("w2", {"w2": None}, "a tensor, got NoneType"),
    ("w2", {"w2": W(3, 6)}, "shape (6, 3), got (3, 6)"),
    ("w3", {"w3": W(3, 6)}, "None with an activation that is not gated"),
    ("w3", {"activation": "swiglu"}, "the up weights of a gated activation, got None"),
    ("w3", {"activation": "swiglu", "w3": W(3, 5)}, "shape (3, 6), got (3, 5)"),
    ("activation", {"activation": "swish"}, "one of relu_squared"),
    ("activation", {"activation": None}, "one of relu_squared"),
    ("backend", {"backend": "cuda"}, "one of auto, hopper, triton, torch, got 'cuda'"),
    ("layout", {"layout": (4, 2, 0)}, "an ExpertLayout, got tuple"),
    ("topk_ids", {"topk_ids": W(5, 2)}, "int32 or int64, got torch.float32"),
    ("topk_ids", {"topk_ids": W(5, 2, dtype=torch.uint8)}, "int32 or int64, got torch.uint8"),
    ("topk_ids", {"topk_ids": W(5, dtype=torch.int32)}, "shape (T, K), got (5,)"),
    ("topk_ids", {"topk_ids": W(5, 4, dtype=torch.int32)}, "1 <= K <= E = 3, got K = 4"),
    ("topk_ids", {"topk_ids": W(5, 0, dtype=torch.int32)}, "1 <= K <= E = 3, got K = 0"),
    ("topk_ids", {"topk_ids": W(4, 2, dtype=torch.int32), "topk_weights": W(4, 2)}, "T = 5 rows as x, got 4"),
    ("topk_ids", {"topk_ids": W(5, 2, dtype=torch.int32, device="meta")}, "a tensor on cpu, got meta"),
    ("topk_weights", {"topk_weights": W(5, 1)}, "shape (5, 2) as topk_ids, got (5, 1)"),
    ("topk_weights", {"topk_weights": W(5, 2, dtype=torch.float64)}, "float32 or torch.float32, got torch.float64"),
    ("topk_weights", {"topk_weights": W(5, 2, device="meta")}, "a tensor on cpu, got meta"),
    ("b1", {"b1": W(7)}, "shape (6,), got (7,)"),
    ("b1", {"b1": 0.5}, "a tensor, got float"),
    ("b1", {"b1": W(6, dtype=torch.float64)}, "torch.float32 on cpu as x, got torch.float64"),
    ("b2", {"b2": W(3)}, "shape (3, 3), got (3,)"),
    ("b3", {"b3": W(6)}, "None with an activation that is not gated, got a tensor"),
    ("b3", {"activation": "swiglu", "w3": W(3, 6), "b3": W(3)}, "shape (6,), got (3,)"),
    ("activation_memory", {"activation_memory": "little"}, "one of bounded, exact, got 'little'"),
    ("recompute", {"recompute": 1}, "True or False, got int"),
]


def test_addresses_that_int32_cannot_hold_are_refused() -> None:
    far_apart = torch.empty(3, 2**24)[:, :6]
    with pytest.raises(ValueError, match=r"^w1: expected strides of at most 16777215, got \(16777216, 1\)"):
        moe_mlp(**arguments(w1=far_apart))
    with pytest.raises(ValueError, match=r"^topk_ids: expected at most 1073741824 slots, got 1073741825"):
        route(torch.zeros(1, 1, dtype=torch.int32).expand(2**30 + 1, 1), arguments()["layout"])


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(name: str, changes: dict, message: str) -> None:
    moe_mlp(**arguments())
    with pytest.raises(ValueError, match=rf"^{name}: expected .*{re.escape(message)}"):
        moe_mlp(**arguments(**changes))


def test_unknown_option_raises() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        moe_mlp(**arguments(dropless=True))


def test_triton_backend_refuses_cpu_tensors() -> None:
    """In a process of its own, because the tests' own kernels are interpreted."""
    program = """
import torch
from triton_moe import ExpertLayout, moe_mlp
x = torch.zeros(1, 1)
moe_mlp(x, x, x.int(), x, x, layout=ExpertLayout((1,)), backend="triton")
"""
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "ValueError: backend: expected CUDA tensors (compute capability 8.0 or later)" in result.stderr
    assert "got tensors on cpu" in result.stderr


def test_cpu_needs_no_triton() -> None:
    """A CPU call imports neither triton nor the kernels."""
    program = """
import sys, torch
sys.modules["triton"] = None
from triton_moe import MoEConfig, MoEMLP
MoEMLP(MoEConfig([(2, 4)], 1, 3))(torch.ones(2, 3))[0].sum().backward()
assert not any(name.startswith("triton_moe.kernels") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_triton_backend_refuses_fp64(device: str) -> None:
    wide = {
        name: value.to(device).double()
        for name, value in arguments().items()
        if name in ("x", "topk_weights", "w1", "w2")
    }
    with pytest.raises(ValueError, match="x: expected float32, bfloat16 or float16 for backend 'triton'"):
        moe_mlp(**arguments(**wide, topk_ids=arguments()["topk_ids"].to(device), backend="triton"))


def test_check_mode_names_ids_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = arguments(topk_ids=torch.tensor([[0, 1], [2, 3], [-1, 0], [4, 0], [0, 7]]))
    out = moe_mlp(**bad)
    monkeypatch.setenv("TRITON_MOE_CHECK_IDS", "1")
    with pytest.raises(ValueError, match=r"topk_ids: expected 0 <= id <= E = 3, got \[-1, 4, 7\]"):
        moe_mlp(**bad)
    good = arguments(topk_ids=bad["topk_ids"].where((bad["topk_ids"] >= 0) & (bad["topk_ids"] <= 3), 3))
    assert torch.equal(moe_mlp(**good), out)


def test_ids_out_of_range_add_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are, they read and write nothing; in check mode the kernels' backend raises too."""
    on_device = {name: value.to(device) for name, value in arguments().items() if isinstance(value, torch.Tensor)}
    on_device["topk_ids"] = torch.tensor([[0, 1], [2, 3], [-1, 0], [2**32, 0], [-(2**63), 2**63 - 1]], device=device)
    out = moe_mlp(**arguments(**on_device, backend="triton"))
    expected = moe_mlp(**arguments(topk_ids=on_device["topk_ids"].cpu(), backend="torch"))
    torch.testing.assert_close(out.cpu(), expected)
    assert not out[4].any()
    monkeypatch.setenv("TRITON_MOE_CHECK_IDS", "1")
    with pytest.raises(ValueError, match="topk_ids: expected 0 <= id"):
        moe_mlp(**arguments(**on_device, backend="triton"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_building_blocks_name_what_is_wrong(backend: str, device: str) -> None:
    given = {name: value.to(device) for name, value in arguments().items() if isinstance(value, torch.Tensor)}
    routing = route(given["topk_ids"], LAYOUT, backend=backend)
    x, w1, w2, weights = given["x"], given["w1"], given["w2"], given["topk_weights"]
    y = gather(x, routing=routing)
    bad_calls = [
        ("x", lambda: gather(x[:4], routing=routing)),
        ("routing", lambda: gather(x, routing=LAYOUT)),  # type: ignore[arg-type]
        ("y", lambda: scatter(y[:9], weights, routing=routing)),
        ("topk_weights", lambda: scatter(y, weights[:, :1], routing=routing)),
        ("w1", lambda: grouped_gemm_up(x, w1.t(), routing=routing)),
        ("w3", lambda: grouped_gemm_up(x, w1, routing=routing, activation="geglu")),
        ("activation", lambda: grouped_gemm_up(x, w1, routing=routing, activation="")),
        ("x_up", lambda: grouped_gemm_down(x.flatten(), w2, routing=routing)),
        ("w2", lambda: grouped_gemm_down(grouped_gemm_up(x, w1, routing=routing), w2[:5], routing=routing)),
    ]
    for name, bad_call in bad_calls:
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            bad_call()


def test_no_tokens(device: str) -> None:
    """An empty output, zero gradients for the weights."""
    given = {name: value.to(device) for name, value in arguments().items() if isinstance(value, torch.Tensor)}
    empty = {name: given[name][:0] for name in ("x", "topk_weights", "topk_ids")}
    for backend in ("triton", "torch"):
        leaves = {name: given[name].clone().requires_grad_() for name in ("w1", "w2")}
        leaves |= {name: empty[name].clone().requires_grad_() for name in ("x", "topk_weights")}
        out = moe_mlp(**{**arguments(**{**given, **empty, **leaves}), "backend": backend})
        assert out.shape == (0, 3)
        out.sum().backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None, name
            assert leaf.grad.shape == leaf.shape
            assert not leaf.grad.any()
