"""Imports go down: a package imports itself and packages on lower levels, and importing danlu loads nothing heavy."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import danlu

SOURCE = Path(danlu.__file__).parent
LEVELS = {
    "_cache": -1,
    "_validate": -1,
    "_grid": 0,
    "_autograd": 0,
    "_draws": 0,
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


def package_of(path: Path) -> str:
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
            # `from danlu import optim` imports a package by its alias.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def climbs(path: Path, source: str) -> list[str]:
    """Return the imports of a file that do not go down."""
    own = LEVELS[package_of(path)]
    found = []
    for name in imported_modules(path, source):
        parts = name.split(".")
        if parts[0] != "danlu" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        if parts[1] != package_of(path) and LEVELS.get(parts[1], 99) >= own:
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_package_imports_only_lower_levels(path: Path) -> None:
    package = package_of(path)
    assert package in LEVELS, f"add {package!r} with its level to LEVELS in {Path(__file__).name}"
    found = climbs(path, path.read_text(encoding="utf-8"))
    assert not found, f"{package} is on level {LEVELS[package]}; move what needs {', '.join(found)} to a higher package"


def test_contributing_shows_the_levels() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {
        package: int(level)
        for level, packages in re.findall(r"^\| (\d+) \| (`.*) \|$", text, re.MULTILINE)
        for package in re.findall(r"`(\w+)`", packages)
    }
    expected = {package: level for package, level in LEVELS.items() if level > 0 and package != "__main__"}
    assert shown == expected, "bring the table of levels in CONTRIBUTING.md up to date"


@pytest.mark.parametrize("path", sorted((SOURCE / "approx").rglob("*.py")), ids=lambda path: path.name)
def test_approx_knows_no_torch(path: Path) -> None:
    assert not [name for name in imported_modules(path, path.read_text("utf-8")) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("linalg", "from danlu.optim import Muon"),
        ("nn", "import danlu.optim.muon"),
        ("optim", "from danlu import train"),
        ("models", "from ..train import run"),
        ("data", "def late():\n    from danlu.objectives import CausalLM"),
    ],
)
def test_the_check_sees_every_form_of_an_import_that_climbs(package: str, line: str) -> None:
    assert climbs(SOURCE / package / "example.py", line)


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
