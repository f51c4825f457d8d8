"""`reference/`: the block-sparse baseline is right, and wrong exactly where its historical error made it so."""

import dataclasses
import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import triton_moe
from reference import block_sparse
from reference.moe import MoEMLP, padded_rows
from reference.stk_moe import StkMoEMLP
from reference.topology_var import Topology, enough_bits, historical_bits, variable_topology
from triton_moe import ExpertLayout, MoEConfig, functional
from triton_moe import reference as oracle

CONFIGS = {
    "one width": MoEConfig([(4, 8)], 2, 12, block_size=4),
    "widths, gated": MoEConfig([(2, 12), (3, 4), (1, 8)], 2, 10, block_size=4, activation="swiglu"),
    "null experts": MoEConfig([(2, 8), (2, 0), (1, 4)], 3, 6, block_size=2, activation="geglu_tanh"),
    "K = E": MoEConfig([(1, 6), (1, 3)], 2, 5, block_size=3, activation="gelu", normalize_weights=False),
}
WIDE = MoEConfig([(2, 16), (2, 8)], 2, 12, block_size=4)
"""Experts of several blocks: 12 block columns, which ceil(log2(4)) = 2 bits do not tell apart."""


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> MoEConfig:
    return CONFIGS[request.param]


def layers(config: MoEConfig, historical: bool = False) -> tuple[MoEMLP, triton_moe.MoEMLP]:
    """The reference and ours, in fp64 and on the same weights."""
    torch.manual_seed(0)
    theirs = MoEMLP(config, historical=historical, dtype=torch.float64)
    ours = triton_moe.MoEMLP(config, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def outcome(layer: triton_moe.MoEMLP, num_tokens: int = 13) -> dict[str, Tensor]:
    """Output, losses and every gradient for tokens that are always the same."""
    generator = torch.Generator().manual_seed(1)
    shape = (num_tokens, layer.config.hidden_size)
    x, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    out, aux, f = layer(x)
    torch.autograd.backward((out, aux["load_balance_loss"]), (dout, None))
    grads = {name: weight.grad for name, weight in layer.named_parameters()}
    assert x.grad is not None
    found = {"out": out.detach(), "f": f, "x": x.grad, **aux}
    return found | {name: grad for name, grad in grads.items() if grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected.detach()).norm() / expected.detach().norm())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def dense(blocks: Tensor, topology: Topology) -> Tensor:
    """The block-sparse matrix with its zeros."""
    b = topology.block_size
    matrix = blocks.new_zeros(topology.shape)
    for block, row, column in zip(blocks, topology.row_indices, topology.column_indices, strict=True):
        matrix[row * b : (row + 1) * b, column * b : (column + 1) * b] = block
    return matrix


