"""Code of one's own in several files: where it is found, what of it a run records, what is said if it is wrong."""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from danlu import recipes
from danlu.cli import main

SGD = '''
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class SGDConfig:
    lr: float = 0.1

    def build(self, model: torch.nn.Module, **others: Any) -> torch.optim.Optimizer:
        """Plain."""
        return torch.optim.SGD(model.parameters(), lr=self.lr)
'''

RECIPE = """
from dataclasses import replace

from danlu.data import TextConfig
from danlu.models import TransformerConfig
from danlu.nn import GQAConfig
from danlu.recipes import load
from danlu.train import RunConfig, TrainConfig
from {helper} import SGDConfig


def waves() -> RunConfig:
    return replace(
        load("lm-dense"),
        data=TextConfig(path=("text.txt",), vocab_size=300, length=32, batch=2),
        model=TransformerConfig(dim=32, layers=1, hidden=48, attention=GQAConfig(num_heads=2)),
        optim=SGDConfig(),
        train=TrainConfig(steps=2, eval_every=2, checkpoint_every=1, precision="float32", threads=1),
    )
"""


@pytest.fixture
def own(place: Path) -> Path:
    """``my_recipe.py`` takes its optimizer from ``helper_b.py``, ``mylab/shift.py`` has its own."""
    (place / "my_recipe.py").write_text(RECIPE.format(helper="helper_b"))
    (place / "helper_b.py").write_text(SGD)
    (place / "mylab").mkdir()
    (place / "mylab" / "shift.py").write_text(
        SGD + RECIPE.format(helper="dataclasses").replace("SGDConfig\n", "field\n", 1)
    )
    (place / "text.txt").write_text("".join(f"line {i} of the text, and {i * i % 97} more\n" for i in range(400)))
    return place


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be trained, and its code."""
    from danlu.train import run

    found: list[Any] = []
    monkeypatch.setattr(run, "train", lambda config, folder, code, **others: found.append((config, code)) or 1)
    return found


def forget(*names: str) -> None:
    for name in names:
        del sys.modules[name]


def test_the_file_that_a_component_was_imported_from_is_recorded_and_found_again(
    own: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["train", "my_recipe.py", "--out", "run"]) == 0, capfd.readouterr().err
    assert json.loads((own / "run" / "config.json").read_text())["optim"]["type"] == "helper_b:SGDConfig"
    record = json.loads((own / "run" / "code.json").read_text())
    assert [entry["given"] for entry in record] == [str(own / "my_recipe.py"), str(own / "helper_b.py")]
    assert (own / "run" / record[1]["copy"]).read_text() == SGD

    forget("my_recipe", "helper_b")
    assert main(["eval", "run", "--code", "my_recipe.py"]) == 0, "what it imports is found beside it"
    assert not [text for text in caplog.messages if "changed since" in text]
    assert "\nval_loss" in f"\n{capfd.readouterr().out}"
    forget("my_recipe", "helper_b")
    (own / "helper_b.py").write_text(SGD + "# a remark\n")
    assert main(["eval", "run", "--code", "my_recipe.py", "--code", "helper_b.py"]) == 0
    assert [text for text in caplog.messages if "helper_b.py has changed since run was made" in text]
    forget("my_recipe", "helper_b")
    assert main(["eval", "run"]) == 2
    assert "my_recipe" not in sys.modules
    assert "helper_b" not in sys.modules, "a record makes nothing run"


def test_packages_and_danlu_itself_are_no_code_of_one_s_own(own: Path, seen: list[Any], tmp_path: Path) -> None:
    assert main(["train", "lm-dense"]) == 1
    assert seen[-1][1].files == ()
    packages = own / "site-packages"
    packages.mkdir()
    (packages / "bought.py").write_text(SGD)
    sys.path.append(str(packages))
    (own / "mine.py").write_text(RECIPE.format(helper="bought"))
    assert main(["train", "mine.py"]) == 1
    assert [file.module for file in seen[-1][1].files] == ["mine"]


def test_a_file_may_import_from_the_current_folder(own: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "sub").mkdir()
    (own / "my_recipe.py").rename(own / "sub" / "main_recipe.py")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(own))])
    assert main(["train", "sub/main_recipe.py"]) == 1
    assert type(seen[-1][0].optim).__module__ == "helper_b"
    assert sys.path[-2:] == [str(own / "sub"), str(own)], "after every installed package"


def test_a_module_of_a_run_may_be_given_as_its_file(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mylab.shift", "--out", "run"]) == 0, capfd.readouterr().err
    assert json.loads((own / "run" / "config.json").read_text())["optim"]["type"] == "mylab.shift:SGDConfig"
    forget("mylab.shift")
    assert main(["eval", "run", "--code", "mylab/shift.py"]) == 0, capfd.readouterr().err
    forget("mylab.shift")
    (own / "elsewhere" / "mylab").mkdir(parents=True)
    (own / "elsewhere" / "mylab" / "shift.py").write_text(SGD)
    assert main(["eval", "run", "--code", "elsewhere/mylab/shift.py"]) == 2
    assert "is not what `import mylab.shift` finds" in capfd.readouterr().err


def test_a_renamed_file_is_told_the_name_that_it_has_to_have(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "my_recipe.py", "--out", "run"]) == 0
    forget("my_recipe", "helper_b")
    (own / "my_recipe.py").rename(own / "renamed.py")
    capfd.readouterr()
    assert main(["eval", "run", "--code", "renamed.py"]) == 2
    err = capfd.readouterr().err
    assert "the file's name has to be my_recipe.py" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("def recipe() -> RunConfig:\n{inside}\n    return replace(waves(), optim=Inner())\n", "inside recipe"),
        (
            "class Outer:\n{inside}\ndef recipe() -> RunConfig:\n    return replace(waves(), optim=Outer.Inner())\n",
            "inside Outer",
        ),
    ],
)
def test_a_class_that_its_name_does_not_lead_to_is_rejected_before_anything_is_written(
    text: str, where: str, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    inside = "".join(f"    {line}\n" for line in ("class Inner(SGDConfig):", "    pass"))
    before = sorted(path.name for path in own.rglob("*") if "__pycache__" not in path.parts)
    (own / "bad.py").write_text(RECIPE.format(helper="helper_b") + text.format(inside=inside))
    assert main(["train", "bad.py:recipe", "--out", "run"]) == 2
    err = capfd.readouterr().err
    assert f"class Inner is defined {where}, where a saved configuration cannot find it again: define it at" in err
    assert err.count("\n") == 1
    after = [path.name for path in own.rglob("*") if "__pycache__" not in path.parts and path.name != "bad.py"]
    assert sorted(after) == [name for name in before if name != "__pycache__"]


def test_a_function_bound_under_a_name_is_a_recipe_when_asked_for(own: Path, seen: list[Any]) -> None:
    (own / "bound.py").write_text("from my_recipe import waves\nrecipe = waves\n")
    assert main(["train", "bound.py:recipe"]) == 1
    config, code = seen[-1]
    assert config.recipe == "bound:recipe"
    assert [file.module for file in code.files] == ["bound", "helper_b"]


@pytest.mark.parametrize(
    ("text", "word", "message"),
    [
        ("x = 1\n", "bad.py:", "'bad.py:' names no function after the colon"),
        ("x = 1\n\0", "bad.py", "bad.py cannot be read: source code "),
        ("import broken\n", "bad.py", "bad.py fails in line 1: SyntaxError: '(' was never closed (broken.py, line 2)"),
    ],
)
def test_a_file_that_cannot_be_read_gets_one_line(
    text: str, word: str, message: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "bad.py").write_text(text)
    (place / "broken.py").write_text("\nx = (\n")
    assert main(["train", word]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "None" not in err
    assert err.count("\n") == 1


def test_a_package_s_recipe_that_clashes_is_left_out_with_one_warning(
    own: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def entry(package: str, name: str, target: str) -> Any:
        return SimpleNamespace(name=name, value=target, dist=SimpleNamespace(name=package))

    entries = [
        entry("shoplab", "lm", "shoplab.all:lm"),
        entry("shoplab", "waves", "my_recipe:waves"),
        entry("shoplab", "waves", "my_recipe:waves"),  # installed twice
        entry("shoplab", "both", "shoplab.all:both"),
        entry("another", "both", "another:both"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    recipes._warn_once.cache_clear()
    assert main(["train", "lm"]) == 1
    assert seen[-1][0] == recipes.load("lm")
    assert capfd.readouterr().err == ""
    sys.path.append(str(own))
    assert main(["train", "waves"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first == (
        "the recipe 'lm' of shoplab is left out: danlu has one of this name; run it by danlu train shoplab.all:lm"
    )
    assert "'both' of shoplab and another is left out: several packages" in second
    assert "danlu train shoplab.all:both or danlu train another:both" in second
    assert main(["recipes"]) == 0
    listed = capfd.readouterr()
    assert listed.err == ""
    assert "\nwaves " in listed.out
    assert "\nboth " not in listed.out
    assert main(["train", "both"]) == 2
    assert "no recipe is called 'both'" in capfd.readouterr().err
