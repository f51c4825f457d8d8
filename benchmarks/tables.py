"""What the rows in `results/` say, as captions and tables.

Of each benchmark the newest rows count: those of the last run of it, or of each of its cases.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import CASES, GROUPS
from results import ROOT

RESULTS = ROOT / "benchmarks" / "results"
OURS, OURS_AS_GRAPH, REFERENCE = "triton_moe", "triton_moe_graph", "stk"
OWN = {
    OURS: "this project",
    OURS_AS_GRAPH: "as CUDA graphs",
    "triton_moe_portable": "its portable kernels",
}
IN_PYTORCH = {
    "triton_moe_compiled": "compiled",
    "grouped_mm": "torch grouped_mm (padded to the widest expert)",
    "grouped_mm_compiled": "torch grouped_mm, compiled",
    "grouped_mm_by_width": "one grouped_mm a width",
    "transformers_grouped_mm": "transformers' grouped_mm",
    "torch_loop": "a loop over experts",
    "dense_ceiling": "one dense MLP of equal FLOPs",
}
LIBRARIES = {
    "scattermoe": "ScatterMoE (one width alone)",
    "sonic_moe": "SonicMoE 0.1.2 (one width alone)",
    "momoe": "MoMoE (one width alone)",
}
NAMES = OWN | IN_PYTORCH | LIBRARIES

Row = dict[str, str]
Rows = list[Row]


CLAIMED_SPEEDUPS = "1.52 to 3.19 times the reference's forward pass and 1.73 to 2.22 times both"
CLAIMED_TOPOLOGY = "38%"
CLAIMED_CORRELATION = "the starting document reported 0.9999, which a reference with garbage gradients scored too"
"""What the starting document says, to stand beside what was found."""


@dataclass(frozen=True)
class Table:
    caption: str
    """With file names in backquotes."""
    header: Sequence[str] = ()
    body: Sequence[Sequence[str]] = ()

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.body] if self.header else []
        shown = [f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([self.caption, *([""] if shown else []), *shown])


def rows_of(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_of(row: dict[str, str]) -> tuple[str, str, str]:
    return row["date"], row["commit"], row["gpu"]


def newest(rows: Rows) -> Rows:
    """Those of the last run."""
    return [row for row in rows if run_of(row) == run_of(rows[-1])]


def command_of(row: dict[str, str]) -> tuple[str, ...]:
    """What tells commands of one day and commit apart: the yardsticks, which each of them measures for itself."""
    return *run_of(row), row.get("cublas_8192_tflops", ""), row.get("torch_add_us", "")


def runs_of_each_case(rows: Rows) -> list[list[dict[str, Row]]]:
    """Of each case its commands, oldest first: contestant (empty where there is none) -> its row."""
    runs: dict[str, dict[tuple[str, ...], dict[str, Row]]] = {}
    for row in rows:
        runs.setdefault(row["case"], {}).setdefault(command_of(row), {})[row.get("contestant", "")] = row
    return [list(of_case.values()) for of_case in runs.values()]


def newest_of_each_case(rows: Rows, contestants: Collection[str]) -> list[Rows]:
    """Of each case the rows of the last command that had all these contestants: ratios come from one run."""
    complete = [[run for run in runs if run.keys() >= set(contestants)] for runs in runs_of_each_case(rows)]
    return [[runs[-1][name] for name in contestants] for runs in complete if runs]


def newest_beside_ours(runs: Sequence[dict[str, Row]], rivals: Collection[str]) -> list[dict[str, Row]]:
    """Of a case's commands the last ones that had each of these rivals beside ours, newest first; of each command its
    own, and such of the rivals as no later one has."""
    chosen, left = [], set(rivals)
    for run in reversed(runs):
        if OURS in run and left & run.keys():
            chosen.append({name: row for name, row in run.items() if name in left | OWN.keys()})
            left -= run.keys()
    return chosen


def of_columns(caption: str, rows: Rows, columns: Mapping[str, str]) -> Table:
    """Rows as they are: the columns to show, and their headings."""
    return Table(caption, tuple(columns.values()), [[row[column] for column in columns] for row in rows])


def machine(row: dict[str, str]) -> str:
    return f"{row['gpu']}, torch {row['torch']}, triton {row['triton']}, {row['date']}, commit {row['commit']}"


def machines(rows: Rows) -> str:
    """Each GPU's, by its newest row, with the commits of all of its rows."""
    of_gpu: dict[str, Rows] = {}
    for row in rows:
        of_gpu.setdefault(row["gpu"], []).append(row)
    commits = {gpu: ", ".join(dict.fromkeys(row["commit"] for row in used)) for gpu, used in of_gpu.items()}
    newest_of = {gpu: max(used, key=lambda row: row["date"]) for gpu, used in of_gpu.items()}
    return "; ".join(machine({**newest_of[gpu], "commit": commits[gpu]}) for gpu in of_gpu)


