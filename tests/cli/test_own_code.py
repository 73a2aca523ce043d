"""Recipes and components of one's own, from the shell: trained, resumed, sampled, evaluated, reported."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from danlu import recipes
from danlu.cli import main

OWN = '''
"""Attention of which a share is added, and recipes that use it."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from danlu.data import TextConfig
from danlu.models import TransformerConfig
from danlu.nn import GQAConfig
from danlu.recipes import load
from danlu.train import RunConfig, TrainConfig
from my_helper import SHARE


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """A share of attention.

    Attributes:
        share: how much of it is added.
    """

    share: float = SHARE

    def build(self, dim: int, **others: Any) -> nn.Module:
        return Share(self.share, GQAConfig(num_heads=2).build(dim, **others))


class Share(nn.Module):
    def __init__(self, share: float, inner: Any) -> None:
        super().__init__()
        self.share, self.inner = share, inner
        self.rope_dim, self.mask, self.num_heads = inner.rope_dim, inner.mask, inner.num_heads
        self.new_cache, self.flops_per_token = inner.new_cache, inner.flops_per_token

    def forward(self, x: Tensor, context: Any) -> Tensor:
        return self.share * self.inner(x, context)


def smooth() -> RunConfig:
    """Trained on little."""
    return replace(
        load("lm-dense"),
        data=TextConfig(path=("text.txt",), vocab_size=300, length=32, batch=2),
        model=TransformerConfig(dim=32, layers=2, hidden=48, attention=ShareConfig()),
        train=TrainConfig(steps=4, eval_every=2, checkpoint_every=2, precision="float32", threads=1),
    )


def plain() -> RunConfig:
    return replace(smooth(), model=TransformerConfig(dim=32, layers=2, hidden=48, attention=GQAConfig(num_heads=2)))
