"""Editing a configuration: what is not changed stays, what is changed is checked once."""

from dataclasses import dataclass

import pytest

from danlu.config import Draft


@dataclass(frozen=True)
class Model:
    dim: int = 8
    heads: int = 2

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")


@dataclass(frozen=True)
class Needy:
    width: int


@dataclass(frozen=True)
class Run:
    model: Model = Model()
    blocks: tuple[Model | None, ...] = (Model(), None)
    other: Model | Needy = Model()


def test_what_is_not_changed_is_the_same_object() -> None:
    run = Run()
    draft = Draft.of(run)
    assert draft.build() is run
    draft.set("model.dim", 16)
    built = draft.build()
    assert built.model == Model(dim=16)
    assert built.other is run.other


def test_options_that_only_fit_together_may_be_set_in_any_order() -> None:
    for order in (("dim", "heads"), ("heads", "dim")):
        draft = Draft.of(Run())
        for name in order:
            draft.set(f"model.{name}", {"dim": 9, "heads": 3}[name])
        assert draft.build().model == Model(dim=9, heads=3)


def test_what_a_class_rejects_is_said_with_its_path() -> None:
    draft = Draft.of(Run())
    draft.set("blocks.0.dim", 9)
    with pytest.raises(ValueError, match=r"blocks\.0: dim must be a multiple of heads, got 9 and 2"):
        draft.build()


def test_a_section_of_several_is_reached_by_its_number() -> None:
    draft = Draft.of(Run())
    draft.set("blocks.1", Draft(Model, {"dim": 4}))
    draft.set("blocks.0.dim", 6)
    assert draft.build().blocks == (Model(dim=6), Model(dim=4))
    with pytest.raises(KeyError):
        draft.set("blocks.2.dim", 6)


def test_a_section_that_needs_a_value_says_which() -> None:
    draft = Draft.of(Run())
    draft.set("other", Draft(Needy, {}))
    with pytest.raises(ValueError, match=r"other\.width is missing"):
        draft.build()
    draft.set("other.width", 3)
    assert draft.build().other == Needy(3)