def shape(row: dict[str, str]) -> str:
    return ", ".join(row[column] for column in ("T", "H", "sizes", "K", "activation") if column in row)


SPREAD = "in brackets the slowest loop less the fastest"


def both(row: dict[str, str]) -> str:
    """Forward / step in milliseconds, with their spreads."""
    kinds = ((row[f"{kind}_ms"], float(row[f"{kind}_spread_ms"])) for kind in ("forward", "step"))
    return " / ".join(f"{milliseconds} ({spread:.2g})" for milliseconds, spread in kinds)


def speed(rows: Rows) -> list[Table]:
    """A table of ways to do it in PyTorch, one of libraries; a line a command of a case of cases.py: forward / step in
    ms."""
    cases = runs_of_each_case([row for row in rows if row["case"] in CASES])
    in_pytorch = "ways to do it in PyTorch (a dense MLP is another function, without a router)"
    kinds = {in_pytorch: IN_PYTORCH, "other libraries": LIBRARIES}
    tables = []
    for kind, rivals in kinds.items():
        lines = [run for runs in cases for run in newest_beside_ours(runs, rivals)]
        if not lines:
            continue
        used = [row for run in lines for row in run.values()]
        caption = (
            f"Forward / forward and backward in ms beside {kind}, bf16, the same router, auxiliary losses off, medians "
            f"of loops in which the contestants of a line take turns, {SPREAD}; of each the newest run "
            f"({machines(used)}; in the last line's run cuBLAS 8192^3 ran at {used[-1]['cublas_8192_tflops']} TFLOP/s, "
            f"a torch add took {used[-1]['torch_add_us']} us of host time; `benchmarks/results/bench_moe.csv`)."
        )
        ran, gpus = {row["contestant"] for row in used}, {row["gpu"] for row in used}
        names = {contestant: name for contestant, name in (OWN | rivals).items() if contestant in ran}
        body = []
        for run in lines:
            gpu = f" ({run[OURS]['gpu']})" if len(gpus) > 1 else ""
            times = [both(run[name]) if name in run else "" for name in names]
            body.append([shape(run[OURS]) + gpu, *times, run[OURS]["commit"]])
        tables.append(Table(caption, ("T, H, sizes, K, activation", *names.values(), "commit"), body))
    return tables


def _times_as_fast(reference: dict[str, str], ours: dict[str, str], *columns: str) -> str:
    return " / ".join(f"{float(reference[column]) / float(ours[column]):.1f}x" for column in columns)


def against_reference(rows: Rows) -> list[Table]:
    """A line a case of the starting document: the block-sparse reference, ours, ours as CUDA graphs, and how many times
    as fast they are."""
    seed = {case.name for case in GROUPS["seed"]}
    cases = newest_of_each_case([row for row in rows if row["case"] in seed], (REFERENCE, OURS, OURS_AS_GRAPH))
    if not cases:
        return []
    body = []
    for case in cases:
        of = {row["contestant"]: row for row in case}
        cells = [both(of[REFERENCE])]
        for name in (OURS, OURS_AS_GRAPH):
            cells += [both(of[name]), _times_as_fast(of[REFERENCE], of[name], "forward_ms", "step_ms")]
        cells.append(_times_as_fast(of[REFERENCE], of[OURS], "busy_forward_ms", "busy_step_ms"))
        body.append([shape(case[0]), *cells])
    caption = (
        f"The starting document's configurations beside the block-sparse reference on stk: forward / forward and "
        f"backward in ms, {SPREAD}, bf16; the reference is always launched by the host, which is what most of its time "
        f"goes into, so the last column has what the device alone executes; the document reported {CLAIMED_SPEEDUPS} "
        f"({machines([row for case in cases for row in case])}; in the last line's run a torch add took "
        f"{cases[-1][0]['torch_add_us']} us of host time; `bench_moe.csv`)."
    )
    header = ("T, H, sizes, K, activation", "reference", "this project", "", "as CUDA graphs", "", "on the device")
    return [Table(caption, header, body)]


