"""Train a GPT with mixture-of-experts MLPs on text: a recipe to copy from.

    python examples/train_gpt.py
    python examples/train_gpt.py --expert-sizes 32x384+32x128 --optimizer muon --balancing smebu --data ~/text
    python examples/train_gpt.py --config examples/experiments/uniform.json --out runs/uniform
    python examples/train_gpt.py --resume runs/uniform

Without `--data` it reads the sources of the running Python's standard library. The tokenizer is a BPE trained on the
text. A run's folder has `checkpoint.safetensors`, `tokenizer.json`, `result.json` and `usage.png`, which shows how the
experts of each layer were used over time. Ctrl-C saves; `--resume` goes on, to the bit on the same machine.

In bf16 the parameters stay fp32, under autocast: they are the optimizer's master weights, and gradients accumulate in
fp32. The MoE layer casts as `nn.Linear` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bpe import Tokens
from capture import CapturedMicroStep
from gpt import GPT, GPTOutput, MoE, active_parameters, flops_per_token
from optimizers import optimizers
from padded_experts import PaddedMoEMLP
from safetensors import safe_open
from safetensors.torch import save_file
from settings import CHOICES, STEPS, Config
from tokenizers import Tokenizer
from torch import Tensor
from utilization import mfu, peak_flops, plot_usage

from triton_moe import MoEMLP, update_expert_biases
from triton_moe.cli import parse_sizes
from triton_moe.train.data import windows
from triton_moe.train.trainer import stop_on_signal

CHECKPOINT, TOKENIZER, RESULT, PLOT = "checkpoint.safetensors", "tokenizer.json", "result.json", "usage.png"
EXPERTS: dict[str, MoE] = {"triton": MoEMLP, "grouped_mm": PaddedMoEMLP}
FINAL_SHARE = 0.1
"""Of the peak learning rate, at the last step."""
STEPS_BEFORE_CAPTURE = 2
REPORT_EVERY = 10
"""Steps between two looks at the loss, each of which waits for the device."""


def learning_rate(step: int, config: Config) -> float:
    """Linear to the peak in `warm_up` steps, then a cosine to `FINAL_SHARE` of it."""
    if step < config.warm_up:
        return config.learning_rate * (step + 1) / config.warm_up
    progress = (step - config.warm_up) / max(1, config.steps - 1 - config.warm_up)
    return config.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * min(1, progress))) / 2)


def read_checkpoint(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What `Training.save` wrote: about the run, and its tensors. Raises ValueError if there is nothing of the kind."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"resume: expected a run with {path}, got none")
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


class Training:
    """A model, its optimizers, and how far they are. The config, the text and `done` decide the next step's numbers."""

    def __init__(self, config: Config, tokens: Tokens, device: torch.device, moe: MoE | None = None) -> None:
        """`moe` builds the MoE layers in place of what the config says. Passes become the steps that this text has."""
        tokens.check_context(config.context)
        config = config.on(tokens)
        if config.compile == "graph" and device.type != "cuda":
            raise ValueError(f"compile: expected off, blocks or model on {device.type}, got 'graph'")
        self.config, self.tokens, self.device = config, tokens, device
        torch.manual_seed(config.seed)
        self.model = GPT(config.gpt, moe or EXPERTS[config.experts]).to(device)
        if config.compile != "off":
            for part in (self.model,) if config.compile == "model" else (*self.model.blocks, self.model.head):
                part.compile(fullgraph=True, dynamic=False)
        self.optimizers = optimizers(self.model, config)
        self.done = 0
        self.usage: list[Tensor] = []
        """Of each step, (MoE blocks, E) fp32 on the device."""
        self._steps_before_capture = STEPS_BEFORE_CAPTURE
        self._captured: CapturedMicroStep | None = None

    def on_device(self, sequences: Tensor) -> Tensor:
        if self.device.type == "cuda":
            sequences = sequences.pin_memory()  # without it the copy would wait for the steps before
        return sequences.to(self.device, non_blocking=True)

    def forward(self, sequences: Tensor) -> GPTOutput:
        """`sequences (B, L + 1)`"""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model(sequences[:, :-1], sequences[:, 1:])

    def micro_step(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the gradients. -> the loss, nats a token, and how often each block's experts were chosen."""
        config, out = self.config, self.forward(sequences)
        total = out.loss + config.load_balance_weight * out.load_balance_loss
        total = total + config.router_z_weight * out.router_z_loss + config.compute_weight * out.compute_loss
        (total / config.accumulation).backward()
        return out.loss.detach(), out.usage.detach()

    def _run(self, sequences: Tensor) -> tuple[Tensor, ...]:
        """`micro_step`, captured after some steps, at the beginning of one."""
        if self.config.compile == "graph" and self._captured is None and self._steps_before_capture == 0:
            adds_up = self.config.accumulation > 1
            self._captured = CapturedMicroStep(self.micro_step, self.model, sequences, adds_up)
        return (self._captured or self.micro_step)(sequences)

    def step(self) -> Tensor:
        """One step of the optimizer; its loss, nats a token, stays on the device."""
        config, of_micro_steps = self.config, []
        for micro in range(config.accumulation):
            first = (self.done * config.accumulation + micro) * config.batch_size
            batch = self.tokens.batch(first, config.batch_size, config.context, config.seed)
            of_micro_steps.append(self._run(self.on_device(batch)))
        self.update()
        losses, usage = zip(*of_micro_steps, strict=True)
        self.usage.append(torch.stack(usage).mean(0))
        self.done += 1
        self._steps_before_capture -= 1
        return torch.stack(losses).mean()

    def update(self) -> None:
        """Move the weights by their gradients, and the experts' biases by what was chosen."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.done, self.config)
            optimizer.step()
        if self._captured is None or self._captured.adds_up:
            self.model.zero_grad(set_to_none=self._captured is None)
        update_expert_biases(self.model)

    @torch.no_grad()
    def held_out_loss(self, most: int = 256) -> float:
        """Nats a token over at most so many sequences, spread over the text that is held out."""
        self.model.eval()
        batches = windows(self.tokens.held_out, self.config.context, most).split(self.config.batch_size)
        with torch.compiler.set_stance("force_eager"):
            losses = [self.forward(self.on_device(batch)).loss * batch.shape[0] for batch in batches]
        self.model.train()
        return float(torch.stack(losses).sum()) / sum(batch.shape[0] for batch in batches)

    def save(self, folder: Path) -> None:
        """Write the checkpoint; an earlier one stays whole until the new one is complete."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{number}.{name}": tensor for name, tensor in state.items()}
        if self.usage:
            tensors["usage"] = torch.stack(self.usage)
        about = {
            "config": json.dumps(dataclasses.asdict(self.config)),
            "done": str(self.done),
            "sha256": self.tokens.sha256,
        }
        partial = folder / f"{CHECKPOINT}.partial"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, about)
        os.replace(partial, folder / CHECKPOINT)

    def load(self, folder: Path) -> None:
        """Take up where `save` was called. Raises ValueError if that was on another text."""
        about, tensors = read_checkpoint(folder)
        if about["sha256"] != self.tokens.sha256:
            raise ValueError(f"data: expected the run's text, SHA-256 {about['sha256']}, got {self.tokens.sha256}")
        self.done = int(about["done"])
        self.usage = list(tensors.pop("usage", torch.empty(0)).to(self.device))
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, i, number, key = name.split(".")
            states[int(i)].setdefault(int(number), {})[key] = tensors.pop(name)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Result:
    """What came of a run."""

    steps: int
    passes: float
    """Over the training text."""
    train_loss: float | None
    """Nats a token, of the last step; None if a run taken up again had none left."""
    held_out_loss: float
    """Nats a token."""
    held_out_bits_per_byte: float
    parameters: int
    active_parameters: int
    """Of a token, if all experts are chosen equally often."""
    active_parameters_used: int
    """Of a token, as they were chosen in the last tenth of the steps."""
    tokens_per_second: float | None
    """From the first report on, so that nothing is compiled in that time; None if it is the only one."""
    mfu: float | None
    """Share of the device's peak; None if that, or the speed, is not known."""


