"""The examples of CONTRIBUTING.md, as a package of one's own: built and used by the public rule alone."""

import importlib
import importlib.util
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensors import gaussian

from danlu.claims import judge
from danlu.cli import main
from danlu.protocols import Context

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
FAST = ["--train.threads", "1", "--train.tensorboard", "False", "--train.device", "cpu"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The examples as files below the current folder, where nothing of danlu's checkout is."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def module(path):
    """Run a file that is in no package of the path."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_every_example_is_used_here():
    used = {"mylab/signed.py", "mylab/shift.py", "mylab/waves.py", "mylab/curve.py", "mylab/regression.py"}
    used |= {"mylab/recipes.py", "tests/optim/test_signed.py", "claims/optim/signed.py", "data/readers/fasta.py"}
    assert set(EXAMPLES) == used, "a new example of CONTRIBUTING.md is to be used in this file"
    assert TEXT.count("```python") == len(EXAMPLES), "an example begins with a comment that names its file"


def test_data_model_objective_optimizer_and_recipe_train_and_are_evaluated_resumed_and_reported(place, capsys):
    words = ["--steps", "60", "--train.eval_every", "30", "--train.checkpoint_every", "30", *FAST]
    assert main(["train", "mylab.recipes:waves", "--out", "run", *words]) == 0
    records = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["val_loss"] < 0.7 * records[0]["loss"]
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["data"]["type"] == "mylab.waves:WavesConfig"
    capsys.readouterr()
    assert main(["eval", "run", "--code", "mylab.recipes"]) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(records[-1]["val_loss"], rel=1e-5)
    assert main(["resume", "run", "--code", "mylab.recipes"]) == 0
    assert main(["report", "run"]) == 0


def test_a_mixer_and_an_optimizer_train_a_recipe_of_danlu_and_write(place, capsys):
    (place / "text.txt").write_text("".join(f"line {i} of the text, and {i * i % 97} more\n" for i in range(300)))
    small = ["--data.vocab_size", "300", "--data.length", "32", "--data.batch", "2", "--data", "text.txt"]
    small += ["--model.dim", "16", "--model.layers", "2", "--model.hidden", "24", "--steps", "2", *FAST]
    mixer = ["--model.attention", "mylab.shift:ShiftConfig", "--model.attention.share", "0.25"]
    optimizer = ["--optim", "mylab.signed:SignDescentConfig", "--optim.lr", "1e-4"]
    assert main(["train", "lm-dense", *mixer, *optimizer, *small, "--out", "run"]) == 0, capsys.readouterr().err
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["model"]["attention"] == {"type": "mylab.shift:ShiftConfig", "share": 0.25}
    assert config["optim"] == {"type": "mylab.signed:SignDescentConfig", "lr": 1e-4}
    code = ["--code", "mylab.shift", "--code", "mylab.signed"]
    assert main(["sample", "run", "--tokens", "4", *code]) == 0


def test_the_mixer_decodes_what_it_computes_at_once_and_keeps_documents_apart(place):
    shift = importlib.import_module("mylab.shift")
    layer, x = shift.ShiftConfig().build(6, out_std=0.4, index=0).double(), gaussian(2, 7, 6)
    complete = layer(x, Context())
    cache = layer.new_cache(2, 7, dtype=torch.float64, device=torch.device("cpu"))
    parts = [layer(part, Context(cache=cache)) for part in x.split((3, 1, 3), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), complete, rtol=0, atol=1e-14)
    assert cache.length == 7
    documents = torch.tensor([[4, 4, 4, 9, 9, 9, 9]] * 2)
    apart = torch.cat([layer(part, Context()) for part in x.split((3, 4), dim=1)], 1)
    torch.testing.assert_close(layer(x, Context(documents=documents)), apart, rtol=0, atol=1e-14)


def test_data_are_the_same_for_any_number_of_processes(place):
    config = importlib.import_module("mylab.waves").WavesConfig(batch=4)
    one = next(config.open(seed=3, rank=0, world=1).train)["x"]
    two = [next(config.open(seed=3, rank=rank, world=2).train)["x"] for rank in range(2)]
    assert torch.equal(torch.cat(two), one)


def test_the_reader_reads(place):
    read = module(place / "data" / "readers" / "fasta.py").read
    file = io.BytesIO(b">one x\nACG\nT\n>two\nGG\n")
    documents = read(Path("a.fasta"), file, field="text", errors="strict", skipped=Counter())
    assert list(documents) == [("a.fasta: one x", "ACGT"), ("a.fasta: two", "GG")]


def test_the_test_passes_and_the_claim_holds(place):
    tests = vars(module(place / "tests" / "optim" / "test_signed.py"))
    found = [function for name, function in tests.items() if name.startswith("test_")]
    for function in found:
        function()
    assert found
    (claim,) = module(place / "claims" / "optim" / "signed.py").CLAIMS
    assert judge("optim/signed/step-size", claim).verdict == "holds"