def topology(rows: Rows) -> list[Table]:
    """A line a case: what building the sparse topology takes of the reference's forward pass."""
    cases: dict[str, Rows] = {}
    for row in rows:
        if row["contestant"] == REFERENCE:
            cases.setdefault(row["case"], []).append(row)
    used, body = [], []
    for of_case in map(newest, cases.values()):
        stages = {row["stage"]: row for row in of_case}
        built, forward = stages["topology"], stages["forward"]
        body.append([shape(forward), forward["ms"], built["ms"], f"{float(built['percent']):.0f}%"])
        used.append(forward)
    if not used:
        return []
    caption = (
        f"What building the sparse topology, by our own PyTorch code, takes of the reference's forward pass, each "
        f"timed by itself in a loop, in ms; the starting document reported {CLAIMED_TOPOLOGY} ({machines(used)}; "
        f"`bench_profile.csv`)."
    )
    return [Table(caption, ("T, H, sizes, K, activation", "forward", "topology", "share"), body)]


def widths(rows: Rows) -> list[Table]:
    """A line a pair of a uniform layout and another one: TFLOP/s, and what is left of the uniform one's."""
    names = [case.name for case in GROUPS["widths"]]
    ours = [row for row in rows if row["contestant"] == OURS]
    pairs = []
    for pair in zip(names[::2], names[1::2], strict=True):
        runs: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
        for row in ours:
            if row["case"] in pair:
                runs.setdefault(command_of(row), {})[row["case"]] = row
        pairs += [tuple(map(run.get, pair)) for run in runs.values() if len(run) == 2][-1:]
    if not pairs:
        return []
    caption = (
        f"What widths cost: TFLOP/s forward / step of layouts with about equal FLOPs, and MiB that the forward pass "
        f"leaves (its output, and what is kept for backward, by default as much as if all were as wide as the widest), "
        f"SwiGLU, bf16 ({machines([row for pair in pairs for row in pair])}; `bench_moe.csv`)."
    )
    body = []
    for pair in pairs:
        rates = [[float(row[column]) for column in ("forward_tflops", "step_tflops")] for row in pair]
        speeds = [f"{forward:.0f} / {step:.0f}" for forward, step in rates]
        share = " / ".join(f"{other / uniform:.0%}" for uniform, other in zip(*rates, strict=True))
        sizes = [row["case"] if len(row["sizes"]) > 40 else row["sizes"] for row in pair]
        of_pair = f"{', '.join(pair[0][column] for column in ('T', 'H', 'K'))} ({pair[0]['gpu']})"
        kept = [row["held_MiB"] for row in pair]
        body.append([of_pair, sizes[0], speeds[0], kept[0], sizes[1], speeds[1], share, kept[1]])
    header = ("T, H, K", "uniform", "TFLOP/s", "MiB", "other widths", "TFLOP/s", "of the uniform", "MiB")
    return [Table(caption, header, body)]


def host(rows: Rows) -> list[Table]:
    """A line a case: eager and as a CUDA graph."""
    used = [case[-1] for case in newest_of_each_case(rows, ("",))]
    caption = (
        f"Small shapes with the three losses, where the host decides: forward / forward and backward in ms (then with "
        f"the backward pass in the caller's thread, and a step of PyTorch's for a function that does nothing, of one "
        f"tensor and of as many as the layer's), the host's microseconds for a torch add then, and kernel launches "
        f"({machines(used)}; `bench_host.csv`)."
    )
    columns = {
        "eager": ("forward_ms", "step_ms"),
        "one thread": ("step_one_thread_ms",),
        "nothing": ("identity_step_ms", "node_step_ms"),
        "add, us": ("add_us",),
        "CUDA graph": ("graph_forward_ms", "graph_step_ms"),
        "launches": ("launches_forward", "launches_step"),
    }
    body = [[shape(row), *(" / ".join(row[name] for name in names) for names in columns.values())] for row in used]
    return [Table(caption, ("T, H, sizes, K", *columns), body)]


def decode(rows: Rows) -> list[Table]:
    """A line a number of tokens."""
    rows = newest(rows)
    caption = (
        f"Decoding, experts only, {', '.join(rows[-1][name] for name in ('sizes', 'K', 'H', 'activation'))} (sizes, K, "
        f"H, activation) in {rows[-1]['dtype']}: microseconds of a CUDA graph with the L2 cache cold, five routings in "
        f"turn, and the rate at which that reads the chosen experts' weights once; of eager calls, and of a loop over "
        f"the chosen experts, both on one routing, the L2 cache as the call before left it "
        f"({machines(rows)}; a copy ran at {rows[-1]['copy_TBps']} TB/s; `bench_decode.csv`)."
    )
    columns = {"T": "T", "chosen_MB": "MB", "graph_us": "graph", "TBps": "TB/s", "of_copy": "of a copy's"}
    return [of_columns(caption, rows, columns | {"eager_us": "eager", "loop_us": "loop"})]