class Report(NamedTuple):
    """A look at a run."""

    seconds: float
    """On the clock."""
    done: int
    """Steps so far."""
    loss: float


def tokens_per_second(reports: Sequence[Report], config: Config) -> float | None:
    """From the first report to the last; None between fewer than two."""
    if len(reports) < 2:
        return None
    return (reports[-1].done - reports[0].done) * config.tokens_per_step / (reports[-1].seconds - reports[0].seconds)


def run(training: Training, out: Path, stop_at: int | None, peak: float | None) -> list[Report]:
    """Do the steps that are left, up to `stop_at`, and save: at the end, or where a signal stops them.

    Raises FloatingPointError if the loss is no number any more.
    """
    config, reports = training.config, []
    last = config.steps if stop_at is None else min(stop_at, config.steps)
    with stop_on_signal() as stop:
        while training.done < last and not stop.is_set():
            loss = training.step()
            if training.done % REPORT_EVERY and training.done != last:
                continue
            value = float(loss)  # waits for the device, hence before the clock is read
            reports.append(Report(time.perf_counter(), training.done, value))
            print(line(training, reports[-2:], peak), flush=True)
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} after {training.done} steps: try a lower learning rate")
    training.save(out)
    return reports


def line(training: Training, reports: Sequence[Report], peak: float | None) -> str:
    """What the last report says, and how fast it went since the one before."""
    config, rate = training.config, tokens_per_second(reports, training.config)
    share = mfu(rate, flops_per_token(config.gpt, training.usage[-1]), peak)
    speed = "" if rate is None else f", {rate:,.0f} tokens/s" + ("" if share is None else f", {share:.1%} MFU")
    return f"step {training.done} of {config.steps}: loss {reports[-1].loss:.3f}{speed}"


