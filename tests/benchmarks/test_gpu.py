"""The script for one GPU runs whole, small and on a CPU: it must not fail where a GPU is at hand for ten minutes."""

import pytest
import torch
from benchmarks import gpu


def test_the_small_form_measures_everything(capsys):
    gpu.main(["--tiny", "--device", "cpu"])
    said = capsys.readouterr().out
    for what in ("tokens/s", "MFU", "Muon's share of a step", "decoding, 1 row", "decoding, 16 rows"):
        assert said.count(f"| {what}") == 2
    assert said.count("| resumed run equal bit for bit | yes |") == 2


def test_the_models_have_the_sizes_that_they_are_called_by():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in case.model.build().parameters()) for case in gpu.CASES]
    assert sizes[0] == pytest.approx(124e6, rel=0.01)
    assert sizes[1] == pytest.approx(300e6, rel=0.05)