def accuracy(rows: Rows) -> list[Table]:
    rows = newest(rows)
    ratios = [float(row["ratio"]) for row in rows if row["ratio"]]
    passed = sum(row["result"] == "pass" for row in rows)
    return [
        Table(
            f"Against the fp64 oracle, output and every gradient of the full-size cases in bf16, fp16 and fp32: "
            f"{passed} of {len(rows)} comparisons within the error budget, the rms error {min(ratios):.2f} to "
            f"{max(ratios):.2f} times that of plain PyTorch in the same dtype ({machine(rows[-1])}; `accuracy.csv`)."
        )
    ]


def stress(rows: Rows) -> list[Table]:
    """Of each backend and Triton release the large runs of the last commit that had one, added up; others repeat a draw
    that failed."""
    large = [row for row in rows if int(row["asked"]) >= 1000]
    last = {(row["backend"], row["triton"]): row for row in large}
    said = []
    for (backend, release), of_last in last.items():
        last_run = backend, release, of_last["commit"]
        runs = [row for row in large if (row["backend"], row["triton"], row["commit"]) == last_run]
        draws, asked, mismatches, differences = (
            sum(int(row[name]) for row in runs) for name in ("draws", "asked", "mismatches", "bitwise_differences")
        )
        said.append(
            f"backend {backend} {draws} draws ({asked} asked), {mismatches} outside the error budget, "
            f"{differences} that differed between two runs ({machine(of_last)})"
        )
    return [
        Table(
            f"Random layers and routings, forward and backward, each against the oracle and run twice: "
            f"{'; '.join(said)} (`stress.csv`; the logs in dev/ say of each one outside why)."
        )
    ]


def training(rows: Rows) -> list[Table]:
    """A line a contestant and way of compiling, from the last run of each: what a training step takes."""
    runs = {row["compile"]: run_of(row) for row in rows}
    rows = [row for row in rows if run_of(row) == runs[row["compile"]]]
    first = rows[-1]
    caption = (
        f"Training steps of examples/train_gpt.py: {first['num_layers']} layers, hidden size {first['hidden_size']}, "
        f"{first['sizes']} top-{first['num_active_experts']} {first['activation']}, {first['batch_size']} sequences of "
        f"{first['context']} tokens, {first['precision']}, compiled, {first['optimizer']}, medians of loops in which "
        f"the models take turns; the share of MoE MLPs is what a step takes longer than without them, by the wall and "
        f"by what the GPU executes ({machines(rows)}; `bench_train.csv`)."
    )
    body = []
    for row in rows:
        columns = ("mfu", "moe_share", "busy_moe_share")
        shares = [f"{float(row[column]):.0%}" if row[column] else "" for column in columns]
        rate = f"{float(row['tokens_per_second']):,.0f}"
        body.append([row["experts"], row["compile"], row["step_ms"], rate, *shares])
    header = ("experts", "compiled by", "step, ms", "tokens/s", "MFU", "share of MoE MLPs", "of the GPU's time")
    return [Table(caption, header, body)]


MUST_FAIL = {"block_sparse_historical": "block_sparse_historical has garbage for its experts' gradients"}
"""What the gate refuses of the references that training is compared with, and why."""
NO_LONGER_TRAINED = {"stk"}
"""References of older rows: stk multiplies fp32 as tf32, and so did ours beside it."""


def validation(rows: Rows) -> list[Table]:
    """A line a seed of the last run of each reference: this project and that trained side by side."""
    names = dict.fromkeys(row["baseline"] for row in rows if row["baseline"] not in NO_LONGER_TRAINED)
    rows = [row for name in names for row in newest([row for row in rows if row["baseline"] == name])]
    reasons = "".join(f"; {MUST_FAIL[name]}, and must fail" for name in names if name in MUST_FAIL)
    caption = (
        f"Two GPTs trained on the same real text from the same weights, one with this project's layers, one with a "
        f"reference's: how many of the first 100 steps can be compared, until a tie of two experts parts them; the "
        f"largest difference of their losses there, in nats, and what rounding alone makes of it; the correlation of "
        f"all losses ({CLAIMED_CORRELATION}); held-out losses; the newest run of each reference{reasons} "
        f"({machines(rows)}; `validate_training.csv`)."
    )
    columns = {"baseline": "reference", "seed": "seed", "steps": "steps", "compared_steps": "compared"}
    columns |= {"first_steps_difference": "difference", "rounding_difference": "of rounding"}
    columns |= {"correlation": "correlation", "our_held_out_loss": "ours", "baseline_held_out_loss": "its"}
    return [of_columns(caption, rows, columns | {"result": "result"})]


