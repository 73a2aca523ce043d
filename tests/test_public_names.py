"""What a package exports is listed, is there, and is documented."""

import importlib
import inspect
from pathlib import Path

import pytest

import danlu

SOURCE = Path(danlu.__file__).parent
PACKAGES = sorted(
    ".".join(["danlu", *path.parent.relative_to(SOURCE).parts])
    for path in SOURCE.rglob("__init__.py")
    if path.parent != SOURCE
)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_names_and_says_what_it_is(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    names = module.__all__
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []


def undocumented(owner: object, name: str) -> list[str]:
    """Return the dotted names of an exported object, and of its public methods, that have no docstring of their own."""
    value = getattr(owner, name)
    if not (inspect.isclass(value) or inspect.isroutine(value)) or not str(value.__module__).startswith("danlu"):
        return []
    missing = [] if documented(value) else [name]
    if inspect.isclass(value):
        for member, function in vars(value).items():
            target = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
            if member.startswith("_") or not (inspect.isfunction(target) or isinstance(target, property)):
                continue
            # What a base class has already documented (nn.Module.forward aside) needs no second text.
            if not inspect.getdoc(getattr(value, member)) and member != "forward":
                missing.append(f"{name}.{member}")
    return missing


def documented(value: object) -> bool:
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    # A dataclass without a docstring is given its signature for one.
    return bool(text) and not str(text).startswith(f"{getattr(value, '__name__', '')}(")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert [missing for name in module.__all__ for missing in undocumented(module, name)] == []


def test_the_check_sees_a_missing_docstring() -> None:
    from dataclasses import dataclass

    @dataclass
    class Bare:
        size: int = 1

        def grow(self) -> None: ...

    Bare.__module__ = "danlu.example"
    holder = type("holder", (), {"Bare": Bare})
    assert undocumented(holder, "Bare") == ["Bare", "Bare.grow"]


@pytest.mark.parametrize("package", [path.parent.name for path in SOURCE.glob("*/__init__.py")])
def test_a_package_is_reached_by_its_name_and_listed(package: str) -> None:
    assert getattr(danlu, package).__name__ == f"danlu.{package}"
    assert package in dir(danlu)


def test_what_is_not_a_package_is_neither_listed_nor_reached() -> None:
    with pytest.raises(AttributeError, match="no attribute 'interop_of_tomorrow'"):
        _ = danlu.interop_of_tomorrow
    named = {name for name in dir(danlu) if not name.startswith("_")}
    assert {name for name in named if not hasattr(danlu, name)} == set()