class CopiesOfLists(TorchFunctionMode):
    """Counts the tensors that are made of Python numbers, each of which is a copy to the device."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.tensor, torch.as_tensor, torch.asarray)
        return func(*args, **(kwargs or {}))


class TestTopology:
    def test_the_example(self) -> None:
        topology = variable_topology(torch.tensor([1, 2]), ExpertLayout((8, 4)), 4)
        expected = Topology((12, 12), 4, *map(torch.tensor, (
            [0, 0, 1, 2], [0, 1, 2, 2], [0, 2, 3, 4], [0, 0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 3],
        )))  # fmt: skip
        assert topology.shape == expected.shape
        for field in dataclasses.fields(Topology)[2:]:
            assert getattr(topology, field.name).tolist() == getattr(expected, field.name).tolist(), field.name
            assert getattr(topology, field.name).dtype == torch.int32

    def test_the_transposed_order_walks_the_columns(self) -> None:
        topology = variable_topology(torch.tensor([2, 0, 3, 1, 2]), ExpertLayout((8, 4, 0, 12, 4)), 4)
        order = topology.block_offsets_t.long()
        assert topology.column_indices[order].tolist() == sorted(topology.column_indices.tolist())
        assert topology.column_indices_t.tolist() == topology.row_indices[order].tolist()
        counts = torch.bincount(topology.column_indices, minlength=7)
        assert topology.offsets_t.diff().tolist() == counts.tolist()

    @pytest.mark.parametrize(("columns", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9)])
    def test_bits(self, columns: int, bits: int) -> None:
        assert enough_bits(columns) == historical_bits(columns) == bits

    def test_too_few_bits_mix_columns(self) -> None:
        rows, layout = torch.tensor([1, 1, 1, 1]), ExpertLayout((8, 8, 8, 8))
        right = variable_topology(rows, layout, 4)
        wrong = variable_topology(rows, layout, 4, sort_bits=historical_bits(4))
        assert wrong.block_offsets_t.tolist() != right.block_offsets_t.tolist()
        for field in ("row_indices", "column_indices", "offsets", "offsets_t"):
            assert getattr(wrong, field).tolist() == getattr(right, field).tolist()

    def test_the_layout_goes_to_the_device_once(self) -> None:
        rows, layout = torch.tensor([1, 2, 1]), ExpertLayout((24, 40, 8))  # no other test's
        columns = {8: [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 8], 4: [*range(16), *range(6, 16), 16, 17]}
        for block_size, expected in columns.items():
            with CopiesOfLists() as copies:
                first = variable_topology(rows, layout, block_size)
                at_first = copies.count
                second = variable_topology(rows, layout, block_size)
            assert 0 < at_first == copies.count, block_size
            assert first.column_indices.tolist() == second.column_indices.tolist() == expected

    def test_widths_off_the_blocks_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"widths\[1\]: expected a multiple of block_size = 4, got 6"):
            variable_topology(torch.tensor([1, 1]), ExpertLayout((8, 6)), 4)
        with pytest.raises(ValueError, match=r"widths\[0\]: expected a multiple of block_size = 128, got 500"):
            MoEMLP(MoEConfig([(2, 500)], 1, 128))


def test_products_are_those_of_dense_matrices() -> None:
    topology = variable_topology(torch.tensor([2, 0, 1]), ExpertLayout((8, 4, 12)), 4)
    P, S = topology.shape
    a, up, down, dout = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((P, 5), (5, S), (S, 7), (P, 7))
    )
    mask = dense(torch.ones(topology.row_indices.numel(), 4, 4, dtype=torch.float64), topology)
    expected = (a @ up * mask) @ down
    blocks = block_sparse.sdd(a, up, topology)
    actual = block_sparse.dsd(blocks, down, topology)
    torch.testing.assert_close(dense(blocks, topology), a @ up * mask)
    torch.testing.assert_close(actual, expected)
    leaves = (a, up, down)
    pairs = zip(*(torch.autograd.grad(out, leaves, dout) for out in (actual, expected)), strict=True)
    for actual_grad, expected_grad in pairs:
        torch.testing.assert_close(actual_grad, expected_grad)


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_the_reference_is_the_layer(config: MoEConfig, num_tokens: int) -> None:
    theirs, ours = layers(config)
    assert_same(outcome(theirs, num_tokens), outcome(ours, num_tokens))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", True),
        ("load_balance", "sequence"),
        ("balancing", triton_moe.BiasBalancing()),
        ("weights_scale", 2.5),
        ("groups", triton_moe.GroupLimit(2, 1)),
        ("shared_null_logit", True),
        ("shared_width", 8),
    ],
)
def test_an_option_it_lacks_is_refused(name: str, value: object) -> None:
    config = MoEConfig([(4, 8), (2, 0)], num_active_experts=2, hidden_size=8, block_size=8)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        MoEMLP(dataclasses.replace(config, **{name: value}))


def test_shapes_and_state_dict_are_the_layers() -> None:
    theirs, ours = layers(CONFIGS["widths, gated"])
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    assert theirs(x)[0].shape == x.shape
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 10\)"):
        theirs(x[..., :4])


def test_intermediates_are_the_oracles(config: MoEConfig) -> None:
    theirs, _ = layers(config)
    x = torch.randn(9, config.hidden_size, dtype=torch.float64)
    stages = theirs.forward_with_intermediates(x)
    weights, ids = stages["top_k_weights"], stages["selected_experts"]
    assert isinstance(weights, Tensor)
    assert isinstance(ids, Tensor)
    routing = oracle.route(ids, config.layout)
    pre = oracle.pre_activation(x, theirs.w1, theirs.w3, routing=routing)
    act = oracle.activation(pre, routing=routing, activation=config.activation)
    down = oracle.grouped_gemm_down(act, theirs.w2, routing=routing)
    gate = [] if theirs.w3 is None else ["x_after_gate"]
    assert list(stages) == [
        *("router_logits", "router_scores", "top_k_weights", "selected_experts", "tokens_per_expert"),
        *("padded_tokens_per_expert", "topology", "x_gathered", *gate, "x_after_up", "x_after_activation"),
        *("x_after_down", "output"),
    ]
    products = [stages[name] for name in ("x_after_gate", "x_after_up") if name in stages]
    assert len(products) == (1 if theirs.w3 is None else 2)
    torch.testing.assert_close(stages["router_logits"], x @ theirs.router.weight.t())
    torch.testing.assert_close(stages["tokens_per_expert"], routing.counts.long())
    torch.testing.assert_close(stages["output"], oracle.scatter(down, weights, routing=routing))
    for e, width in enumerate(config.layout.widths):
        if not width:
            continue  # it has rows here, and none in the oracle
        rows = slice(*routing.row_offsets[e : e + 2].tolist())
        gathered = theirs.expert_rows(stages["x_gathered"], stages, e)  # type: ignore[arg-type]
        torch.testing.assert_close(gathered, oracle.gather(x, routing=routing)[rows])
        torch.testing.assert_close(theirs.expert_rows(stages["x_after_down"], stages, e), down[rows])  # type: ignore
        for part, product in enumerate(products):
            expected = routing.ragged_block(pre, e, part, len(products))
            torch.testing.assert_close(theirs.expert_block(product, stages, e), expected)  # type: ignore[arg-type]
        actual = theirs.expert_block(stages["x_after_activation"], stages, e)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, routing.ragged_block(act, e))


def test_intermediates_are_of_one_graph() -> None:
    theirs, _ = layers(CONFIGS["widths, gated"])
    stages = theirs.forward_with_intermediates(torch.randn(9, 10, dtype=torch.float64, requires_grad=True))
    names = ("router_logits", "x_gathered", "x_after_gate", "x_after_up", "x_after_activation", "x_after_down")
    chosen = [stages[name] for name in names]
    out = stages["output"]
    assert isinstance(out, Tensor)
    for name, grad in zip(names, torch.autograd.grad(out.square().sum(), chosen), strict=True):  # type: ignore[arg-type]
        assert grad.abs().sum() > 0, name


def test_padding_is_zero_and_rows_fill_blocks() -> None:
    ids = torch.tensor([[0, 2], [2, 0], [2, 3]])
    rows = padded_rows(ids, 4, 2)
    assert rows.tokens_per_expert.tolist() == [2, 0, 3, 1]
    assert rows.block_rows.tolist() == [1, 0, 2, 1]
    assert rows.row_to_token.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert rows.slot_to_row.tolist() == [[0, 2], [3, 1], [4, 6]]


class TestHistorical:
    def test_the_weights_gradients_alone_are_garbage(self) -> None:
        wrong, ours = layers(WIDE, historical=True)
        actual, expected = outcome(wrong, 64), outcome(ours, 64)
        errors = {name: relative_error(actual.pop(name), expected.pop(name)) for name in ("w1", "w2")}
        assert_same(actual, expected)
        assert min(errors.values()) > 0.5, errors

    def test_a_sum_of_outputs_hides_half_of_it(self) -> None:
        """Its gradient is the same for every row and activations are of one sign: any rows give much the same dw2."""
        wrong, ours = layers(WIDE, historical=True)
        x = torch.randn(256, WIDE.hidden_size, dtype=torch.float64)
        for layer in (wrong, ours):
            layer(x)[0].sum().backward()
        similarity = {
            name: float(F.cosine_similarity(*(getattr(each, name).grad.flatten() for each in (wrong, ours)), dim=0))
            for name in ("w1", "w2")
        }
        assert similarity["w1"] < 0.25, similarity
        assert similarity["w2"] > 0.5, similarity

    def test_it_does_not_show_while_experts_are_one_block_wide(self) -> None:
        config = MoEConfig([(4, 4)], 2, 12, block_size=4)
        wrong, ours = layers(config, historical=True)
        assert_same(outcome(wrong, 64), outcome(ours, 64))

    def test_enough_bits_mend_it(self) -> None:
        right, ours = layers(WIDE)
        assert_same(outcome(right, 64), outcome(ours, 64))


def padded_places(bin_ids: Tensor, bins: Tensor, padded_bins: Tensor) -> Tensor:
    """Of slots in expert order, their padded rows: as far behind the expert's start as they are among the slots."""
    starts, padded_starts = (F.pad(ends, (1, 0))[bin_ids] for ends in (bins, padded_bins))
    return torch.arange(bin_ids.numel(), device=bin_ids.device) - starts + padded_starts