def experiments(rows: Rows) -> list[Table]:
    """A line an experiment of the last run, means over its seeds."""
    rows = newest(rows)
    first = rows[-1]
    caption = (
        f"Experts of several widths, about equal in active parameters: {first['num_layers']} layers, hidden size "
        f"{first['hidden_size']}, {first['steps']} steps, {first['passes']} passes over the Python standard library's "
        f"sources, {first['optimizer']}, {first['balancing']}, means of {len({row['seed'] for row in rows})} seeds "
        f"({machine(first)}; `train_widths.csv`, drawn in `docs/train_widths.svg`)."
    )
    body = []
    for name in dict.fromkeys(row["experiment"] for row in rows):
        seeds = [row for row in rows if row["experiment"] == name]
        mean = {
            column: statistics.fmean(float(row[column]) for row in seeds)
            for column in ("active_parameters", "active_parameters_used", "held_out_loss", "tokens_per_second")
        }
        losses = sorted((row["held_out_loss"] for row in seeds), key=float)
        body.append(
            [
                f"{seeds[0]['sizes']}, top-{seeds[0]['num_active_experts']}",
                f"{mean['active_parameters'] / 1e6:.1f}M / {mean['active_parameters_used'] / 1e6:.1f}M",
                f"{mean['held_out_loss']:.3f} ({losses[0]} to {losses[-1]})",
                f"{mean['tokens_per_second']:,.0f}",
            ]
        )
    header = ("experts", "active parameters, even / as used", "held-out loss, nats a token", "tokens/s")
    return [Table(caption, header, body)]


def refusals(rows: Rows) -> list[Table]:
    """A line a contestant that crashed or was wrong, in the last run of each case and contestant that was refused."""
    last = {(row["benchmark"], row["case"], row["contestant"]): row for row in rows}
    caption = f"Contestants that crashed or were wrong, and so have no time ({machines(rows)}; `refused.csv`)."
    columns = ("benchmark", "case", "contestant", "kind", "reason", "commit")
    return [of_columns(caption, [*last.values()], dict(zip(columns, columns, strict=True)))]


SECTIONS: tuple[tuple[str, Callable[[Rows], list[Table]]], ...] = (
    ("bench_moe.csv", against_reference),
    ("bench_profile.csv", topology),
    ("bench_moe.csv", speed),
    ("bench_moe.csv", widths),
    ("bench_host.csv", host),
    ("bench_decode.csv", decode),
    ("bench_train.csv", training),
    ("train_widths.csv", experiments),
    ("validate_training.csv", validation),
    ("accuracy.csv", accuracy),
    ("stress.csv", stress),
    ("refused.csv", refusals),
)


def tables_of(folder: Path) -> list[Table]:
    """What the rows in a folder say."""
    found = [section(rows_of(folder / name)) for name, section in SECTIONS if (folder / name).exists()]
    return [table for tables in found for table in tables]


def gradients_of(folder: Path) -> list[Table]:
    """A table a machine and dtype, a line a case and contestant: cosine similarity and relative error of dw1, dw2."""
    path = folder / "gradients.csv"
    newest_rows = {
        tuple(row[key] for key in ("gpu", "dtype", "case", "contestant", "tensor")): row
        for row in (rows_of(path) if path.exists() else [])
    }
    grouped: dict[tuple[str, str], Rows] = {}
    for row in newest_rows.values():
        grouped.setdefault((row["gpu"], row["dtype"]), []).append(row)
    tables = []
    for (_, dtype), rows in grouped.items():
        figures = {
            tuple(row[key] for key in ("case", "contestant", "tensor")): f"{row['cosine']} / {row['relative_error']}"
            for row in rows
        }
        body = [
            [case, contestant, *(figures[case, contestant, tensor] for tensor in ("dw1", "dw2"))]
            for case, contestant in dict.fromkeys((row["case"], row["contestant"]) for row in rows)
        ]
        caption = f"{dtype} ({machines(rows)}; `benchmarks/results/gradients.csv`), cosine similarity / relative error:"
        tables.append(Table(caption, ("case", "layer", "dw1", "dw2"), body))
    return tables
