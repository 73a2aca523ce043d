"""What the words of a command line change in a recipe, what they are answered with, and how options are listed."""

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from danlu import recipes
from danlu.cli import main
from danlu.cli.listing import table
from danlu.cli.overrides import apply
from danlu.cli.parser import parse


@dataclass(frozen=True, kw_only=True)
class Silent:
    width: int = 3


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """Sizes of a :class:`~danlu.nn.GQA` with ``width``."""

    width: int = 3
    """as :func:`danlu.optim.shape_scale` has it, or ``auto``"""
    bells: int = 1
    renamed: ClassVar[dict[str, str]] = {"chimes": "bells"}


@dataclass(frozen=True, kw_only=True)
class Root:
    silent: Silent = field(default_factory=Silent)
    spoken: Spoken = field(default_factory=Spoken)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that would be trained."""
    from danlu.train import run

    found: list[Any] = []
    monkeypatch.setattr(run, "train", lambda config, folder, **others: found.append(config) or 1)
    return found


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({"minutes": 2}, (None, 2)),
        ({"steps": 50}, (50, None)),
        ({"steps": 50, "minutes": 2}, (50, 2)),
        ({"seed": 1}, (600, 8)),
        ({"minutes": None}, (600, None)),
    ],
)
def test_a_length_takes_back_the_recipe_s_other_in_a_file_as_on_the_command_line(
    given: dict[str, int | None], length: tuple[Any, Any], place: Path, seen: list[Any]
) -> None:
    recipe = replace(recipes.load("lm"), train=replace(recipes.load("lm").train, steps=600, minutes=8))
    words = [f"--train.{name}={'none' if value is None else value}" for name, value in given.items()]
    from_words = apply(recipe, words).train
    assert (from_words.steps, from_words.minutes) == length

    (place / "recipe.json").write_text(json.dumps({"train": {"steps": 600, "minutes": 8}}))
    (place / "part.json").write_text(json.dumps({"train": given}))
    assert (recipes.load("lm").train.steps, recipes.load("lm").train.minutes) == (600, 8)
    assert main(["train", "lm", "--config", "part.json"]) == 1
    assert (seen[-1].train.steps, seen[-1].train.minutes) == length
    assert main(["train", "lm", "--config", "recipe.json", "--minutes", "3"]) == 1
    assert (seen[-1].train.steps, seen[-1].train.minutes) == (None, 3)


@pytest.mark.parametrize("swap", [False, True])
def test_an_old_and_a_new_name_together_are_rejected(swap: bool) -> None:
    words = ["--spoken.chimes=2", "--spoken.bells=3"]
    with pytest.raises(ValueError, match=r"^--spoken\.chimes is the old name of --spoken\.bells, and both are given$"):
        apply(Root(), words[::-1] if swap else words)
    assert apply(Root(), ["--spoken.chimes=2", "--spoken.chimes=4"]).spoken.bells == 4, "of two alike the last"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--chimes", "2"], "did you mean --spoken.bells?"),
        (["--silent.chimes", "2"], "did you mean --spoken.bells?"),
    ],
)
def test_an_option_is_found_by_the_name_that_it_had(words: list[str], part: str) -> None:
    with pytest.raises(ValueError) as caught:
        apply(Root(), words)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model.heads", "4"], "did you mean --model.attention.num_heads?"),
        (["--model.num_heads", "4"], "did you mean --model.attention.num_heads?"),
        (["--model.attention", "mha"], "did you mean 'gqa'? Its num_kv_heads: "),
        (["--model.attention", "mqa"], "did you mean 'gqa'? Its num_kv_heads: "),
        (["--model.attention", "mal"], "did you mean 'mla'?"),
    ],
)
def test_what_people_call_it_elsewhere_is_answered_with_what_it_is_here(words: list[str], part: str) -> None:
    with pytest.raises(ValueError) as caught:
        apply(recipes.load("lm-dense"), words)
    assert part in str(caught.value)


def test_resume_takes_the_options_of_a_configuration_behind_its_folder() -> None:
    arguments = parse(["resume", "runs/lm-1", "--steps", "100", "--data", "a", "b"])
    assert (arguments.folder, arguments.overrides, arguments.data) == ("runs/lm-1", ["--steps", "100"], ["a", "b"])
    with pytest.raises(ValueError, match=r"danlu resume takes one run, got 'a' and 'b'"):
        parse(["resume", "a", "b"])
    with pytest.raises(ValueError, match=r"did you mean --batches\?"):
        parse(["eval", "runs/lm-1", "--batch", "100"])


def test_options_are_listed_without_markup_and_without_signatures() -> None:
    text = "\n".join(table(Root()))
    assert "silent: Silent.\n" in text
    assert "spoken: Spoken. Sizes of a GQA with width." in text
    assert " as danlu.optim.shape_scale has it, or auto\n" in text
    for name in ("lm", "digits-ddpm"):
        listed = "\n".join(table(recipes.load(name)))
        assert "`" not in listed
        assert ":class:" not in listed
        assert ":func:" not in listed


def test_a_warning_is_printed_once_in_a_command(capfd: pytest.CaptureFixture[str]) -> None:
    from danlu import cli

    log = logging.Logger("danlu.test")
    lines = cli._Lines()
    log.addHandler(lines)
    for _ in range(2):
        log.warning("old names, read for one release: heads")
        log.info("step")
    assert capfd.readouterr().err.splitlines() == ["old names, read for one release: heads", "step", "step"]
    logging.getLogger("danlu").addHandler(lines)
    try:
        assert main(["recipes"]) == 0
        assert lines.warned == set(), "the next command warns again"
    finally:
        logging.getLogger("danlu").removeHandler(lines)
