"""The script for one GPU runs whole, small and on a CPU: it must not fail where a GPU is at hand for ten minutes."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu():
    """Import the benchmarks from the checkout: they are no part of the installed package."""
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.gpu")
    finally:
        sys.path.remove(str(ROOT))


def test_the_small_form_measures_everything(gpu, capsys):
    gpu.main(["--tiny", "--device", "cpu"])
    said = capsys.readouterr().out
    for what in ("tokens/s", "MFU", "Muon's share of a step", "decoding, 1 row", "decoding, 16 rows"):
        assert said.count(f"| {what}") == 2
    assert said.count("| resumed run equal bit for bit | yes |") == 2


def test_the_models_have_the_sizes_that_they_are_called_by(gpu):
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in case.model.build().parameters()) for case in gpu.CASES]
    assert sizes[0] == pytest.approx(124e6, rel=0.01)
    assert sizes[1] == pytest.approx(300e6, rel=0.05)
