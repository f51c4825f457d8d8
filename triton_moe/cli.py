"""The command `triton-moe`."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from triton_moe.train.checkpoint import FILE_NAME, Checkpoint
from triton_moe.train.config import TrainConfig
from triton_moe.train.data import Corpus, windows
from triton_moe.train.gpt import GPT
from triton_moe.train.report import plot_usage, printable, usage_table
from triton_moe.train.trainer import Trainer, stop_on_signal

RUNS = Path("runs")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
_OTHER_BENCHMARKS = ("accuracy", "cold_start", "gradients", "soak", "stress", "validate_training")
"""What `bench` offers beside bench_*.py. All take `--quick`; a script that does not is a tool, and not offered."""
PROMPT = b"def "
_DEFAULT_DEVICE = "cuda if there is one"
_REPORT_EVERY = 10
"""Steps between two readings of the loss, each of which waits for the device."""
_SHOWN_DIGITS = 12
"""Of a text's hash."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Mixture-of-experts layers of any widths, in Triton."
)


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`"4x256+2x64"` -> `((4, 256), (2, 64))`: count x width. Raises ValueError on anything else."""
    pairs = [re.fullmatch(r"(\d+)x(\d+)", part.strip()) for part in text.split("+")]
    if not all(pairs):
        raise ValueError(f"experts: expected count x width pairs such as 4x256+2x64, got {text!r}")
    return tuple((int(pair[1]), int(pair[2])) for pair in pairs if pair)


def _device(name: str | None) -> torch.device:
    """Raises ValueError on a device that cannot train here."""
    has_cuda = torch.cuda.is_available()
    usable = ("cpu", "cuda") if has_cuda else ("cpu",)
    if name is not None and name.partition(":")[0] not in usable:
        raise ValueError(f"device: expected one of {', '.join(usable)}, got {name!r}")
    return torch.device(name or usable[-1])


def _newest_run(argument: str) -> Path:
    checkpoints = list(RUNS.glob(f"*/{FILE_NAME}"))
    if not checkpoints:
        raise ValueError(f"{argument}: expected a run under {RUNS}/, or the folder of another, got none")
    return max(checkpoints, key=lambda path: path.stat().st_mtime_ns).parent


def _new_run() -> Path:
    """Make the folder of a run, named after the time, that no other has."""
    RUNS.mkdir(exist_ok=True)
    start = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([start], (f"{start}-{number}" for number in itertools.count(2)))
    return next(RUNS / name for name in names if _is_new(RUNS / name))


def _is_new(folder: Path) -> bool:
    """Make the folder, unless it is there."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _resumed(folder: Path, given: dict[str, Any]) -> Checkpoint:
    """The folder's checkpoint, with more or fewer steps to go if asked. Nothing else of a run can change."""
    checkpoint = Checkpoint.load(folder)
    config = checkpoint.config
    for name, value in given.items():
        if name != "steps" and value != getattr(config, name):
            raise ValueError(
                f"{name}: expected nothing, or {getattr(config, name)!r} as the resumed run, got {value!r}"
            )
    steps = given.get("steps", config.steps)
    if steps < checkpoint.step:
        raise ValueError(f"steps: expected at least the {checkpoint.step} that the run has, got {steps}")
    return dataclasses.replace(checkpoint, config=dataclasses.replace(config, steps=steps))


def _start(
    data: Path | None, out: Path | None, resume: bool, device: torch.device, given: dict[str, Any]
) -> tuple[Trainer, Path]:
    if "expert_sizes" in given:
        given["expert_sizes"] = parse_sizes(given["expert_sizes"])
    checkpoint = None
    if resume:
        out = out or _newest_run("resume")
        checkpoint = _resumed(out, given)
        config, data = checkpoint.config, data or checkpoint.data
    else:
        if out is not None and (out / FILE_NAME).exists():
            raise ValueError(f"out: expected a folder without a run, got {out}, which has one: add --resume")
        config = TrainConfig.for_device(device.type, **given)
    if config.backend in ("hopper", "triton") and device.type != "cuda":
        raise ValueError(f"backend: expected auto or torch on {device.type}, got {config.backend!r}")
    if config.compile and device.type != "cuda":
        raise ValueError(f"compile: expected a CUDA device, got {device.type}")
    corpus = Corpus.load(data)
    if checkpoint is not None and corpus.sha256 != checkpoint.sha256:
        raise ValueError(
            f"data: expected the run's text, {checkpoint.source}, SHA-256 {checkpoint.sha256[:_SHOWN_DIGITS]}, "
            f"got {corpus.source}, SHA-256 {corpus.sha256[:_SHOWN_DIGITS]}"
        )
    trainer = Trainer(config, corpus, device, checkpoint)
    if out is None:
        return trainer, _new_run()
    out.mkdir(parents=True, exist_ok=True)
    return trainer, out


