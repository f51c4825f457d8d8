"""Rules of the source tree that no linter knows."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "triton_moe"
FOLDERS = ("triton_moe", "reference", "tests", "benchmarks", "examples")
DEVICE_CODE = sorted([*(PACKAGE / "kernels").rglob("*.py"), *(PACKAGE / "ops").rglob("*.py")])
READ_BACK = re.compile(r"\.(item|tolist|cpu|nonzero)\(|compiler\.disable|cuda\.synchronize")

# File or folder -> what it must not import, at any level of nesting, beside what stands above it in README's list.
MUST_NOT_IMPORT = {
    "cli.py": r"triton\b|triton_moe(?!\.(train|tune)\b)",
    "tune.py": r"triton_moe\.(cli|train|testing|functional|reference)\b",
    "products.py": r"triton\b|triton_moe(?!\.(kernels|activations|layout)\b)",
    "train": r"triton\b|triton_moe(?!\.(train|moe|layout)\b)",
    "testing.py": r"triton\b|triton_moe(?!\.(reference|layout)\b)",
    "reference.py": r"triton\b|triton_moe(?!\.layout\b)",
    "layout.py": r"triton\b|triton_moe\b",
    "constants.py": r"triton\b|triton_moe\b",
    "activations.py": r"triton\b|triton_moe\b",
    "torch_backend.py": r"triton\b|triton_moe(?!\.(activations|layout)\b)",
    "experts.py": r"triton\b|triton_moe\.(reference|testing|kernels|ops)\b",
    "moe.py": r"triton\b|triton_moe\.(reference|testing|kernels|ops)\b",
    "balancing.py": r"triton\b|triton_moe\.(reference|testing|kernels)\b",
    "router.py": r"triton\b|triton_moe\.(reference|testing|kernels)\b",
    "losses.py": r"triton\b|triton_moe\.(reference|testing|kernels|ops)\b",
    "functional.py": r"torch\.nn\b(?!\.functional)|triton_moe\.(reference|testing)\b",
    "ops": r"torch\.nn\b|triton_moe\.(reference|testing)\b",
    "kernels": r"torch\.(nn|autograd)\b|triton_moe(?!\.(kernels|activations|constants|layout)\b)",
}
LINES = re.search(r"```\ntriton_moe/\n(.*?)\n\S", (ROOT / "README.md").read_text(), re.S)[1].splitlines()  # type: ignore[index]
# File or folder -> the line of README's list that it is in.
LINE_OF = {
    name.rstrip("/"): number
    for number, line in enumerate(LINES)
    if re.match(r"  \S", line)
    for name in line.strip().split("  ")[0].split()
}
# The one way up: where `kernels/__init__.py` may import `functional`, to look a name up late, and for type checkers.
LOOKS_UP = ("def __getattr__(", "if TYPE_CHECKING:")


def imported(statement: ast.stmt) -> Iterator[str]:
    """Full names at any level of nesting: `from triton_moe import layout` imports `triton_moe.layout`."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def breaches(file: str, source: str) -> list[str]:
    """What a file of the package imports against its rule. No relative import passes: a rule reads full names."""
    place = file.partition("/")[0]
    below = "|".join(name.removesuffix(".py") for name, line in LINE_OF.items() if line >= LINE_OF[place])
    rule = rf"{MUST_NOT_IMPORT[place]}|triton_moe(?!\.(?:{below})\b)"
    names = []
    for statement in ast.parse(source).body:
        looks_up = file == "kernels/__init__.py" and ast.unparse(statement).startswith(LOOKS_UP)
        exempt = r"(?!triton_moe\.functional\b)" if looks_up else ""
        names += [name for name in imported(statement) if re.match(rf"{exempt}(\.|{rule})", name)]
    return names


@pytest.mark.parametrize("path", DEVICE_CODE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_device_code_never_reads_back(path: Path) -> None:
    assert not [line for line in path.read_text().splitlines() if READ_BACK.search(line)]


def test_the_ban_would_tell() -> None:
    assert READ_BACK.search("n = counts.tolist()")
    assert READ_BACK.search("@torch.compiler.disable")


def test_every_file_has_a_line() -> None:
    there = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"}
    assert set(LINE_OF) == set(MUST_NOT_IMPORT) == there


@pytest.mark.parametrize("place", MUST_NOT_IMPORT)
def test_imports_point_downward(place: str) -> None:
    files = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).rglob("*.py"))
    assert files
    for path in files:
        assert not breaches(path.relative_to(PACKAGE).as_posix(), path.read_text()), path


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "from triton_moe.ops import moe_mlp"),
        ("tune.py", "from triton_moe.cli import app"),
        ("losses.py", "from triton_moe.products import Shape"),
        ("router.py", "from triton_moe import tune"),
        ("router.py", "from triton_moe.reference import moe_mlp"),
        ("losses.py", "from triton_moe.router import route_tokens"),
        ("ops/router.py", "from triton_moe.reference import moe_mlp"),
        ("router.py", "from triton_moe import MoEConfig"),
        ("experts.py", "from triton_moe import moe_mlp"),
        ("experts.py", "from triton_moe.moe import MoEMLP"),
        ("balancing.py", "from triton_moe.experts import Experts"),
        ("functional.py", "from triton_moe.balancing import METHODS"),
        ("ops/router.py", "from triton_moe import torch_backend"),
        ("activations.py", "import triton_moe.layout"),
        ("train/gpt.py", "import triton.language as tl"),
        ("train/data.py", "from triton_moe.cli import app"),
        ("testing.py", "from triton_moe import functional"),
        ("functional.py", "from torch import nn"),
        ("moe.py", "from triton_moe import testing"),
        ("ops/moe_mlp.py", "from triton_moe.train.gpt import GPT"),
        ("kernels/gather.py", "from ..functional import gather"),
        ("kernels/gather.py", "from triton_moe import moe_mlp"),
        ("kernels/gather.py", "def __getattr__(name):\n    from triton_moe import functional"),
        ("kernels/__init__.py", "import triton_moe.functional"),
        ("kernels/__init__.py", "def gather():\n    from triton_moe.functional import gather"),
        ("kernels/__init__.py", "def __getattr__(name):\n    from triton_moe import moe"),
    ],
)
def test_an_import_upward_would_tell(file: str, source: str) -> None:
    assert breaches(file, source)


def test_import_is_light() -> None:
    """Without torch.compile, the commands' libraries and Triton, which take seconds; kernels load that when used."""
    program = "import sys, torch; before = set(sys.modules); import triton_moe; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "triton_moe.functional" in loaded
    heavy = ("torch._dynamo", "torch._inductor", "triton", "sympy", "matplotlib", "typer", "rich", "safetensors")
    assert [name for name in loaded if name in heavy] == []


def test_files_stay_small() -> None:
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        assert len(path.read_text().splitlines()) <= (400 if path.name == "train_gpt.py" else 500), path
