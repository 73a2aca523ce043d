"""Imports go down: a room imports itself and the rooms on lower floors, and importing danlu loads nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import danlu

SOURCE = Path(danlu.__file__).parent
FLOORS = {
    "_cache": -1,
    "_validate": -1,
    "_grid": 0,
    "_roles": 0,
    "config": 0,
    "usercode": 0,
    "protocols": 0,
    "approx": 1,
    "linalg": 2,
    "optim": 3,
    "nn": 3,
    "distributions": 3,
    "diffusion": 3,
    "analysis": 3,
    "models": 4,
    "data": 4,
    "objectives": 5,
    "train": 6,
    "evaluation": 7,
    "report": 8,
    "recipes": 9,
    "claims": 9,
    "cli": 10,
    "__main__": 11,
}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path, source: str) -> Iterator[str]:
    """Yield the absolute name of every module a file imports, at any depth of the code."""
    # A module's own package is what a relative import starts from.
    package = ["danlu", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from danlu import optim` imports a room by its alias.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def climbs(path: Path, source: str) -> list[str]:
    """Return the imports of a file that do not go down."""
    room = room_of(path)
    found = []
    for name in imported_modules(path, source):
        parts = name.split(".")
        if parts[0] != "danlu" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        if parts[1] != room and FLOORS.get(parts[1], 99) >= FLOORS[room]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_room_imports_only_lower_floors(path: Path) -> None:
    assert room_of(path) in FLOORS, "a new room needs its floor here and in CONTRIBUTING.md"
    assert climbs(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted((SOURCE / "approx").rglob("*.py")), ids=lambda path: path.name)
def test_approx_knows_no_torch(path: Path) -> None:
    assert not [name for name in imported_modules(path, path.read_text("utf-8")) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("linalg", "from danlu.optim import Muon"),
        ("nn", "import danlu.optim.muon"),
        ("optim", "from danlu import train"),
        ("models", "from ..train import run"),
        ("data", "def late():\n    from danlu.objectives import CausalLM"),
    ],
)
def test_the_check_sees_every_form_of_an_import_that_climbs(room: str, line: str) -> None:
    assert climbs(SOURCE / room / "example.py", line)


@pytest.mark.parametrize("line", ["from danlu.linalg import msign", "import torch", "from .muon import Muon"])
def test_the_check_lets_imports_go_down(line: str) -> None:
    assert climbs(SOURCE / "optim" / "example.py", line) == []


def loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split("\n")[-2].split())


HEAVY = {"torch", "numpy", "scipy", "matplotlib", "tensorboard", "tokenizers", "transformers", "rich"}


def test_importing_danlu_loads_nothing_heavy() -> None:
    assert not loaded_by("import danlu") & HEAVY


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["sample", "--help"], ["trian"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    assert not loaded_by(f"from danlu.cli import main\nmain({words})") & HEAVY


def test_the_list_of_recipes_and_of_claims_needs_no_torch() -> None:
    code = "from danlu.cli import main\nmain(['recipes'])\nimport danlu.claims"
    assert "torch" not in loaded_by(code)
