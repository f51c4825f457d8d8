import copy
import dataclasses
import pickle

import pytest
import torch

from triton_moe.activations import ACTIVATIONS, is_gated
from triton_moe.balancing import BiasBalancing
from triton_moe.losses import compute_loss, load_balance_loss, router_z_loss
from triton_moe.moe import MoEConfig, MoEMLP
from triton_moe.router import ROUTERS, GroupLimit, choose_experts

H = 24
SIZES = ((2, 16), (1, 5), (2, 40), (1, 0))
LOSSES = ("router_z_loss", "load_balance_loss", "compute_loss")
STATISTICS = ("router_logits_abs_max", "router_logits_mean")


def _config(**changes) -> MoEConfig:
    return MoEConfig(**{"expert_sizes": SIZES, "num_active_experts": 2, "hidden_size": H, **changes})


def _layer(dtype=None, **changes) -> MoEMLP:
    torch.manual_seed(0)
    return MoEMLP(_config(**changes), dtype=dtype)


def _input(*shape, dtype=torch.float32):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(1)).to(dtype)


def _swiglu_by_definition(layer, x):
    """The sum over a token's experts, one token and one expert at a time."""
    assert layer.w3 is not None
    routed = choose_experts(x, layer.router.weight, num_active_experts=layer.config.num_active_experts)
    rows = []
    for t, token in enumerate(x):
        row = torch.zeros_like(token)
        for weight, e in zip(routed.topk_weights[t], routed.topk_ids[t].tolist(), strict=True):
            own = layer.layout.columns(e)
            gate, up = token @ layer.w1[:, own], token @ layer.w3[:, own]
            row = row + weight * ((gate * torch.sigmoid(gate) * up) @ layer.w2[own])
        rows.append(row)
    return torch.stack(rows)


