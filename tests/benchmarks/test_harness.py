"""What the benchmarks' figures mean: ratios inside a round, slopes, peak memory, and the order of the rounds."""

import ast
import graphlib
import math
from pathlib import Path

import pytest
import torch
from benchmarks import harness, measured

ROOT = Path(__file__).parents[2]


def imports(path):
    """The benchmarks' modules that a file of them imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            yield node.module.split(".")[1]


def test_no_two_modules_of_the_benchmarks_import_one_another():
    graph = {path.stem: set(imports(path)) for path in (ROOT / "benchmarks").glob("*.py")}
    assert "measured" in graph["harness"]
    graphlib.TopologicalSorter(graph).prepare()  # raises on a circle, and names it


def test_a_ratio_is_taken_inside_each_round():
    table = harness.Comparison(title="", base="a", seconds={"a": [1.0, 10.0, 4.0], "b": [0.5, 5.0, 1.0]})
    ratio = table.ratio("b")
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 3.0)
    assert table.ratio("a").median == 1.0


def test_rounds_alternate_the_implementations():
    order = []
    options = harness.Options(rounds=3, warmup=1, seconds=0.0)
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    table = harness.compare("order", runs, base="a", options=options)
    assert "".join(order[-6:]) == "ababab"
    assert {name: len(values) for name, values in table.seconds.items()} == {"a": 3, "b": 3}


def test_a_base_that_does_not_run_is_rejected():
    with pytest.raises(ValueError, match="base must be one of a"):
        harness.compare("", {"a": lambda: None}, base="c", options=harness.Options())


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_the_slope_of_a_power_law_is_its_exponent(power):
    sizes, slope = [3, 7, 19, 64], measured.loglog_slope
    assert slope(sizes, [5.0 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)
    assert math.isnan(slope(sizes, [None, None, None, 2.0]))


def test_a_sweep_leaves_a_gap_where_an_implementation_was_left_out():
    options = harness.Options(rounds=1, warmup=1, seconds=0.0)

    def make(size):
        runs = {"always": lambda: None}
        return runs if size == 2 else {**runs, "sometimes": lambda: None}

    result = harness.sweep("gaps", [1, 2, 3], make, options=options, memory=False)
    assert [value is None for value in result.seconds["sometimes"]] == [False, True, False]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is reset on Linux only")
def test_peak_memory_counts_what_a_call_holds_at_once():
    elements = 8 * 2**20

    def both_at_once():
        first = torch.ones(elements)
        return first + torch.ones(elements)

    def one_after_the_other():
        torch.ones(elements)
        torch.ones(elements)

    size = 4 * elements
    assert harness.peak_memory(both_at_once) == pytest.approx(3 * size, rel=0.1)
    assert harness.peak_memory(one_after_the_other) == pytest.approx(size, rel=0.1)
