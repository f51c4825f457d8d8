"""The training recipe of examples/: its text, model, optimizers, runs that are taken up again, and its experiments."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpe import Tokens, train_tokenizer
from gpt import GPT, GPTConfig, active_parameters, flops_per_token, rotate
from optimizers import Muon, optimizers
from padded_experts import PaddedExperts, PaddedMoEMLP
from safetensors.torch import load_file
from settings import Config
from tiny_gpt import CPU, OF_DYNAMO, TEXT, TINY, tiny_tokens
from torch import Tensor, nn
from train_gpt import CHECKPOINT, PLOT, RESULT, Report, Training, learning_rate, main, tokens_per_second
from utilization import mfu, peak_flops, plot_usage

from triton_moe import BiasBalancing, ExpertLayout, MoEConfig, MoEMLP
from triton_moe.experts import DenseMLP, Experts
from triton_moe.testing import assert_within_budget

EXPERIMENTS = sorted((Path(__file__).parent.parent / "examples" / "experiments").glob("*.json"))


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return tiny_tokens()


def options(config: Config) -> list[str]:
    """Of the command line, where they are not the defaults."""
    changed = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
    changed["expert_sizes"] = "+".join(f"{count}x{width}" for count, width in config.expert_sizes)
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in changed.items() if value is not None]
    return [word for pair in given for word in pair] + ["--device", "cpu", "--data", str(TEXT)]


class TestTokens:
    def test_are_the_text(self, tokens: Tokens) -> None:
        whole = torch.cat([tokens.train, tokens.held_out]).tolist()
        assert tokens.tokenizer.decode(whole) == TEXT.read_text()
        assert tokens.held_out_bytes == len(TEXT.read_bytes()) // 20
        assert 0 <= min(whole) <= max(whole) < TINY.vocabulary

    def test_a_pass_has_every_sequence_once_and_the_next_in_another_order(self, tokens: Tokens) -> None:
        numbered = dataclasses.replace(tokens, train=torch.arange(1000))
        count = numbered.sequences_per_pass(16)
        passes = [numbered.batch(first, count, 16, seed=0) for first in (0, count)]
        assert passes[0].shape == (61, 17)
        for sequences in passes:
            assert torch.equal(sequences, sequences[:, :1] + torch.arange(17))
            starts = sequences[:, 0].sort().values
            assert torch.equal(starts.diff(), torch.full((60,), 16))
        assert not torch.equal(*passes)

    def test_numbers_alone_decide_a_batch(self, tokens: Tokens) -> None:
        count = tokens.sequences_per_pass(16)
        across = tokens.batch(count - 2, 5, 16, seed=1)
        parts = (tokens.batch(count - 2, 3, 16, seed=1), tokens.batch(count + 1, 2, 16, seed=1))
        assert torch.equal(across, torch.cat(parts))
        assert not torch.equal(across, tokens.batch(count - 2, 5, 16, seed=2))

    def test_errors(self, tokens: Tokens) -> None:
        with pytest.raises(ValueError, match=r"^vocabulary: expected at least the 256 bytes, got 255"):
            train_tokenizer("text", 255)
        with pytest.raises(ValueError, match=r"^vocabulary: expected at most 257 on this text, got 300"):
            train_tokenizer("aa", 300)
        with pytest.raises(ValueError, match=r"^vocabulary: expected the tokenizer's 300, got 400"):
            Tokens.load(TEXT, 400, tokens.tokenizer)
        with pytest.raises(ValueError, match=r"^data: expected over 20000 held-out tokens for a context of 10000, got"):
            tokens.check_context(10_000)


def sum_of(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def gpt_config(**changes: Any) -> GPTConfig:
    return dataclasses.replace(TINY, **changes).gpt


class TestGPT:
    def test_rotary_products_depend_on_distances_alone(self) -> None:
        torch.manual_seed(0)
        model = GPT(gpt_config())
        q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 16, 8)
        products = rotate(q, model.cos, model.sin) @ rotate(k, model.cos, model.sin).mT
        torch.testing.assert_close(products[..., 1:, 1:], products[..., :-1, :-1])
        assert (products[..., 0, :].diff().abs() > 1e-3).all()

    def test_no_token_sees_a_later_one(self) -> None:
        torch.manual_seed(0)
        model = GPT(gpt_config())
        for block in model.blocks:
            nn.init.normal_(block.get_submodule("attention.out").weight)  # type: ignore[arg-type]

        def stream(sequence: Tensor) -> Tensor:
            x = model.embedding(sequence)
            for block in model.blocks:
                x, _ = block(x, model.cos, model.sin)
            return x

        first = torch.randint(300, (2, 16))
        second = torch.cat([first[:, :10], (first[:, 10:] + 1) % 300], dim=1)
        changed = (stream(first) - stream(second)).abs().amax(dim=(0, 2))
        assert changed[:10].max() < 1e-5  # other rows beside theirs in a product may round theirs otherwise
        assert changed[10:].min() > 1e-2

    def test_every_other_block_is_dense_and_of_the_same_flops(self) -> None:
        model = GPT(gpt_config(num_layers=4, moe_every=2, expert_sizes=((4, 8),)))
        kinds = [type(block.mlp) for block in model.blocks]
        assert kinds == [DenseMLP, MoEMLP, DenseMLP, MoEMLP]
        assert model.get_parameter("blocks.0.mlp.w1").shape == (16, 2 * 8)
        out = model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))
        assert out.usage.shape == (2, 4)

    @pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
    def test_active_parameters_are_the_weights_a_token_meets(self, activation: str) -> None:
        config = gpt_config(expert_sizes=((4, 8),), activation=activation, num_layers=3, moe_every=3)
        model = GPT(config)
        of_experts = [p for m in model.modules() if isinstance(m, Experts) for p in m.parameters(recurse=False)]
        gains = [p for p in model.parameters() if p.dim() == 1]
        unused = sum_of(of_experts) // 2 + sum_of(gains) + model.embedding.weight.numel()
        assert active_parameters(config) == sum_of(model.parameters()) - unused
        assert flops_per_token(config) == 6 * active_parameters(config) + 12 * 3 * (16 / 2) * 16

    def test_active_parameters_as_experts_were_used(self) -> None:
        config = gpt_config()
        even, widest = torch.full((2, 4), 0.25), torch.tensor([[0.5, 0.5, 0, 0]] * 2)
        assert active_parameters(config) == active_parameters(config, even)
        more = 2 * 2 * 16 * 2 * (16 - (16 + 16 + 5 + 0) / 4)
        assert active_parameters(config, widest) - active_parameters(config, even) == more


class TestPaddedExperts:
    @pytest.mark.parametrize("activation", ["relu_squared", "swiglu"])
    def test_is_the_layer(self, activation: str) -> None:
        torch.manual_seed(0)
        config = MoEConfig([(2, 16), (1, 5), (1, 0)], 2, 16, activation=activation, balancing=BiasBalancing())
        plain, padded = MoEMLP(config), PaddedMoEMLP(config)
        truth = MoEMLP(config, dtype=torch.float64)
        truth.load_state_dict(plain.state_dict())
        padded.load_packed(plain)
        padded.router.load_state_dict(plain.router.state_dict())
        x, dout = torch.randn(2, 3, 7, 16)
        found = {}
        for name, layer in {"truth": truth, "plain": plain, "padded": padded}.items():
            own = x.to(layer.w1.dtype, copy=True).requires_grad_()
            out, aux, f = layer(own)
            loss = aux["load_balance_loss"] + aux["router_z_loss"]
            (out * dout.to(out.dtype)).sum().add(loss).backward()
            assert own.grad is not None
            found[name] = {"out": out, "f": f, "dx": own.grad, "drouter": layer.router.weight.grad, "loss": loss}
        width = config.layout.max_width
        for e in range(4):
            own = config.layout.columns(e)
            for name, layer in {"truth": truth, "plain": plain}.items():
                ups = [w.grad[:, own] for w in (layer.w1, layer.w3) if w is not None and w.grad is not None]
                found[name] |= {f"dup of {e}": torch.cat(ups, dim=1), f"dw2 of {e}": layer.w2.grad[own]}  # type: ignore[index]
            assert padded.w1.grad is not None
            assert padded.w2.grad is not None
            kept = config.layout.widths[e]
            ups = [part[:, :kept] for part in padded.w1.grad[e].split(width, dim=1)]
            found["padded"] |= {f"dup of {e}": torch.cat(ups, dim=1), f"dw2 of {e}": padded.w2.grad[e, :kept]}
        for name, value in found["padded"].items():
            assert_within_budget(
                value.detach(), found["truth"][name].detach().double(), found["plain"][name].detach(),
                eps_dtype=torch.float32, name=name,
            )  # fmt: skip

    @pytest.mark.parametrize("optimizer", ["adamw", "muon"])
    def test_padding_stays_zero(self, tokens: Tokens, optimizer: str) -> None:
        training = Training(dataclasses.replace(TINY, experts="grouped_mm", optimizer=optimizer), tokens, CPU)
        for _ in range(3):
            training.step()
        padded = [module for module in training.model.modules() if isinstance(module, PaddedExperts)]
        assert len(padded) == 2
        for experts in padded:
            for e, width in enumerate(experts.layout.widths):
                assert (experts.w1[e, :, width:] == 0).all()
                assert (experts.w2[e, width:] == 0).all()
                assert (experts.w2[e, :width] != 0).all()

    def test_takes_no_options_of_our_experts(self) -> None:
        with pytest.raises(ValueError, match=r"^config: expected no recompute"):
            PaddedMoEMLP(MoEConfig([(4, 8)], 2, 16, recompute=True))


class TestOptimizers:
    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    @pytest.mark.parametrize("experts", ["triton", "grouped_mm"])
    def test_every_parameter_has_one(self, kind: str, experts: str, tokens: Tokens) -> None:
        config = dataclasses.replace(TINY, optimizer=kind, experts=experts, activation="swiglu", moe_every=2)
        model = Training(config, tokens, CPU).model
        adamw, *muon = optimizers(model, config)
        groups = [group for optimizer in (adamw, *muon) for group in optimizer.param_groups]
        assert sum(sum_of(group["params"]) for group in groups) == sum_of(model.parameters())
        names = {p: name for name, p in model.named_parameters()}
        of_adamw = {names[p] for group in adamw.param_groups for p in group["params"]}
        matrix = {name for p, name in names.items() if name.endswith((".w1", ".w2", ".w3", "qkv.weight", "out.weight"))}
        assert of_adamw == set(names.values()) - (matrix if kind == "muon" else set())
        undecayed = {names[p] for p in adamw.param_groups[1]["params"]}
        assert undecayed == {name for name in of_adamw if "norm" in name or name == "embedding.weight"}

    def test_muon_is_each_experts_own(self) -> None:
        torch.manual_seed(0)
        layout = ExpertLayout.from_widths([8, 3, 0, 8])
        packed = nn.Parameter(torch.randn(6, 19))
        packed.grad = torch.randn(6, 19)
        mixed = nn.Parameter(packed.detach().clone())
        mixed.grad = packed.grad.clone()
        alone = [nn.Parameter(part.clone()) for part in layout.split(packed.detach(), 1) if part.numel()]
        for whole, part in zip(alone, (g for g in layout.split(packed.grad, 1) if g.numel()), strict=True):
            whole.grad = part.clone()
        Muon({packed: lambda w: layout.split(w, dim=1)}, lr=0.1, weight_decay=0.1).step()
        torch.optim.Muon(alone, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
        assert torch.equal(packed.detach(), torch.cat([whole.detach() for whole in alone], dim=1))
        torch.optim.Muon([mixed], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
        assert not torch.allclose(mixed, packed, atol=0.01)

    def test_learning_rate(self) -> None:
        config = dataclasses.replace(TINY, warm_up=4, steps=15, learning_rate=1.0)
        rates = [learning_rate(step, config) for step in range(16)]
        assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert rates[9] == pytest.approx(0.1 + 0.9 * 0.5)
        assert rates[14] == pytest.approx(0.1)
        assert rates[15] == pytest.approx(0.1)


class TestTraining:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"optimizer": "muon", "learning_rate": 0.02},
            {"experts": "grouped_mm"},
            {"balancing": "sign", "moe_every": 2, "activation": "swiglu"},
            {"precision": "bf16"},
        ],
        ids=lambda changes: "-".join(map(str, changes.values())) or "default",
    )
    def test_loss_falls(self, tokens: Tokens, changes: dict[str, Any]) -> None:
        config = dataclasses.replace(TINY, **{"steps": 25, **changes})
        training = Training(config, tokens, CPU)
        before = training.held_out_loss(16)
        for _ in range(config.steps):
            training.step()
        assert before == pytest.approx(math.log(300), abs=0.1)
        assert training.held_out_loss(16) < before - 0.3
        assert training.model.training

    def test_micro_steps_add_up(self, tokens: Tokens) -> None:
        """But for the load-balance loss, a product of two means."""
        changes: dict[str, Any] = {"load_balance_weight": 0.0, "balancing": "smebu"}
        whole, parts = (
            Training(dataclasses.replace(TINY, batch_size=size, accumulation=count, **changes), tokens, CPU)
            for size, count in ((4, 1), (2, 2))
        )
        for _ in range(2):
            torch.testing.assert_close(whole.step(), parts.step())
        for name, value in parts.model.state_dict().items():
            torch.testing.assert_close(value, whole.model.state_dict()[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts.usage, whole.usage)

    def test_biases_move_and_losses_are_wired(self, tokens: Tokens) -> None:
        training = Training(dataclasses.replace(TINY, balancing="sign", balancing_speed=0.125), tokens, CPU)
        training.step()
        biases = [value for name, value in training.model.state_dict().items() if name.endswith("expert_bias")]
        assert len(biases) == 2
        assert all(set(bias.abs().tolist()) <= {0.0, 0.125} and bias.any() for bias in biases)
        weights = {}
        for name in ("load_balance_weight", "router_z_weight", "compute_weight"):
            off = {"load_balance_weight": 0.0, "router_z_weight": 0.0, "compute_weight": 0.0}
            training = Training(dataclasses.replace(TINY, **{**off, name: 1.0}), tokens, CPU)
            training.update = lambda: None  # type: ignore[method-assign]
            training.step()
            weights[name] = training.model.get_parameter("blocks.0.mlp.router.weight").grad
        pairs = [(a, b) for a in weights for b in weights if a < b]
        assert all(not torch.allclose(weights[a], weights[b]) for a, b in pairs)

    @pytest.mark.parametrize(
        "changes", [{}, {"optimizer": "muon", "experts": "grouped_mm"}, {"optimizer": "muon"}], ids=str
    )
    def test_resumed_run_is_the_same_run(
        self, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = dataclasses.replace(TINY, balancing="smebu", accumulation=2, batch_size=2, steps=4, **changes)
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert main([*options(config), "--out", str(whole)]) == 0
        assert main([*options(config), "--out", str(parts), "--stop-at", "2"]) == 0
        assert f"stopped: --resume {parts} goes on" in capsys.readouterr().out
        assert not (parts / RESULT).exists()
        assert main(["--resume", str(parts), "--data", str(TEXT), "--device", "cpu"]) == 0
        one, other = (load_file(folder / CHECKPOINT) for folder in (whole, parts))
        assert one.keys() == other.keys()
        assert any(name.startswith("optimizer.") for name in one)
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        results = [json.loads((folder / RESULT).read_text()) for folder in (whole, parts)]
        assert results[0]["held_out_loss"] == results[1]["held_out_loss"]
        assert results[0]["steps"] == 4
        assert (whole / PLOT).read_bytes().startswith(b"\x89PNG")
        assert one["usage"].shape == (4, 2, 4)
        torch.testing.assert_close(one["usage"].sum(-1), torch.ones(4, 2))

    @OF_DYNAMO
    @pytest.mark.parametrize(
        ("compile", "changes"),
        [
            ("blocks", {"backend": "triton"}),
            ("blocks", {"experts": "grouped_mm", "precision": "bf16"}),
            ("model", {"backend": "triton", "balancing": "smebu"}),
        ],
        ids=["blocks", "blocks-grouped_mm", "model"],
    )
    def test_a_compiled_step_is_the_eager_one(
        self, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, compile: str, changes: dict[str, Any], device: str
    ) -> None:
        """Blocks share one graph, the head has its own; the model is one. Without code generation, which takes a GPU's
        run its time."""
        torch.compiler.reset()
        real: Callable[..., Any] = torch.compile
        graphs: list[object] = []

        def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
            graphs.append(graph)
            return graph.forward

        monkeypatch.setattr(torch, "compile", lambda f, **kwargs: real(f, backend=backend, **kwargs))
        config = dataclasses.replace(TINY, batch_size=2, **changes)
        eager, compiled = (
            Training(dataclasses.replace(config, compile=how), tokens, torch.device(device)) for how in ("off", compile)
        )
        for _ in range(2):
            torch.testing.assert_close(compiled.step(), eager.step())
        assert compiled.held_out_loss(4) == pytest.approx(eager.held_out_loss(4), rel=1e-4)
        assert len(graphs) == {"blocks": 2, "model": 1}[compile]


class TestMeasure:
    def test_tokens_per_second_and_mfu(self) -> None:
        reports = [Report(100.0, 10, 5.0), Report(101.0, 20, 4.0), Report(104.0, 50, 3.0)]
        config = dataclasses.replace(TINY, accumulation=3)
        assert tokens_per_second(reports, config) == 40 * 3 * 4 * 16 / 4
        assert tokens_per_second(reports[:1], config) is None
        assert mfu(1000.0, 3e9, 12e12) == 0.25
        assert mfu(1000.0, 3e9, None) is mfu(None, 3e9, 12e12) is None

    def test_a_run_too_short_for_a_speed_has_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Nor has one that is taken up at its end a loss of training; what is unknown is null in strict JSON."""

        def outcome(*arguments: str) -> dict[str, Any]:
            assert main([*arguments, "--peak-tflops", "1"]) == 0
            shown = capsys.readouterr().out
            assert "NaN" not in shown
            assert "null" not in shown
            assert "tokens_per_second" not in shown
            result = json.loads((tmp_path / RESULT).read_text(), parse_constant=pytest.fail)
            assert result["tokens_per_second"] is result["mfu"] is None
            return result

        assert outcome(*options(TINY), "--out", str(tmp_path))["train_loss"] > 0
        assert outcome("--resume", str(tmp_path), "--data", str(TEXT), "--device", "cpu")["train_loss"] is None

    def test_peak(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert peak_flops(CPU) is None
        assert peak_flops(CPU, 2.5) == 2.5e12
        names = {"NVIDIA H200": 989e12, "NVIDIA GeForce RTX 3090": 71e12, "NVIDIA H100 PCIe": None, "another": None}
        for name, peak in names.items():
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
            assert peak_flops(torch.device("cuda")) == peak

    def test_usage_plot_shows_every_block(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.axes import Axes

        shown: list[np.ndarray] = []
        draw = Axes.imshow
        monkeypatch.setattr(Axes, "imshow", lambda ax, image, **kw: (shown.append(image), draw(ax, image, **kw))[1])
        usage = torch.rand(450, 5, 3)
        plot_usage(usage, ExpertLayout.from_widths([4, 4, 2]), tmp_path / "usage.png")
        assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")
        assert len(shown) == 5
        assert shown[0].shape == (3, 200)
        np.testing.assert_allclose(shown[4][:, 0], 3 * usage[:3, 4].mean(0), rtol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"experts": "scatter"}, "experts: expected one of triton, grouped_mm, got 'scatter'"),
            ({"optimizer": "sgd"}, "optimizer: expected one of adamw, muon, got 'sgd'"),
            ({"balancing": None}, "balancing: expected one of none, smebu, sign, got None"),
            ({"compile": True}, "compile: expected one of off, blocks, model, graph, got True"),
            ({"steps": 0}, "steps: expected an integer of 1 or more, got 0"),
            ({"steps": None, "passes": 0}, "passes: expected an integer of 1 or more, got 0"),
            ({"passes": 2}, "passes: expected None beside steps = 6, got 2"),
            ({"accumulation": 1.5}, "accumulation: expected an integer of 1 or more, got 1.5"),
            ({"seed": -1}, "seed: expected an integer of 0 or more, got -1"),
            ({"learning_rate": -1.0}, r"learning_rate: expected 0 or more, got -1\.0"),
            ({"compute_weight": math.nan}, "compute_weight: expected 0 or more, got nan"),
            ({"num_heads": 16}, "num_heads: expected heads of an even size, got 16 / 16"),
            ({"moe_every": 3}, "moe_every: expected at most num_layers = 2, got 3"),
            ({"expert_sizes": "4x8"}, r"expert_sizes\[0\]: expected a \(count, width\) pair, got '4'"),
            ({"num_active_experts": 5}, "num_active_experts: expected at most E = 4, got 5"),
            ({"activation": "swish"}, "activation: expected one of"),
            ({"backend": "cuda"}, "backend: expected one of"),
            ({"width": 1}, "config: expected fields of Config, got width"),
        ],
    )
    def test_config(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            Config.from_dict({**dataclasses.asdict(TINY), **changes})

    def test_a_graph_needs_cuda(self, tokens: Tokens) -> None:
        with pytest.raises(ValueError, match=r"^compile: expected off, blocks or model on cpu, got 'graph'"):
            Training(dataclasses.replace(TINY, compile="graph"), tokens, CPU)

    def test_command_line(self, tmp_path: Path, tokens: Tokens, capsys: pytest.CaptureFixture[str]) -> None:
        def error_of(*arguments: str) -> str:
            assert main(arguments) == 1
            return capsys.readouterr().err

        assert error_of("--resume", str(tmp_path)).startswith("error: resume: expected a run with")
        assert error_of("--resume", str(tmp_path), "--steps", "3").startswith("error: resume: expected --data")
        Training(TINY, tokens, CPU).save(tmp_path)
        assert "expected a folder without a run" in error_of(*options(TINY), "--out", str(tmp_path))
        tokens.tokenizer.save(str(tmp_path / "tokenizer.json"))
        other = Path(dataclasses.__file__)
        assert "error: data: expected the run's text" in error_of("--resume", str(tmp_path), "--data", str(other))
        wild = dataclasses.replace(TINY, learning_rate=1e30, warm_up=0)
        assert "error: the loss is nan after 6 steps" in error_of(*options(wild), "--out", str(tmp_path / "wild"))
        with pytest.raises(SystemExit):
            main(["--experts", "scatter"])
        assert "--experts: invalid choice: 'scatter'" in capsys.readouterr().err


class TestExperiments:
    def test_are_those_of_the_issue(self) -> None:
        ratios = {}
        for path in EXPERIMENTS:
            widths = [width for _, width in Config.read(path).expert_sizes if width]
            ratios[path.stem] = max(widths) / min(widths)
        expected = {"uniform": 1, "two_widths": 5, "five_to_one": 5, "twenty_three_to_one": 23, "null_experts": 1}
        assert ratios == expected

    @pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
    def test_builds_and_costs_what_the_uniform_one_does(self, path: Path) -> None:
        config, uniform = Config.read(path), Config.read(path.with_stem("uniform"))
        with torch.device("meta"):
            model = GPT(config.gpt)
        assert len(model.blocks) == config.num_layers
        assert active_parameters(config.gpt) == pytest.approx(active_parameters(uniform.gpt), rel=0.01)
        assert dataclasses.replace(config, expert_sizes=uniform.expert_sizes, num_active_experts=4) == uniform

    def test_changes_win_over_the_file(self) -> None:
        assert Config.read(EXPERIMENTS[0], seed=3).seed == 3

    @pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
    def test_makes_two_passes_whatever_the_text(self, path: Path, tokens: Tokens) -> None:
        """Complete ones, but for a step; no more, for steps beside the file either way."""
        config = Config.read(path)
        for size in (200_000, 200_000 + 512 * 16, 2_000_000):
            text = dataclasses.replace(tokens, train=torch.empty(size, dtype=torch.int32))
            sequences, found = text.sequences_per_pass(512), config.on(text)
            assert 2 * sequences - 32 < found.steps * 32 <= 2 * sequences
            assert dataclasses.replace(config, passes=None, steps=found.steps) == found == found.on(text)
        assert Config.read(path, steps=7) == dataclasses.replace(config, passes=None, steps=7)

    def test_passes_are_steps_of_the_text(self, tmp_path: Path, tokens: Tokens) -> None:
        """On the command line they win over a file's steps; the run's config has the steps, to go on with."""
        path = tmp_path / "config.json"
        config = dataclasses.replace(TINY, batch_size=1024, num_layers=1, num_heads=1)
        path.write_text(json.dumps(dataclasses.asdict(config)))
        arguments = ["--config", str(path), "--passes", "3", "--data", str(TEXT), "--device", "cpu"]
        out, steps = tmp_path / "out", 3 * tokens.sequences_per_pass(16) // 1024
        assert main([*arguments, "--out", str(out)]) == 0
        result = json.loads((out / RESULT).read_text())
        assert (result["steps"], result["config"]["steps"], result["config"]["passes"]) == (steps, steps, None)
        assert 1 < result["passes"] <= 3
        assert Config.from_dict({}).steps == 360