def _train(trainer: Trainer, out: Path, checkpoint_every: int, console: Console) -> bool:
    """Run the steps that are left, saving now and then and at the end; False if a signal stopped it."""
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"))
    saved_at, saved = trainer.done, False
    with stop_on_signal() as stop, Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=trainer.config.steps, completed=trainer.done, status="")
        while trainer.done < trainer.config.steps and not stop.is_set():
            until = min(trainer.done + _REPORT_EVERY, trainer.config.steps, saved_at + checkpoint_every)
            with trainer.timed():
                loss = trainer.step()
                while trainer.done < until and not stop.is_set():
                    loss = trainer.step()
            speed = trainer.done * trainer.tokens_per_step / trainer.seconds
            progress.update(task, completed=trainer.done, status=f"loss {float(loss):.3f}, {speed:,.0f} tokens/s")
            if not math.isfinite(float(loss)):
                raise FloatingPointError(
                    f"the loss is {float(loss)} after {trainer.done} steps: try a lower learning rate"
                )
            if trainer.done - saved_at >= checkpoint_every:
                trainer.checkpoint().save(out)
                saved_at, saved = trainer.done, True
        if saved_at < trainer.done or not saved:  # a resumed run may have another text, or more steps
            trainer.checkpoint().save(out)
        return not stop.is_set()


def _conclude(trainer: Trainer, out: Path, sample_bytes: int, console: Console) -> None:
    corpus, context = trainer.corpus, trainer.config.context
    seen, held_out = windows(corpus.train, context), windows(corpus.held_out, context)
    train_loss, held_out_loss = trainer.loss_on(seen), trainer.loss_on(held_out)
    usage, layout = trainer.usage.cpu(), trainer.config.moe.layout
    plot = out / "usage.png"
    plot_usage(usage, layout, plot)
    sample = trainer.model.generate(PROMPT, sample_bytes)
    console.print(f"\n[bold]Sample[/bold], continuing {PROMPT.decode()!r}:\n")
    console.print(printable(sample), markup=False, highlight=False)
    console.print()
    console.print(usage_table(usage, layout))
    console.print(f"train loss      {train_loss:.3f} nats a byte")
    console.print(f"held-out loss   {held_out_loss:.3f}")
    console.print(f"unigram model   {corpus.unigram_loss(held_out[:, 1:]):.3f}, on the same held-out bytes")
    console.print(f"speed           {trainer.done * trainer.tokens_per_step / trainer.seconds:,.0f} tokens/s")
    console.print(
        f"plot            {escape(str(plot))}\ncheckpoint      {escape(str(out / FILE_NAME))}", highlight=False
    )


