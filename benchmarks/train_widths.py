"""Train the experiments of examples/experiments on one text, and draw what came of them.

    python benchmarks/train_widths.py

Each is the run of examples/train_gpt.py that its file says: two passes over the training text, so few that the loss on
the text that is held out means something. Rows go to train_widths.csv, the plot of the newest run of each to
docs/train_widths.svg. Active parameters are about equal if all experts are chosen equally often, which a bias on the
router's scores sees to; how many were active in fact is in the row.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from results import ROOT, append, folder, provenance, text
from tables import RESULTS, Rows, newest, rows_of

sys.path.append(str(ROOT / "examples"))
from bpe import Tokens
from settings import Config
from train_gpt import Training, train

matplotlib.use("svg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "triton-moe"  # the same file from the same rows
EXPERIMENTS = sorted(
    (ROOT / "examples" / "experiments").glob("*.json"), key=lambda path: (path.stem != "uniform", path.stem)
)
NAME = "train_widths.csv"
DESCRIBED = (
    "num_active_experts", "hidden_size", "num_layers", "activation", "context", "batch_size", "vocabulary", "optimizer",
    "learning_rate", "balancing", "compile", "seed",
)  # fmt: skip


def experiment(name: str, config: Config, tokens: Tokens, device: torch.device, out: Path) -> dict[str, object]:
    """One run, its files in `out` -> its row. A run too short for a speed has nan for it."""
    torch.compiler.reset()  # other widths compile anew, and too many variants of one function are an error
    begun = time.perf_counter()
    result = train(Training(config, tokens, device), out)
    assert result is not None
    return {
        "experiment": name,
        "sizes": "+".join(f"{count}x{width}" for count, width in config.expert_sizes),
        **{field: getattr(config, field) for field in DESCRIBED},
        **dataclasses.asdict(result),
        "tokens_per_second": math.nan if result.tokens_per_second is None else result.tokens_per_second,
        "seconds": time.perf_counter() - begun,
        "text_sha256": tokens.sha256[:12],
        **provenance(device),
    }


def draw(rows: Rows, path: Path) -> None:
    """Held-out loss and tokens/s, a line an experiment: a dot a seed, a bar at their mean."""
    names = list(dict.fromkeys(row["experiment"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.6 * len(names) + 1.6), layout="constrained", sharey=True)
    labels = {row["experiment"]: f"{row['sizes']}, top-{row['num_active_experts']}" for row in rows}
    for ax, column, title in (
        (axes[0], "held_out_loss", "held-out loss, nats a token"),
        (axes[1], "tokens_per_second", "tokens/s"),
    ):
        values = [[float(row[column]) for row in rows if row["experiment"] == name] for name in names]
        ax.plot([statistics.fmean(of_name) for of_name in values], range(len(names)), "|", markersize=16)
        for place, of_name in enumerate(values):
            ax.plot(of_name, [place] * len(of_name), ".", color="black")
        ax.set(title=title, yticks=range(len(names)), yticklabels=[labels[name] for name in names])
        ax.grid(axis="y", alpha=0.4)
        ax.margins(y=0.2)
    axes[0].invert_yaxis()
    rates = [rate for row in rows if not math.isnan(rate := float(row["tokens_per_second"]))]
    axes[1].set_xlim(0, 1.05 * max(rates, default=1.0))
    first = rows[0]
    figure.suptitle(f"{first['steps']} steps, {float(first['passes']):.1f} passes, {first['gpu']}, {first['commit']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the experiments and draw them; rows go to train_widths.csv.")
    parser.add_argument("experiments", nargs="*", type=Path, help="JSON files (all of examples/experiments)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, help="text, as of examples/train_gpt.py")
    parser.add_argument("--draw", action="store_true", help="only draw the newest rows")
    parser.add_argument("--plot", type=Path, help="the plot (in docs, with --out there)")
    parser.add_argument("--out", type=Path, help="folder of the CSV file and of the runs")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.draw:
        table = (args.out or RESULTS) / NAME
    else:
        table = folder(args.out, quick=False, device=device) / NAME
        configs = {path.stem: Config.read(path) for path in args.experiments or EXPERIMENTS}
        (vocabulary,) = {config.vocabulary for config in configs.values()}
        tokens = Tokens.load(args.data, vocabulary)
        runs = args.out or Path(tempfile.mkdtemp(prefix="triton-moe-experiments-"))
        for seed in args.seeds:
            for name, config in configs.items():
                config = dataclasses.replace(config, seed=seed)
                row = experiment(name, config, tokens, device, runs / f"{name}-{seed}")
                append(table, [row])
                print(", ".join(f"{key} {text(value)}" for key, value in row.items()), flush=True)
    plot = args.plot or (args.out / "train_widths.svg" if args.out else ROOT / "docs" / "train_widths.svg")
    draw(newest(rows_of(table)), plot)
    print(plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
