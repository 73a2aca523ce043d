"""The mutation tool on a tree of one method: what a test holds is noticed, and what none holds survives."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
SOURCE = '''"""A method."""
from danlu._validate import positive


def area(width: float, height: float = 2.0) -> float:
    """Return it.

    >>> 1 + 1
    2
    """
    positive("width", width + 0)
    if width > 1e9:
        raise ValueError(f"width {width - 1}")
    return width * height


def half(x: float) -> float:
    return x / 2
'''
TEST = """
from danlu.approx.area import area
def test_the_area_is_the_product():
    assert area(3.0, 5.0) == 15.0
"""


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", TOOLS / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


def test_only_lines_that_compute_are_changed(mutants):
    found = mutants.candidates("approx/area.py", SOURCE)
    changed = {mutants.apply(SOURCE, mutant).replace(SOURCE[: mutant.start], "", 1) for mutant in found}
    assert {(mutant.where, mutant.operator, mutant.text) for mutant in found} == {
        ("area", "operator", "(width / height)"),
        ("area", "factor dropped", "width"),
        ("area", "factor dropped", "height"),
        ("half", "operator", "(x * 2)"),
        ("half", "factor dropped", "x"),
        ("half", "constant", "3"),
        ("half", "constant", "1"),
    }
    assert len(changed) == len(found)


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("y = -x", ["x"]),
        ("y = x.sum(dim=-1)", ["x.mean(dim=-1)", "-2", "0", "(-2)"]),
        ("y = a if x < 0 else b", ["a", "b", "(x <= 0)", "(x > 0)", "1"]),
        ("y = (a + b) * 0.5", ["((a + b) / 0.5)", "(a + b)", "0.5", "(a - b)", "a", "b", "0.55"]),
        ("y = x ** 2 + 1e-12", ["(x ** 2 - 1e-12)", "(x ** 2)", "1e-12", "x", "1", "3", "0.0"]),
        ("y = torch.where(c, a, b)", ["torch.where(c, b, a)"]),
        ("y = x.detach() if x.requires_grad else x", ["x"]),
        ("with torch.no_grad():\n        y = x", ["torch.enable_grad()"]),
        ("x += y", ["pass", "x -= y"]),
        ("y = x[1:n]", [":n", "1:", "0", "2"]),
    ],
)
def test_the_changes_of_a_line(mutants, line, texts):
    found = mutants.candidates("f.py", f"def f():\n    {line}\n")
    assert {mutant.text for mutant in found} == set(texts)


def test_one_seed_gives_one_list_which_a_change_elsewhere_in_the_file_leaves(mutants, tmp_path):
    (tmp_path / "a.py").write_text(SOURCE, encoding="utf-8")

    def names(seed, count=4):
        return [mutant.id for mutant in mutants.choose(tmp_path, ["a.py"], seed=seed, count=count)]

    first = names(0)
    assert names(0) == first
    assert len(first) == 4
    assert any(names(seed) != first for seed in range(1, 5))
    (tmp_path / "a.py").write_text(
        SOURCE.replace('"""A method."""', '"""A method.\n\nOf one line.\n"""'), encoding="utf-8"
    )
    assert names(0) == first


def test_what_a_test_holds_is_noticed_and_the_rest_survives_until_it_is_declared_equal(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(TOOLS, tree / "tools", ignore=shutil.ignore_patterns("__pycache__", "equivalent.toml"))
    for name, text in {
        "src/danlu/__init__.py": "",
        "src/danlu/_validate.py": "def positive(name, value): ...\n",
        "src/danlu/approx/__init__.py": "",
        "src/danlu/approx/area.py": SOURCE,
        "tests/approx/test_area.py": TEST,
        "tools/equivalent.toml": "",
        "pyproject.toml": "",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    results = tree / "results.jsonl"

    def run():
        command = [sys.executable, str(tree / "tools" / "mutate.py"), "--results", str(results), "--count", "7"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout

    out = run()
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    records = [record for record in lines if record["by"] == "tests"]
    killed = [record for record in records if record["killed"]]
    assert len(records) == 7
    assert {record["killed"] for record in killed} == {"tests/approx/test_area.py::test_the_area_is_the_product"}
    assert len(killed) == 3, out
    assert "without a change already" not in out
    assert (tree / "src/danlu/approx/area.py").read_text(encoding="utf-8") == SOURCE
    survivors = [record["id"] for record in records if not record["killed"]]
    (tree / "tools" / "equivalent.toml").write_text(f'"{survivors[0]}" = "because"\n', encoding="utf-8")
    out = run()
    assert results.read_text(encoding="utf-8").count("\n") == len(lines), "known results are tried once"
    assert survivors[0] not in out
    assert all(name in out for name in survivors[1:])