@app.command()
def train(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A file or a folder of text.", show_default="the resumed run's, else Python's standard library"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/<date-time>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, or the newest one.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default=_DEFAULT_DEVICE)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    experts: Annotated[str | None, typer.Option(help="count x width, as in 4x256+2x64; width 0: null experts.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token.")] = None,
    activation: Annotated[str | None, typer.Option(help="Of the experts, such as swiglu or relu_squared.")] = None,
    hidden_size: Annotated[int | None, typer.Option()] = None,
    num_layers: Annotated[int | None, typer.Option()] = None,
    num_heads: Annotated[int | None, typer.Option()] = None,
    context: Annotated[int | None, typer.Option(help="Bytes a prediction may look back on.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or bf16: autocast.")] = None,
    backend: Annotated[str | None, typer.Option(help="Of the MoE layers: auto, hopper, triton or torch.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Steps under torch.compile, as CUDA graphs.")
    ] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 500,
    sample_bytes: Annotated[int, typer.Option(min=0, help="Length of the sample at the end.")] = 300,
) -> None:
    """Train a byte-level GPT whose MLPs are variable-width MoE layers, on real text.

    What is not given has a default for the device. Ctrl-C saves a checkpoint and ends; --resume goes on from there.
    """
    console = Console()
    options = {
        "steps": steps,
        "expert_sizes": experts,
        "num_active_experts": top_k,
        "activation": activation,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "context": context,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "backend": backend,
        "compile": compiled,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    try:
        chosen = _device(device)
        trainer, out = _start(data, out, resume, chosen, given)
    except (ValueError, RuntimeError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    config = trainer.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    sizes = " + ".join(f"{count}x{width}" for count, width in config.expert_sizes)
    console.print(escape(f"text: {trainer.corpus.source}"), highlight=False)
    console.print(
        f"model: {parameters / 1e6:.1f} M parameters, {config.num_layers} layers of hidden size {config.hidden_size}, "
        f"experts {sizes}, top-{config.num_active_experts}, {config.activation}, {config.precision} on {chosen}",
        highlight=False,
    )
    try:
        finished = _train(trainer, out, checkpoint_every, console)
    except FloatingPointError as error:
        console.print(f"Stopped: {error}")
        raise typer.Exit(1) from None
    if not finished:
        go_on = escape(f"--resume --out {out} --device {chosen}")
        console.print(f"Stopped after {trainer.done} steps; saved. Go on with {go_on}")
        raise typer.Exit(130)
    _conclude(trainer, out, sample_bytes, console)


def _trained(path: Path | None, device: torch.device) -> GPT:
    """A checkpoint's model, in the precision it was trained in. Raises ValueError if there is none."""
    checkpoint = Checkpoint.load(path or _newest_run("checkpoint"), "checkpoint")
    config = dataclasses.replace(checkpoint.config, backend="auto")  # it may have been trained elsewhere
    model = GPT(config)
    model.load_state_dict(dict(checkpoint.model))
    return model.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32).eval()


@app.command()
def sample(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of a run, or the checkpoint in it.", show_default="the newest run")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text to go on with.")] = PROMPT.decode(),
    tokens: Annotated[int, typer.Option(min=0, help="Bytes to write after the prompt.")] = 300,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest byte.")] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among so many of the likeliest bytes.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default=_DEFAULT_DEVICE)] = None,
) -> None:
    """Write text with the model of a checkpoint that `train` saved."""
    console = Console()
    try:
        model = _trained(checkpoint, _device(device))
        start = time.perf_counter()
        text = model.generate(prompt.encode(), tokens, temperature, seed, top_k)
    except (ValueError, RuntimeError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    seconds = time.perf_counter() - start
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{tokens} bytes in {seconds:.1f} s, {tokens / seconds:,.0f} a second", highlight=False)


def _assignments(values: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="The table to write rows into.")] = Path("tuning.json"),
    kernels: Annotated[list[str] | None, typer.Option("--kernel", help="Only this one; may be given again.")] = None,
    experts: Annotated[str, typer.Option(help="count x width, as in 4x256+2x64.")] = "128x256",
    hidden_size: Annotated[int, typer.Option()] = 1536,
    tokens: Annotated[int, typer.Option(help="Of a step.")] = 24576,
    top_k: Annotated[int, typer.Option(help="Experts a token.")] = 8,
    activation: Annotated[str, typer.Option()] = "swiglu",
    precision: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
) -> None:
    """Search this GPU's fastest tiles on one shape. The environment's TRITON_MOE_TUNING=FILE puts them to use."""
    from triton_moe import tune  # needs Triton, the other commands do not

    console = Console()
    try:
        shape, dtype, device = tune.request(tokens, hidden_size, parse_sizes(experts), top_k, activation, precision)
        known = tune.kernels_for(shape, dtype, device)
        tune.read_rows(out)  # before the search, which takes minutes
        for name in kernels or ():
            if name not in known:
                raise ValueError(f"kernel: expected one of {', '.join(known)}, got {name!r}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for name in kernels or known:
        found = {}
        for config, milliseconds in tune.search(name, known[name], shape, dtype, device):
            shown = "does not fit, or is wrong" if milliseconds is None else f"{milliseconds:.4f} ms"
            console.print(f"{name} {_assignments(config._asdict())}: {shown}")
            if milliseconds is not None:
                found[config] = milliseconds
        if found:
            best, milliseconds = tune.best_of(name, known[name], shape, dtype, device, found)
            console.print(f"{name} {_assignments(best._asdict())}: fastest in turns, {milliseconds:.4f} ms")
            tune.write_row(out, name, best, milliseconds, shape, device)
    console.print(f"Rows are in {out}; TRITON_MOE_TUNING={out} puts them to use.")


def _script(name: str) -> Path:
    """Raises ValueError if the package is installed without the repository's scripts."""
    path = BENCHMARKS / f"{name}.py"
    if not path.exists():
        raise ValueError(
            "the benchmarks are in the repository, not in the installed package: clone it, and run "
            "`uv run triton-moe bench` there"
        )
    return path


def _benchmark(name: str) -> Path:
    """What `bench` runs by that name. Raises ValueError on another one, and without the repository."""
    _script("bench_moe")
    scripts = {path.stem.removeprefix("bench_"): path for path in BENCHMARKS.glob("bench_*.py")}
    scripts |= {other: _script(other) for other in _OTHER_BENCHMARKS}
    if name not in scripts:
        raise ValueError(f"name: expected one of {', '.join(sorted(scripts))}, got {name!r}")
    return scripts[name]


def _run(find: Callable[[str], Path], name: str, arguments: list[str]) -> None:
    try:
        script = find(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    done = subprocess.run([sys.executable, str(script), *arguments], check=False)
    raise typer.Exit(done.returncode)


_PASSED_ON = {"ignore_unknown_options": True}


@app.command(context_settings=_PASSED_ON)
def bench(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME] [OPTIONS]", help="moe (the default), forward, scaling, ..., and its options."),
    ] = None,
) -> None:
    """Run one of the repository's benchmarks: `triton-moe bench scaling --quick`, `triton-moe bench moe -- --help`."""
    name, *options = arguments or ["moe"]
    if name.startswith("-"):
        name, options = "moe", [name, *options]
    _run(_benchmark, name, options)


@app.command(context_settings=_PASSED_ON)
def report(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTIONS]", help="See `triton-moe report -- --help`.")
    ] = None,
) -> None:
    """Write the README's tables and report.html, a page of tables and plots, from the rows of the benchmarks."""
    _run(_script, "report", arguments or [])
