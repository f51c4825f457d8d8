"""How fast a run is beside what the device could do, and how its experts were used."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from triton_moe import ExpertLayout

PEAK_TFLOPS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "A100": 312.0, "RTX 4090": 165.0, "RTX 3090": 71.0}
"""Dense bf16 products with fp32 sums, from the makers' data sheets, by a part of the device's name."""
_MOST_COLUMNS = 200


def peak_flops(device: torch.device, given_tflops: float | None = None) -> float | None:
    """Floating-point operations a second: those given, or from the table, or None."""
    if given_tflops is not None:
        return given_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def mfu(tokens_per_second: float | None, flops: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: what a step's tokens need, `flops` each, over what the device could do in the time."""
    return None if tokens_per_second is None or peak is None else tokens_per_second * flops / peak


def plot_usage(usage: Tensor, layout: ExpertLayout, path: Path) -> None:
    """`usage (steps, MoE blocks, E)` fractions of slots -> a PNG with a map a block: a column a few steps, a row an
    expert, in the layout's order, a colour its share, 1 being an even one."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    shares = torch.stack([part.mean(0) for part in usage.float().cpu().tensor_split(min(len(usage), _MOST_COLUMNS))])
    shares = shares * layout.num_experts
    across = min(4, shares.shape[1])
    down = -(-shares.shape[1] // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(3.5 * across, 2.5 * down + 0.5),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    firsts = [experts[0] for experts in layout.width_classes.values()]
    for block, ax in enumerate(axes.flat):
        if block >= shares.shape[1]:
            ax.set_axis_off()
            continue
        extent = (0, len(usage), layout.num_experts - 0.5, -0.5)
        image = ax.imshow(shares[:, block].T.numpy(), aspect="auto", vmin=0, vmax=3, cmap="viridis", extent=extent)
        ax.set(title=f"MoE block {block}", yticks=firsts, yticklabels=[f"{layout.widths[e]} wide" for e in firsts])
    figure.colorbar(image, ax=axes, label="share of the slots x E")
    figure.supxlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)