class TestConfig:
    def test_sizes_are_kept_as_tuples_of_ints(self):
        assert _config(expert_sizes=[[2, 16], [1, 5]]).expert_sizes == ((2, 16), (1, 5))
        assert _config(expert_sizes=(pair for pair in SIZES)).layout.widths == (16, 16, 5, 40, 40, 0)

    def test_is_hashable_and_frozen(self):
        config = _config()
        assert config == _config(expert_sizes=[list(pair) for pair in SIZES])
        assert hash(config) == hash(_config())
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.hidden_size = 3  # type: ignore[misc]

    def test_n_embd_is_another_name_for_hidden_size(self):
        config = MoEConfig(SIZES, 2, n_embd=H)
        assert config == MoEConfig(SIZES, 2, H) == MoEConfig(SIZES, 2, H, n_embd=H)
        assert dataclasses.replace(config, hidden_size=2 * H).hidden_size == 2 * H

    def test_replace_makes_another_layout(self):
        config = _config()
        assert config.layout.num_experts == 6
        assert dataclasses.replace(config, expert_sizes=[(3, 7)]).layout.widths == (7, 7, 7)
        assert config.layout.num_experts == 6

    @pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
    def test_copies_are_equal(self, clone):
        config = _config(router="softmax", activation="swiglu")
        assert clone(config) == config
        assert clone(config).layout == config.layout

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"expert_sizes": 4}, r"expert_sizes: expected a sequence of \(count, width\) pairs, got 4"),
            ({"expert_sizes": []}, "expert_sizes: expected at least one expert, got none"),
            ({"expert_sizes": [(2, 16), 5]}, r"expert_sizes\[1\]: expected a \(count, width\) pair, got 5"),
            ({"expert_sizes": [(2, 1.5)]}, r"expert_sizes\[0\] width: expected an integer, got 1\.5"),
            ({"expert_sizes": [(2, -1)]}, r"expert_sizes\[0\]: .* got \(2, -1\)"),
            ({"expert_sizes": [(True, 16)]}, r"expert_sizes\[0\]: .* got \(True, 16\)"),
            ({"expert_sizes": [(4, 0)]}, "expert_sizes: expected an expert wider than 0"),
            ({"num_active_experts": 0}, "num_active_experts: expected an integer of 1 or more, got 0"),
            ({"num_active_experts": 7}, "num_active_experts: expected at most E = 6, got 7"),
            ({"num_active_experts": 2.0}, r"num_active_experts: expected an integer of 1 or more, got 2\.0"),
            ({"num_active_experts": True}, "num_active_experts: expected an integer of 1 or more, got True"),
            ({"hidden_size": 0}, "hidden_size: expected an integer of 1 or more, got 0"),
            ({"hidden_size": "24"}, "hidden_size: expected an integer of 1 or more, got '24'"),
            ({"hidden_size": None}, "hidden_size: expected an integer of 1 or more, got None"),
            ({"hidden_size": None, "n_embd": -1}, "n_embd: expected an integer of 1 or more, got -1"),
            ({"n_embd": 25}, "n_embd: expected hidden_size = 24 or nothing, got 25"),
            ({"block_size": 0}, "block_size: expected an integer of 1 or more, got 0"),
            ({"activation": "relu2"}, "activation: expected one of relu_squared, .* got 'relu2'"),
            ({"router": "noisy"}, "router: expected one of sigmoid, softmax, got 'noisy'"),
            ({"normalize_weights": 1}, "normalize_weights: expected one of True, False, got 1"),
            ({"aux_losses": None}, "aux_losses: expected one of True, False, got None"),
            ({"load_balance": "token"}, "load_balance: expected one of batch, sequence, got 'token'"),
            ({"weights_scale": 0}, "weights_scale: expected a number over 0, got 0"),
            ({"groups": (2, 1)}, r"groups: expected a GroupLimit or None, got \(2, 1\)"),
            ({"groups": GroupLimit(4, 2)}, "num_groups: expected a divisor of E = 6, got 4"),
            ({"groups": GroupLimit(6, 1, 1)}, "num_active_groups: expected room for K = 2 experts in .* got 1"),
            ({"groups": GroupLimit(2, 3)}, "num_active_groups: .* at most 2 groups of 3, got 3"),
            ({"groups": GroupLimit(2, 1, 4)}, "num_scores: expected 1 to 3, a group's size, got 4"),
            ({"shared_null_logit": 1}, "shared_null_logit: expected one of True, False, got 1"),
            (
                {"shared_null_logit": True, "expert_sizes": [(2, 16)]},
                "shared_null_logit: expected False without experts of width 0, got True",
            ),
            ({"shared_width": -8}, "shared_width: expected an integer of 1 or more, got -8"),
            ({"balancing": "smebu"}, "balancing: expected a BiasBalancing or None, got 'smebu'"),
            ({"backend": "cuda"}, "backend: expected one of auto, hopper, triton, torch, got 'cuda'"),
        ],
    )
    def test_errors_name_the_argument(self, changes, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            _config(**changes)

    def test_unknown_keyword(self):
        with pytest.raises(TypeError, match="top_k"):
            _config(top_k=2)


class TestParameters:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_state_dict_holds_the_weights_alone(self, activation):
        shapes = {name: tuple(tensor.shape) for name, tensor in _layer(activation=activation).state_dict().items()}
        S = 16 * 2 + 5 + 40 * 2
        expected = {"router.weight": (6, H), "w1": (H, S), "w2": (S, H)}
        assert shapes == (expected | {"w3": (H, S)} if is_gated(activation) else expected)

    @pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
    def test_strict_load_round_trip(self, activation):
        source, target = _layer(activation=activation), MoEMLP(_config(activation=activation))
        target.load_state_dict(source.state_dict(), strict=True)
        x = _input(9)
        assert torch.equal(source(x)[0], target(x)[0])

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_compute_the_same(self, clone):
        layer, x = _layer(), _input(9)
        layer(x)
        other = clone(layer)
        assert torch.equal(layer(x)[0], other(x)[0])
        assert other.w1 is not layer.w1

    def test_dtype_and_device_are_those_asked_for(self):
        layer = MoEMLP(_config(activation="swiglu"), device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}

    def test_meta_then_empty_then_init_is_the_layer_itself(self):
        layer = MoEMLP(_config(activation="swiglu"), device="meta").to_empty(device="cpu")
        torch.manual_seed(0)
        layer.init_params()
        layer._init_buffers()
        expected = _layer(activation="swiglu")
        torch.manual_seed(0)
        expected.init_params()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), name
        assert torch.equal(layer(_input(9))[0], expected(_input(9))[0])

    def test_reset_parameters_of_every_module_is_a_new_layer(self):
        """As it is called on models from the meta device: of all modules that have it, the layer's parts after it."""
        config = MoEConfig([(2, 16)], 1, 1024, balancing=BiasBalancing(update_in_forward=True))
        layer = MoEMLP(config, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.fill_(7)
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        assert not any(buffer.any() for buffer in layer.buffers())
        assert layer.router.weight.std().item() == pytest.approx(1024**-0.5, rel=0.1)
        assert layer.w1.std().item() == pytest.approx(1024**-0.5, rel=0.1)

    def test_initial_scale_is_one_over_the_root_of_the_fan_in(self):
        torch.manual_seed(0)
        layer = MoEMLP(MoEConfig([(1, 1024), (1, 64)], 1, 256, activation="swiglu"))
        assert layer.w3 is not None
        for weight, fan_in in ((layer.w1, 256), (layer.w3, 256), (layer.w2[:1024], 1024), (layer.w2[1024:], 64)):
            assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)

    def test_repr_says_what_it_is(self):
        text = repr(_layer())
        assert "2 x 16 + 1 x 5 + 2 x 40 + 1 x 0, num_active_experts=2, hidden_size=24" in text


