"""One HTML page of everything measured: tables, plots drawn from the rows, and the rows. It loads nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from roofline import roofline
from stages import STAGES
from tables import REFERENCE, Rows, Table, command_of, gradients_of, newest, rows_of, tables_of

Draw = Callable[[Rows], Figure | None]
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { border: 1px solid #ccc; padding: 0.1em 0.5em; text-align: right; white-space: nowrap; }
.wide { overflow-x: auto; }
svg { height: auto; max-width: 100%; }
"""


def _axes(count: int, height: float = 4.5) -> tuple[Figure, Sequence[Axes]]:
    figure, grid = plt.subplots(1, count, figsize=(6 * count, height), layout="constrained", squeeze=False)
    return figure, grid[0]


def _last_of_each(rows: Rows, *keys: str) -> Rows:
    """The newest row of each combination of these columns."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def _fullest_run(rows: Rows) -> Rows:
    """A case's rows of the command that had most contestants, the newest of these: only one run's can be compared."""
    runs: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        runs.setdefault(command_of(row), {})[row["contestant"]] = row
    return list(max(reversed(runs.values()), key=len).values())


def dots(*columns: str) -> Draw:
    """A panel for each of these columns that has numbers: a line a case, a dot a contestant of one run. Nothing if none
    has."""

    def draw(rows: Rows) -> Figure | None:
        present = [column for column in columns if any(row.get(column) for row in rows)]
        if not present:
            return None
        cases = list(dict.fromkeys(row["case"] for row in rows))
        figure, panels = _axes(len(present), max(4.5, 0.3 * len(cases)))
        for axes, column in zip(panels, present, strict=True):
            of_cases = ([row for row in rows if row["case"] == case and row[column]] for case in cases)
            used = [row for of_case in of_cases if of_case for row in _fullest_run(of_case)]
            for name in dict.fromkeys(row["contestant"] for row in used):
                of_name = [row for row in used if row["contestant"] == name]
                places = [cases.index(row["case"]) for row in of_name]
                axes.plot([float(row[column]) for row in of_name], places, "o", label=name, alpha=0.7)
            axes.set(xscale="log", xlabel=column, yticks=range(len(cases)), yticklabels=cases)
            axes.grid(alpha=0.3)
            axes.invert_yaxis()
            axes.legend(fontsize="x-small")
        return figure

    return draw


def scaling(rows: Rows) -> Figure:
    """A panel a sweep: time of a step, and forward dashed."""
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure, panels = _axes(len(sweeps))
    for axes, sweep in zip(panels, sweeps, strict=True):
        of_sweep = [row for row in rows if row["sweep"] == sweep]
        for i, name in enumerate(dict.fromkeys(row["contestant"] for row in of_sweep)):
            line = sorted(
                _last_of_each([row for row in of_sweep if row["contestant"] == name], "value"),
                key=lambda row: int(row["value"]),
            )
            values = [int(row["value"]) for row in line]
            for column, style in (("step_ms", "o-"), ("forward_ms", "o--")):
                times = [float(row[column]) for row in line]
                axes.plot(values, times, style, color=f"C{i}", label=f"{name} {column.removesuffix('_ms')}")
        axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms")
        axes.legend(fontsize="x-small")
    return figure


def profile(rows: Rows) -> Figure:
    """A panel a contestant, a bar a case: its stages one after another."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    names.sort(key=lambda name: name != REFERENCE)
    figure, panels = _axes(len(names))
    for axes, name in zip(panels, names, strict=True):
        of_name = _last_of_each([row for row in rows if row["contestant"] == name], "case", "stage")
        cases = list(dict.fromkeys(row["case"] for row in of_name))
        ends = [0.0] * len(cases)
        for i, stage in enumerate(STAGES):
            times = {row["case"]: float(row["ms"]) for row in of_name if row["stage"] == stage}
            if times:
                lengths = [times.get(case, 0.0) for case in cases]
                axes.barh(range(len(cases)), lengths, left=ends, color=f"C{i}", label=stage)
                ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        forward = {row["case"]: float(row["ms"]) for row in of_name if row["stage"] == "forward"}
        axes.plot([forward[case] for case in cases], range(len(cases)), "k|", markersize=16, label="forward")
        axes.set(title=name, xlabel="ms", yticks=range(len(cases)), yticklabels=cases)
        axes.invert_yaxis()
        axes.legend(fontsize="x-small")
    return figure


def kernels(rows: Rows) -> Figure | None:
    """The roofline of the last run's case."""
    used = [row for row in newest(rows) if row["case"] == rows[-1]["case"]]
    return roofline(used) if any(row["tflops"] and row["TBps"] for row in used) else None


PLOTS: dict[str, Draw] = {
    "bench_moe.csv": dots("forward_ms", "step_ms", "peak_MiB"),
    "bench_forward.csv": dots("forward_ms"),
    "bench_fwd_bwd.csv": dots("step_ms"),
    "bench_memory.csv": dots("saved_MiB", "peak_MiB"),
    "bench_profile.csv": profile,
    "bench_scaling.csv": scaling,
    "bench_kernels.csv": kernels,
}


def svg_of(figure: Figure) -> str:
    """The figure as an SVG element with its text as text."""
    file = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [("th", header), *(("td", line) for line in body)]
    rows = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) for tag, line in lines]
    return '<div class="wide"><table>\n' + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table></div>"


def _html(table: Table) -> str:
    caption = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(table.caption))
    return f"<p>{caption}</p>" + (_table(table.header, table.body) if table.header else "")


def page(folder: Path) -> str:
    """What the CSV files in a folder hold: their tables, then for each file its plot, if there is one, and its rows."""
    shown = "Plots of cases show of each the newest of the runs with most contestants, other plots the newest rows."
    parts = ["<h1>triton-variable-moe, measured</h1>", f"<p>{shown}</p>"]
    parts += [_html(table) for table in (*tables_of(folder), *gradients_of(folder))]
    for path in sorted(folder.glob("*.csv")):
        rows = rows_of(path)
        parts.append(f"<h2>{escape(path.name)}</h2>")
        figure = PLOTS[path.name](rows) if rows and path.name in PLOTS else None
        if figure is not None:
            parts.append(f"<figure>{svg_of(figure)}</figure>")
        every = _table(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""
        parts.append(f"<details><summary>{len(rows)} rows</summary>{every}</details>")
    head = f'<meta charset="utf-8"><title>triton-variable-moe, measured</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