'''


def forget(*names: str) -> None:
    for name in names:
        del sys.modules[name]


@pytest.fixture
def own(place: Path) -> Path:
    (place / "my_recipe.py").write_text(OWN)
    (place / "my_helper.py").write_text("SHARE = 0.5\n")
    (place / "text.txt").write_text("".join(f"line {i} of the text, and {i * i % 97} more\n" for i in range(400)))
    return place


def test_a_run_of_one_s_own_code_goes_all_the_way(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", "run", "my_recipe.py:smooth", "--model.attention.share", "0.25"]) == 0
    config = json.loads((own / "run" / "config.json").read_text())
    assert config["recipe"] == "my_recipe:smooth"
    assert config["model"]["attention"] == {"type": "my_recipe:ShareConfig", "share": 0.25}
    assert config["data"]["path"] == [str(own / "text.txt")]
    (record,) = json.loads((own / "run" / "code.json").read_text())
    assert record["given"] == str(own / "my_recipe.py")
    assert (own / "run" / record["copy"]).read_text() == OWN
    assert not (own / "__pycache__").exists() or not list((own / "__pycache__").glob("my_recipe*"))

    forget("my_recipe", "my_helper")
    assert f"More: danlu sample run --code {own / 'my_recipe.py'}" in capsys.readouterr().out
    for command in ("resume", "sample", "eval"):
        assert main([command, "run"]) == 2
        said = capsys.readouterr().err
        assert f"danlu {command} run --code {own / 'my_recipe.py'}" in said
        assert said.count("\n") == 1
    assert "my_recipe" not in sys.modules
    shutil.rmtree(own / "run" / "checkpoints" / "step-00000004")
    for command in (["resume"], ["sample", "--tokens", "5"], ["eval"], ["report"]):
        assert main([command[0], "run", *command[1:], "--code", "my_recipe.py"]) == 0, capsys.readouterr().err
        forget("my_recipe", "my_helper") if "my_recipe" in sys.modules else None
    losses = [json.loads(line)["step"] for line in (own / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == [1, 2, 3, 4]


def test_code_that_has_changed_is_used_with_a_warning(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["train", "my_recipe.py:smooth", "--out", "run"]) == 0
    forget("my_recipe")
    (own / "my_recipe.py").write_text(OWN + "\n# a remark\n")
    assert main(["eval", "run", "--code", "my_recipe.py"]) == 0
    assert [record.getMessage() for record in caplog.records if "changed since" in record.getMessage()]


def test_a_component_of_one_s_own_is_chosen_by_name_in_a_recipe_of_danlu(own: Path) -> None:
    small = ["--data.vocab_size=300", "--data.length=32", "--data.batch=2", "--model.dim=32", "--model.layers=1"]
    loop = ["--steps=1", "--train.precision=float32", "--train.threads=1", "--data", "text.txt"]
    words = ["lm-dense", *small, "--model.hidden=48", *loop, "--model.attention.share=0.125"]
    assert main(["train", *words, "--model.attention", "my_recipe.py:ShareConfig", "--out", "run"]) == 0
    config = json.loads((own / "run" / "config.json").read_text())
    assert config["model"]["attention"] == {"type": "my_recipe:ShareConfig", "share": 0.125}
    forget("my_recipe")
    assert main(["eval", "run", "--code", "my_recipe.py"]) == 0
    assert main(["train", "--config", "run/config.json", "--code", "my_recipe.py", "--out", "again"]) == 0
    again = json.loads((own / "again" / "config.json").read_text())
    assert again == config
    assert (own / "again" / "code.json").is_file()


def test_help_and_show_know_the_options_of_one_s_own_code(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "my_recipe.py:smooth"]) == 0
    assert "--model.attention.share" in (shown := capsys.readouterr().out)
    assert "how much of it is added" in shown
    assert "my_recipe:ShareConfig" in shown


def test_a_module_is_found_in_the_current_folder(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "mylab").mkdir()
    (own / "mylab" / "runs.py").write_text("from danlu.recipes import load\ndef tiny():\n    return load('lm-dense')\n")
    assert main(["show", "mylab.runs:tiny", "--format", "json"]) == 0
    assert main(["show", "mylab.runs", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "}")["recipe"] == "mylab.runs:tiny"


def test_a_configuration_file_is_trained_and_a_part_of_one_changes_a_recipe(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from danlu.train import run

    seen: list[Any] = []
    monkeypatch.setattr(run, "train", lambda config, folder, **others: seen.append((config, folder)) or 1)
    (place / "part.json").write_text('{"train": {"seed": 5}, "model": {"attention": {"type": "MLAConfig"}}}')
    assert main(["train", "lm-dense", "--config", "part.json", "--train.steps", "9"]) == 1
    config = seen[-1][0]
    assert (config.train.seed, config.train.steps, config.recipe) == (5, 9, "lm-dense")
    assert type(config.model.attention).__name__ == "MLAConfig"
    assert config.model.dim == recipes.load("lm-dense").model.dim

    from danlu.config import dumps

    (place / "run.json").write_text(dumps(config))
    assert main(["train", "--config", "run.json", "--seed", "6"]) == 1
    assert seen[-1][0].train.seed == 6
    assert seen[-1][0].model == config.model
    assert seen[-1][1] == Path("runs") / "lm-dense-1"
    (place / "run.json").write_text(dumps(config).replace('"lm-dense"', '"../../etc"'))
    assert main(["train", "--config", "run.json"]) == 1
    assert seen[-1][1] == Path("runs") / "etc-1", "a file does not choose a folder outside of runs/"


@pytest.mark.parametrize(
    ("text", "word", "message"),
    [
        ("def r():\n    x = 1\n    return 1 / 0\n", "bad.py", "bad.py:r fails in line 3: ZeroDivisionError: division"),
        ("def r():\n    return 3\n", "bad.py", "bad.py:r must return a RunConfig, got int"),
        ("def r():\n    return 3\n", "bad.py:q", "bad has no function 'q'"),
        ("def r(x):\n    return 3\n", "bad.py:r", "must be a function without arguments"),
        ("x = 3\n", "bad.py", "no function without arguments that returns a RunConfig"),
        ("x = 3\n", "bad.py:x", "bad.py:x is no function"),
        ("def a(): ...\ndef b(): ...\n", "bad.py", "several recipes; choose one: bad.py:a, bad.py:b"),
        ("x = (\n", "bad.py", "bad.py cannot be read: line 1"),
        ("\n\nimport nowhere\n", "bad.py", "bad.py fails in line 3: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", "bad.py", "calls sys.exit when it is loaded"),
        ("", "bad2.py", "there is no file bad2.py"),
        ("", "no.such.module:f", "there is no module 'no'"),
        ("", "bad", "did you mean"),
    ],
)
def test_a_recipe_that_is_wrong_gets_one_line_and_leaves_nothing(
    text: str, word: str, message: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "bad.py").write_text(text)
    assert main(["train", word]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err or message == "did you mean"
    assert [path.name for path in place.iterdir()] == ["bad.py"]


@pytest.mark.parametrize("name", ["json", "torch", "danlu", "antigravity"])
def test_a_file_with_the_name_of_an_installed_module_is_rejected(
    name: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / f"{name}.py").write_text("def recipe():\n    return 3\n")
    assert main(["train", f"{name}.py"]) == 2
    assert f"{name}.py has the name of the installed module {name!r}; rename the file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"type": "antigravity:fly"}}, "import 'antigravity' yourself"),
        ({"model": {"attention": {"type": "Latnet"}}}, "model.attention.type must be one of"),
        ({"model": {"dmi": 3}}, "unknown key 'model.dmi'; did you mean 'model.dim'?"),
        ({"format": 99}, "part.json has format 99"),
        ([3], "part.json must hold a JSON object"),
    ],
)
def test_a_configuration_file_that_is_wrong_gets_one_line(
    tree: Any, message: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "part.json").write_text(json.dumps(tree))
    assert main(["train", "lm-dense", "--config", "part.json"]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert "antigravity" not in sys.modules
    assert [path.name for path in place.iterdir()] == ["part.json"]


def test_a_part_without_a_recipe_says_how_to_give_one(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "part.json").write_text('{"train": {"seed": 5}}')
    assert main(["train", "--config", "part.json"]) == 2
    assert "danlu train RECIPE --config part.json" in capfd.readouterr().err


def test_installed_packages_register_recipes(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def registered(name: str) -> None:
        entry = importlib.metadata.EntryPoint(name, "my_recipe:plain", "danlu.recipes")
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])

    monkeypatch.syspath_prepend(str(own))
    registered("smooth-lm")
    assert main(["recipes"]) == 0
    assert "smooth-lm" in capsys.readouterr().out
    assert main(["show", "smooth-lm", "--format", "json"]) == 0


def test_recipes_are_read_from_their_folder_and_language_models_come_first() -> None:
    names = list(recipes.REGISTRY)
    assert names[:2] == ["lm", "lm-dense"]
    assert all(recipe.summary for recipe in recipes.REGISTRY.values())
    groups = [name.partition("-")[0] for name in names]
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index), "those of one kind stand together"


def test_no_two_components_of_a_place_have_one_name() -> None:
    from danlu.config import hints_of, place, short_name
    from danlu.train import RunConfig

    for name, hint in hints_of(RunConfig).items():
        names = [short_name(cls) for cls in place(hint).known().values()]
        assert len(names) == len(set(names)), name
    assert "adamw" in [short_name(cls) for cls in place(hints_of(RunConfig)["optim"]).known().values()]