class TestForward:
    def test_output_is_the_definition(self):
        layer, x = _layer(dtype=torch.float64, activation="swiglu"), _input(9, dtype=torch.float64)
        torch.testing.assert_close(layer(x)[0], _swiglu_by_definition(layer, x))

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)])
    def test_any_rank(self, shape):
        layer, x = _layer(), _input(*shape)
        out, _, f = layer(x)
        assert out.shape == x.shape
        assert f.shape == (6,)
        torch.testing.assert_close(out, layer(x.reshape(-1, H))[0].view(x.shape), rtol=0, atol=0)

    def test_input_of_any_strides(self):
        layer, x = _layer(), _input(3, 4)
        strided = x.transpose(0, 1)
        assert not strided.is_contiguous()
        assert torch.equal(layer(strided)[0], layer(strided.contiguous())[0])
        columns = x.reshape(-1, H).t().contiguous().t()
        torch.testing.assert_close(layer(columns)[0], layer(x)[0].view(-1, H))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype):
        layer = _layer(dtype=dtype)
        out, aux, f = layer(_input(2, 5, dtype=dtype))
        assert (out.dtype, f.dtype) == (dtype, dtype)
        assert {value.dtype for value in aux.values()} == {torch.float32}

    @pytest.mark.parametrize("router", ROUTERS)
    def test_aux_and_f_are_those_of_the_routing(self, router):
        layer, x = _layer(router=router, num_active_experts=3), _input(7)
        _, aux, f = layer(x)
        routed = choose_experts(x, layer.router.weight, num_active_experts=3, router=router)
        fractions = [sum(e == chosen for chosen in routed.topk_ids.flatten().tolist()) / 21 for e in range(6)]
        torch.testing.assert_close(f, torch.tensor(fractions))
        assert tuple(aux) == (*LOSSES, *STATISTICS)
        torch.testing.assert_close(aux["router_z_loss"], router_z_loss(routed.logits))
        torch.testing.assert_close(aux["load_balance_loss"], load_balance_loss(routed.probs, f, layer.layout))
        torch.testing.assert_close(aux["compute_loss"], compute_loss(routed.probs, layer.layout))
        torch.testing.assert_close(aux["router_logits_abs_max"], routed.logits.abs().max())
        torch.testing.assert_close(aux["router_logits_mean"], routed.logits.mean())

    @pytest.mark.parametrize("shape", [(3, 5), (5,), ()])
    def test_load_balance_by_sequence(self, shape):
        """Of x (B, L, H) each row; tokens without a batch are one sequence."""
        layer, x = _layer(load_balance="sequence", router="softmax"), _input(*shape)
        _, aux, _ = layer(x)
        sequences = x.view(-1, *x.shape[-2:]) if x.dim() > 1 else x.view(1, 1, H)
        other = _layer(router="softmax")
        expected = [other(sequence)[1]["load_balance_loss"] for sequence in sequences]
        torch.testing.assert_close(aux["load_balance_loss"], torch.stack(expected).mean())
        others = other(x)[1]
        for name in set(others) - {"load_balance_loss"}:
            assert torch.equal(aux[name], others[name]), name

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_limited_groups_and_scaled_weights(self, backend, with_bias, device):
        """Output, choice and gradients are the formula's, on tokens of which the limit changes some one's choice."""
        if backend == "triton":
            pytest.importorskip("triton")
        balancing = BiasBalancing() if with_bias else None
        sizes, groups = ((3, 16), (3, 24), (2, 8)), GroupLimit(4, 2)
        torch.manual_seed(0)
        layer = MoEMLP(
            _config(
                expert_sizes=sizes, num_active_experts=3, groups=groups, weights_scale=2.5, backend=backend,
                balancing=balancing,
            ),
            device=device,
        )  # fmt: skip
        bias = torch.linspace(-0.2, 0.2, 8, device=device) if with_bias else torch.zeros(8, device=device)
        if with_bias:
            layer.expert_bias.copy_(bias)
        x, dout = (torch.randn(2, 11, H, device=device) for _ in range(2))
        x.requires_grad_()
        out, _, f = layer(x)
        grads = torch.autograd.grad((out * dout).sum(), (x, layer.router.weight))

        scores = torch.sigmoid(x @ layer.router.weight.t())
        rows, counts, same = [], [0] * 8, 0
        for token, own in zip(x.view(-1, H), scores.view(-1, 8), strict=True):
            wanted = (own + bias).tolist()
            best = sorted(range(4), key=lambda g: -(wanted[2 * g] + wanted[2 * g + 1]))[:2]
            chosen = sorted((e for g in best for e in (2 * g, 2 * g + 1)), key=lambda e: -wanted[e])[:3]
            same += set(chosen) == set(sorted(range(8), key=lambda e: -wanted[e])[:3])
            total, row = sum(own[e] for e in chosen), torch.zeros(H, device=device)
            for e in chosen:
                counts[e] += 1
                columns = layer.layout.columns(e)
                h = torch.relu(token @ layer.w1[:, columns]).square() @ layer.w2[columns]
                row = row + 2.5 * own[e] / total * h
            rows.append(row)
        assert same < 22
        expected = torch.stack(rows).view(x.shape)
        torch.testing.assert_close(f, torch.tensor(counts, device=device) / 66)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        of_formula = torch.autograd.grad((expected * dout).sum(), (x, layer.router.weight))
        for grad, truth in zip(grads, of_formula, strict=True):
            torch.testing.assert_close(grad, truth, rtol=1e-3, atol=1e-3)

    def test_null_experts_are_counted_in_f(self):
        layer = _layer(num_active_experts=1)
        with torch.no_grad():
            layer.router.weight.zero_()[5] = 1
        out, _, f = layer(torch.ones(4, H))
        assert f.tolist() == [0, 0, 0, 0, 0, 1]
        assert not out.any()

    def test_without_aux_losses(self):
        x = _input(7)
        out, aux, f = _layer()(x)
        bare_out, bare_aux, bare_f = _layer(aux_losses=False)(x)
        assert torch.equal(out, bare_out)
        assert torch.equal(f, bare_f)
        assert tuple(bare_aux) == tuple(aux)
        assert not any(value.item() for value in bare_aux.values())

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(3, H + 1), rf"x: expected shape \(\.\.\., {H}\), got \(3, {H + 1}\)"),
            (torch.zeros(()), r"x: expected shape .* got \(\)"),
            ([0.0] * H, r"x: expected shape .* got \[0\.0"),
            (torch.zeros(3, H, dtype=torch.int64), r"x: expected torch\.float32 on cpu .* got torch\.int64"),
            (torch.zeros(3, H, dtype=torch.bfloat16), r"x: expected torch\.float32 on cpu .* got torch\.bfloat16"),
            (torch.zeros(3, H, device="meta"), r"x: expected torch\.float32 on cpu .* on meta"),
        ],
    )
    def test_wrong_x(self, x, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            _layer()(x)

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize("autocasts", [False, True])
    @pytest.mark.parametrize("name", ["w1", "w2", "w3"])
    def test_a_weight_taken_away(self, name, autocasts, backend):
        if backend == "triton":
            pytest.importorskip("triton")
        layer = _layer(activation="swiglu", backend=backend)
        setattr(layer, name, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts), pytest.raises(ValueError, match=f"^{name}: "):
            layer(_input(3))


class TestBackward:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("router", ROUTERS)
    def test_each_loss_reaches_the_router_alone(self, router, name):
        layer = _layer(router=router)
        layer(_input(7))[1][name].backward()
        assert layer.router.weight.grad is not None
        assert layer.router.weight.grad.any()
        assert layer.w1.grad is None
        assert layer.w2.grad is None

    def test_statistics_and_f_have_no_gradient(self):
        _, aux, f = _layer()(_input(7).requires_grad_())
        assert not any(value.requires_grad for value in (*(aux[name] for name in STATISTICS), f))

    @pytest.mark.parametrize("no_gradient", [torch.no_grad, torch.inference_mode])
    def test_nothing_has_a_gradient_without_grad_mode(self, no_gradient):
        layer = _layer()
        with no_gradient():
            out, aux, f = layer(_input(7))
        assert not any(value.requires_grad for value in (out, *aux.values(), f))
        out, aux, _ = layer(_input(7))
        (out.sum() + sum(aux.values())).backward()

    @pytest.mark.parametrize("num_tokens", [0, 1, 9])
    @pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
    def test_every_parameter_gets_a_gradient(self, activation, num_tokens):
        layer, x = _layer(activation=activation), _input(num_tokens).requires_grad_()
        out, aux, f = layer(x)
        (out.square().sum() + sum(aux[name] for name in LOSSES)).backward()
        for name, tensor in (*layer.named_parameters(), ("x", x)):
            assert tensor.grad is not None, name
            assert tensor.grad.isfinite().all(), name
        for e, fraction in enumerate(f.tolist()):
            if fraction == 0:
                assert not layer.w1.grad[:, layer.layout.columns(e)].any()  # type: ignore[index]

    def test_no_tokens_give_zeros(self):
        layer = _layer()
        out, aux, f = layer(_input(2, 0))
        assert out.shape == (2, 0, H)
        assert not any(value.item() for value in aux.values())
        assert not f.any()
        torch.stack([aux[name] for name in LOSSES]).sum().backward()
        assert not layer.router.weight.grad.any()  # type: ignore[union-attr]

    @pytest.mark.parametrize("activation", ["gelu", "swiglu"])
    def test_gradients_are_those_of_the_formula(self, activation):
        layer = _layer(dtype=torch.float64, activation=activation, expert_sizes=[(2, 3), (1, 5), (1, 0)])
        x = _input(3, dtype=torch.float64).requires_grad_()
        names, parameters = zip(*layer.named_parameters(), strict=True)

        def run(x, *values):
            out, aux, _ = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
            return out, *(aux[name] for name in LOSSES)

        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


class TestAutocast:
    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_output_and_gradients_have_the_dtypes_that_linear_gives(self, dtype, x_dtype):
        layer, linear = _layer(activation="swiglu"), torch.nn.Linear(H, H, bias=False)
        x = _input(7).to(x_dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            out, aux, f = layer(x)
            assert out.dtype == linear(x).dtype == dtype
        assert f.dtype == x_dtype
        assert {value.dtype for value in aux.values()} == {torch.float32}
        (out.float().sum() + sum(aux[name] for name in LOSSES)).backward()
        assert x.grad is not None
        assert x.grad.dtype == x_dtype
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}  # type: ignore[union-attr]

    def test_is_the_layer_in_that_dtype(self):
        layer, x = _layer(activation="swiglu"), _input(7)
        with torch.autocast("cpu", torch.bfloat16):
            out, aux, f = layer(x)
        expected, expected_aux, expected_f = copy.deepcopy(layer).bfloat16()(x.bfloat16())
        assert torch.equal(out, expected)
        assert all(torch.equal(aux[name], expected_aux[name]) for name in aux)
        torch.testing.assert_close(f, expected_f.float(), rtol=1e-2, atol=0)

    def test_float64_is_not_cast(self):
        layer, x = _layer(dtype=torch.float64), _input(7, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x)[0].dtype == torch.float64
            with pytest.raises(ValueError, match=r"^x: expected torch\.float32 on cpu as the weights"):
                _layer()(x)
