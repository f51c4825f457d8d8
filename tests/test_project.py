"""Rules of the source tree that no linter knows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "triton_moe"
DEVICE_CODE = sorted([*(PACKAGE / "kernels").rglob("*.py"), *(PACKAGE / "ops").rglob("*.py")])
READ_BACK = re.compile(r"\.(item|tolist|cpu|nonzero)\(|compiler\.disable|cuda\.synchronize")

# File or folder -> what it must not import, at any level of nesting. Imports point downward only (docs: README,
# layout).
MUST_NOT_IMPORT = {
    "reference.py": r"triton$|triton\.|triton_moe(?!\.layout$)",
    "layout.py": r"triton$|triton\.|triton_moe",
    "torch_backend.py": r"triton$|triton\.|triton_moe\.(?!activations$|layout$)",
    "moe.py": r"triton$|triton\.|triton_moe\.(kernels|ops)",
    "router.py": r"triton$|triton\.|triton_moe\.(kernels|ops)",
    "losses.py": r"triton$|triton\.|triton_moe\.(kernels|ops)",
    "functional.py": r"torch\.nn$|triton_moe\.(moe|router|losses)",
    "ops": r"torch\.nn|triton_moe\.(moe|router|losses|functional)",
    "kernels": r"torch\.(nn|autograd)|triton_moe\.(moe|router|losses|ops)",
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", DEVICE_CODE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_device_code_never_reads_back(path: Path) -> None:
    assert not [line for line in path.read_text().splitlines() if READ_BACK.search(line)]


def test_the_ban_would_tell() -> None:
    assert READ_BACK.search("n = counts.tolist()")
    assert READ_BACK.search("@torch.compiler.disable")


@pytest.mark.parametrize("place", MUST_NOT_IMPORT)
def test_imports_point_downward(place: str) -> None:
    banned = re.compile(MUST_NOT_IMPORT[place])
    files = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).rglob("*.py"))
    assert files
    for path in files:
        assert not [name for name in imported(path) if banned.match(name)], path


def test_files_stay_small() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path
