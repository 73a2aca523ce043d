"""What fields mean is read from where it is written, and every option of every recipe has a meaning."""

from dataclasses import dataclass

import pytest

from danlu.config import Draft, describe
from danlu.recipes import REGISTRY, load


@dataclass(frozen=True)
class Documented:
    """Both forms.

    Attributes:
        first: what it is,
            over two lines.
        second, third: shared.

    Raises:
        fourth: not a field's meaning.
    """

    first: int = 0
    second: int = 0
    third: int = 0
    fourth: int = 0
    """under the field;
    on two lines."""
    fifth: int = 0


def test_sections_and_strings_under_fields_are_read() -> None:
    assert describe(Documented) == {
        "first": "what it is, over two lines",
        "second": "shared",
        "third": "shared",
        "fourth": "under the field; on two lines",
    }


@pytest.mark.parametrize("name", REGISTRY)
def test_every_option_of_a_recipe_has_a_meaning(name: str) -> None:
    spots = Draft.of(load(name)).spots()
    missing = {f"{cls.__name__}.{field}" for *_, (cls, field) in spots if field not in describe(cls)}
    assert not missing, "write it into the class's Attributes: section, or as a string under the field"
