"""Every method with claims: its page, its test, and each of its quick claims measured with its control."""

from pathlib import Path

import pytest

from danlu.claims import claims, judge, methods, select

ROOT = Path(__file__).parents[2]
QUICK = [(name, claim) for name, claim in select() if not claim.slow]


@pytest.mark.parametrize(("name", "claim"), QUICK, ids=[name for name, _ in QUICK])
def test_the_claim_holds_and_its_control_is_rejected(name, claim):
    result = judge(name, claim)
    assert result.verdict == "holds", result.as_dict()


def lacks(method: str, root: Path = ROOT) -> list[str]:
    """Return what is to be written for a method that has a claim."""
    package, _, name = method.partition("/")
    tests = root / "tests" / package
    todo = []
    if not (root / "docs" / package / f"{name}.md").is_file():
        todo.append(f"write the page docs/{method}.md")
    # A method of several files has a folder of tests.
    if not [*tests.rglob(f"test_{name}.py"), *tests.glob(f"{name}/test_*.py")]:
        todo.append(f"write tests/{package}/test_{name}.py")
    return todo


@pytest.mark.parametrize("method", methods())
def test_every_method_has_claims_a_page_and_a_test(method):
    assert claims(method)
    assert not lacks(method), "; ".join(lacks(method))


def test_a_method_without_page_and_test_is_told_what_to_write(tmp_path):
    assert lacks("optim/mine", tmp_path) == [
        "write the page docs/optim/mine.md",
        "write tests/optim/test_mine.py",
    ]
    (tmp_path / "tests" / "optim").mkdir(parents=True)
    (tmp_path / "tests" / "optim" / "test_other.py").touch()
    assert "write tests/optim/test_mine.py" in lacks("optim/mine", tmp_path)


@pytest.mark.parametrize("method", methods())
def test_claim_names_are_unique_hyphened_words_with_a_source(method):
    found = claims(method)
    names = [claim.name for claim in found]
    assert len(set(names)) == len(names)
    for claim in found:
        assert claim.name == claim.name.lower()
        assert " " not in claim.name
        assert claim.source
        assert claim.seconds > 0