def conclude(training: Training, reports: Sequence[Report], peak: float | None) -> Result:
    """Of a run that is complete."""
    config, tokens = training.config, training.tokens
    used = torch.stack(training.usage[-max(1, training.done // 10) :]).mean(0)
    held_out, rate = training.held_out_loss(), tokens_per_second(reports, config)
    return Result(
        steps=training.done,
        passes=training.done * config.tokens_per_step / tokens.train.numel(),
        train_loss=reports[-1].loss if reports else None,
        held_out_loss=held_out,
        held_out_bits_per_byte=held_out / math.log(2) * tokens.held_out.numel() / tokens.held_out_bytes,
        parameters=sum(p.numel() for p in training.model.parameters()),
        active_parameters=active_parameters(config.gpt),
        active_parameters_used=active_parameters(config.gpt, used),
        tokens_per_second=rate,
        mfu=mfu(rate, flops_per_token(config.gpt, used), peak),
    )


def train(
    training: Training, out: Path, *, stop_at: int | None = None, peak_tflops: float | None = None
) -> Result | None:
    """Run, save, and conclude with `result.json` and `usage.png`; None, and neither, if steps are left."""
    out.mkdir(parents=True, exist_ok=True)
    training.tokens.tokenizer.save(str(out / TOKENIZER))
    peak = peak_flops(training.device, peak_tflops)
    reports = run(training, out, stop_at, peak)
    if training.done < training.config.steps:
        return None
    result = conclude(training, reports, peak)
    about = {"config": dataclasses.asdict(training.config), "source": training.tokens.source}
    (out / RESULT).write_text(json.dumps({**about, **dataclasses.asdict(result)}, indent=1, allow_nan=False))
    plot_usage(torch.stack(training.usage), training.config.gpt.moe.layout, out / PLOT)
    return result


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and those of its options that are fields of `Config`."""
    parser = argparse.ArgumentParser(description="Train a GPT with mixture-of-experts MLPs on text.")
    parser.add_argument("--config", type=Path, help="JSON file of options; those given beside it win")
    parser.add_argument("--data", type=Path, help="file or folder of text (the standard library's sources)")
    parser.add_argument("--out", type=Path, help="the run's folder (runs/gpt-DATE)")
    parser.add_argument("--resume", type=Path, metavar="OUT", help="folder of a run to go on with")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="save and leave after so many steps")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the MFU (known for some)")
    for field in dataclasses.fields(Config):
        kind = {"int": int, "int | None": int, "float": float, "str": str}.get(str(field.type), parse_sizes)
        name, choices = f"--{field.name.replace('_', '-')}", CHOICES.get(field.name)
        about = "such as 32x512+32x128" if kind is parse_sizes else str(field.default)
        about = {"steps": str(STEPS), "passes": "over the text, in place of steps"}.get(field.name, about)
        parser.add_argument(name, type=kind, choices=choices, default=argparse.SUPPRESS, help=f"({about})")
    args = parser.parse_args(argv)
    return args, {field.name: vars(args)[field.name] for field in dataclasses.fields(Config) if field.name in args}


def start(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Training, Path]:
    """A new run, or one taken up again. Raises ValueError on what does not go together."""
    if args.resume is None:
        config = Config.from_dict(options) if args.config is None else Config.read(args.config, **options)
        out = args.out or Path("runs") / f"gpt-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        if (out / CHECKPOINT).exists():
            raise ValueError(f"out: expected a folder without a run, got {out}: add --resume {out}")
        return Training(config, Tokens.load(args.data, config.vocabulary), args.device), out
    if set(options) - {"compile"} or args.config or args.out:
        allowed = "--data, --stop-at, --device, --peak-tflops and --compile"
        raise ValueError(f"resume: expected {allowed} beside it alone, got others")
    config = Config.from_dict({**json.loads(read_checkpoint(args.resume)[0]["config"]), **options})
    tokenizer = Tokenizer.from_file(str(args.resume / TOKENIZER))
    training = Training(config, Tokens.load(args.data, config.vocabulary, tokenizer), args.device)
    training.load(args.resume)
    return training, args.resume


def main(argv: Sequence[str] | None = None) -> int:
    args, options = parse(argv)
    try:
        training, out = start(args, options)
        print(f"{training.tokens.source}, {training.tokens.train.numel():,} tokens to train on")
        result = train(training, out, stop_at=args.stop_at, peak_tflops=args.peak_tflops)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    known = {} if result is None else {k: v for k, v in dataclasses.asdict(result).items() if v is not None}
    print(json.dumps(known, indent=1) if known else f"stopped: --resume {out} goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
