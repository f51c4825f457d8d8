"""triton-moe sample: what a model writes with its keys and values kept is what it would write without."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from triton_moe.cli import app
from triton_moe.train.config import TrainConfig
from triton_moe.train.data import Corpus
from triton_moe.train.gpt import GPT
from triton_moe.train.report import printable
from triton_moe.train.trainer import Trainer

SMALL = TrainConfig(
    expert_sizes=((1, 24), (2, 8), (1, 0)), hidden_size=16, num_layers=2, num_heads=2, context=16, batch_size=4, steps=6
)
CPU = torch.device("cpu")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} bottles, and one fewer is {n - 1}.\n" for n in range(100, 0, -1)))
    return Corpus.load(path)


def trained_a_little() -> GPT:
    """Weights at random, those too that a new model has at zero."""
    torch.manual_seed(0)
    model = GPT(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return model


@pytest.mark.parametrize("parts", [[16], [1] * 16, [7, 1, 1, 4, 3]], ids=str)
def test_a_cache_changes_no_logits(parts: list[int]) -> None:
    """Read at once, byte by byte, or in pieces: the same up to the order of sums, and the same next bytes."""
    model, text = trained_a_little(), torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(text).logits
        cache = model.new_cache()
        logits = torch.cat([model(part, cache).logits for part in text.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert [past.length for past in cache] == [16] * SMALL.num_layers
    with pytest.raises(ValueError, match="tokens: expected at most 16 a sequence, got 17"):
        model(text[:, :1], cache)


def test_generate_is_what_no_cache_would_write() -> None:
    """The likeliest bytes; past the context from its later half on."""
    model, text = trained_a_little(), list(b"the quick")
    seen = 0  # first byte that is looked back on
    with torch.no_grad():
        for _ in range(40):
            if len(text) - seen > SMALL.context:
                seen = len(text) - SMALL.context // 2
            text.append(int(model(torch.tensor([text[seen:]])).logits[0, -1].argmax()))
    assert model.generate(b"the quick", 40, temperature=0) == bytes(text)
    assert model.generate(b"x" * 30 + b"the quick", 3, temperature=0).startswith(b"x" * 30 + b"the quick")


def test_temperature_and_top_k() -> None:
    model = trained_a_little()
    greedy = model.generate(b"the ", 12, temperature=0)
    assert model.generate(b"the ", 12, top_k=1) == greedy
    assert model.generate(b"the ", 12, temperature=1e-4) == greedy
    assert model.generate(b"the ", 12, temperature=5.0) != greedy
    with torch.no_grad():
        likeliest = set(model(torch.tensor([list(b"the ")])).logits[0, -1].topk(3).indices.tolist())
    drawn = {model.generate(b"the ", 1, temperature=5.0, seed=seed, top_k=3)[-1] for seed in range(30)}
    assert drawn == likeliest
    for changes, message in (
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k: expected 1 to 256, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(b"a", 1, **changes)  # type: ignore[arg-type]


def sample(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sample", *arguments], env={"COLUMNS": "400", "TERM": "dumb"})
    return result.exit_code, result.output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_writes_on(precision: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(dataclasses.replace(SMALL, precision=precision), corpus, CPU)
    for _ in range(6):
        trainer.step()
    path = trainer.checkpoint().save(tmp_path / "runs" / "one")
    options = ("--prompt", "the quick", "--tokens", "40", "--device", "cpu")
    code, output = sample(str(path.parent), *options)
    assert code == 0, output
    assert output.startswith("the quick")
    assert re.search(r"\n40 bytes in [\d.]+ s, [\d,]+ a second\n$", output)
    if precision == "fp32":
        assert output.startswith(printable(trainer.model.generate(b"the quick", 40)))
    monkeypatch.chdir(tmp_path)
    for again in ((str(path), *options), options):  # the file itself; the newest run
        assert sample(*again)[1].rpartition("\n40 bytes")[0] == output.rpartition("\n40 bytes")[0]
    other = sample(str(path), *options, "--seed", "1", "--temperature", "2", "--top-k", "200")[1]
    assert other.rpartition("\n40 bytes")[0] != output.rpartition("\n40 bytes")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "checkpoint: expected a checkpoint at nowhere/checkpoint.safetensors, got none"),
        ([], "checkpoint: expected a run under runs/"),
        (["text.txt"], "checkpoint: expected a checkpoint at text.txt, got a file that is none"),
        (["run", "--prompt", ""], "prompt: expected at least one byte, got none"),
        (["run", "--temperature", "-1"], "temperature: expected 0 or more, got -1.0"),
        (["run", "--top-k", "999"], "top_k: expected 1 to 256, got 999"),
        (["run", "--device", "tpu"], "device: expected one of cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    arguments: list[str], message: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(SMALL, corpus, CPU).checkpoint().save(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    code, output = sample(*arguments)
    assert code == 2
    assert message in output