def stand_in_for_megablocks() -> ModuleType:
    """`megablocks.ops` as its unit tests describe the two operators; `calls` lists those that ran.

    indices `(T K)` are slots t * K + k in expert order, bin_ids the expert of each, bins and padded_bins `(E)` where
    each expert's rows end, without padding and with it; weights `(T K)` are in the slots' own order. The kernels read
    int32 indices and rows that lie one behind the other.
    """
    ops = ModuleType("megablocks.ops")
    calls: list[str] = []

    def check(matrix: Tensor, *indices: Tensor) -> None:
        assert matrix.dim() == 2
        assert matrix.is_contiguous()
        assert all(index.dtype == torch.int32 and index.dim() == 1 for index in indices)

    def padded_gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int):
        check(x, indices, bin_ids, bins, padded_bins)
        calls.append("padded_gather")
        places = padded_places(bin_ids, bins, padded_bins)
        return x.new_zeros(int(padded_bins[-1]), x.shape[1]).index_copy(0, places, x[indices // top_k])

    def padded_scatter(
        x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int
    ) -> Tensor:
        check(x, indices, bin_ids, bins, padded_bins)
        assert weights.shape == indices.shape
        calls.append("padded_scatter")
        rows = x[padded_places(bin_ids, bins, padded_bins)] * weights[indices][:, None]
        return x.new_zeros(indices.numel() // top_k, x.shape[1]).index_add(0, indices // top_k, rows)

    ops.__dict__.update(calls=calls, padded_gather=padded_gather, padded_scatter=padded_scatter)
    return ops


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")  # stk's kernels under triton 3.9
class TestStk:
    CONFIG = MoEConfig([(2, 256), (2, 128)], 2, 128, activation="swiglu", aux_losses=False)

    def test_without_stk_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("stk", "stk.ops"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"needs stanford-stk, which the dependency group `baseline` installs"):
            StkMoEMLP(self.CONFIG)

    @pytest.mark.skipif(importlib.util.find_spec("stk") is None, reason="needs stanford-stk, which Linux alone has")
    @pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # at its first product in autograd's thread
    @pytest.mark.parametrize(
        ("historical", "library"), [(False, "stk"), (True, "stk"), (False, "stk+megablocks"), (True, "stk+megablocks")]
    )
    def test_stk_agrees_with_plain_pytorch(
        self, historical: bool, library: str, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Right or wrong: stk follows the topology as `block_sparse.py` does."""
        stand_in = stand_in_for_megablocks() if library == "stk+megablocks" else None
        monkeypatch.setitem(sys.modules, "megablocks.ops", stand_in)
        torch.manual_seed(0)
        plain = MoEMLP(self.CONFIG, historical=historical, device=device, dtype=torch.float16)
        real = StkMoEMLP(self.CONFIG, historical=historical, device=device, dtype=torch.float16)
        assert real.library == library
        real.load_state_dict(plain.state_dict())
        x, dout = (torch.randn(40, 128, device=device, dtype=torch.float16) for _ in range(2))
        results = []
        for layer in (plain, real):
            x = x.detach().requires_grad_()
            out = layer(x)[0]
            out.backward(dout)
            results.append([out, x.grad, *(weight.grad for weight in layer.parameters())])
        for expected, actual in zip(*results, strict=True):
            assert relative_error(actual.float(), expected.float()) < 2e-3
        assert stand_in is None or stand_in.calls == ["padded_gather", "padded_scatter"]

    @pytest.mark.parametrize("top_k", [1, 3])
    def test_megablocks_operators_are_given_what_they_take(self, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """An expert without rows, others that need padding: gather and scatter, and their gradients, are PyTorch's."""
        stand_in = stand_in_for_megablocks()
        for name in ("stk", "stk.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "megablocks.ops", stand_in)
        config = MoEConfig([(2, 256), (3, 128)], top_k, 128, aux_losses=False)
        layer, plain = StkMoEMLP(config, dtype=torch.float64), MoEMLP(config, dtype=torch.float64)
        ids = torch.rand(150, 4).argsort(1)[:, :top_k]  # never expert 4
        rows = padded_rows(ids, 5, 128)
        x = torch.randn(128, 150, dtype=torch.float64).t().requires_grad_()  # column by column
        down = torch.randn(rows.row_to_token.numel(), 128, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(150, top_k, dtype=torch.float64, requires_grad=True)
        results = []
        for each in (layer, plain):
            gathered, scattered = each.gather(x, rows), each.scatter(down, weights, rows)
            loss = (gathered * down.detach()).sum() + (scattered * x.detach()).sum()
            results.append([gathered, scattered, *torch.autograd.grad(loss, (x, down, weights))])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        assert stand_in.calls == ["padded_gather", "padded_scatter"]

    @pytest.mark.skipif(importlib.util.find_spec("stk") is None, reason="needs stanford-stk, which Linux alone has")
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"block_size": 64}, "block_size: expected 128 for stk, got 64"),
            ({"hidden_size": 192}, "hidden_size: expected a multiple of 128 for stk, got 192"),
        ],
    )
    def test_what_stk_cannot_take_is_named(self, changes: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StkMoEMLP(dataclasses.replace(self.CONFIG, **changes))

    @pytest.mark.skipif(importlib.util.find_spec("stk") is None, reason="needs stanford-stk, which Linux alone has")
    def test_a_device_without_kernels_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(functional, "_look_for_kernels", functional._look_for_kernels.__wrapped__)
        with pytest.raises(ValueError, match="device: expected a CUDA device for stk, got cpu"):
            StkMoEMLP(self.CONFIG)(torch.randn(3, 128))
