"""What a run ends with: the experts' shares as a table and as a plot, and text that is safe to print."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from torch import Tensor

from triton_moe.layout import ExpertLayout


def printable(text: bytes) -> str:
    """UTF-8, with every control character but the line feed and the tab replaced: a sample must not move the cursor."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in decoded)


def shares(usage: Tensor) -> Tensor:
    """`usage (layers, E)` slots -> the same as fractions of each layer's slots."""
    return usage.double() / usage.sum(dim=1, keepdim=True).clamp_min(1)


def usage_table(usage: Tensor, layout: ExpertLayout) -> Table:
    """A row for each expert: its width, the tokens it received in all layers, its share of them, and that by layer."""
    table = Table(title="Tokens each expert received in training")
    for column in ("expert", "width", "tokens", "share", "by layer, least to most"):
        table.add_column(column, justify="right")
    by_layer, overall = shares(usage), shares(usage.sum(dim=0, keepdim=True))[0]
    for expert, width in enumerate(layout.widths):
        least, most = by_layer[:, expert].aminmax()
        tokens = int(usage[:, expert].sum())
        table.add_row(str(expert), str(width), f"{tokens:,}", f"{overall[expert]:.1%}", f"{least:.1%} to {most:.1%}")
    return table


def plot_usage(usage: Tensor, layout: ExpertLayout, path: Path) -> None:
    """The same as a PNG: a bar an expert, a dot a layer, a colour a width."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    by_layer, overall = shares(usage), shares(usage.sum(dim=0, keepdim=True))[0]
    widths = sorted(set(layout.widths), reverse=True)
    colors = plt.get_cmap("viridis", len(widths))
    figure, axes = plt.subplots(figsize=(max(6.0, 0.3 * layout.num_experts), 4), layout="constrained")
    for i, width in enumerate(widths):
        experts = list(layout.width_classes[width])
        axes.bar(experts, 100 * overall[experts].numpy(), color=colors(i), label=f"width {width}")
    for layer in by_layer:
        axes.plot(range(layout.num_experts), 100 * layer.numpy(), ".", color="black", alpha=0.4)
    axes.axhline(100 / layout.num_experts, color="gray", linestyle="--", label="even")
    axes.set(
        xlabel="expert", ylabel="tokens received, %", title="Tokens each expert received (bars: all layers, dots: each)"
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
