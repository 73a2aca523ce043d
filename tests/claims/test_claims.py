"""Every registered method: its module, its page, and each of its quick claims measured with its control."""

import importlib
from pathlib import Path

import pytest

from danlu.claims import REGISTRY, claims, judge, methods, select

ROOT = Path(__file__).parents[2]
QUICK = [(name, claim) for name, claim in select() if not claim.slow]


@pytest.mark.parametrize(("name", "claim"), QUICK, ids=[name for name, _ in QUICK])
def test_the_claim_holds_and_its_control_is_refused(name, claim):
    result = judge(name, claim)
    assert result.verdict == "holds", result.as_dict()


@pytest.mark.parametrize("method", methods())
def test_every_method_has_claims_a_page_and_a_test_folder(method):
    assert claims(method)
    assert (ROOT / "docs" / REGISTRY[method] / f"{method}.md").is_file()
    assert (ROOT / "tests" / REGISTRY[method]).is_dir()


@pytest.mark.parametrize("method", methods())
def test_claim_names_are_unique_hyphened_words_with_a_source(method):
    module = importlib.import_module(f"danlu.claims.{method}")
    names = [claim.name for claim in module.CLAIMS]
    assert len(set(names)) == len(names)
    for claim in module.CLAIMS:
        assert claim.name == claim.name.lower()
        assert " " not in claim.name
        assert claim.source
        assert claim.seconds > 0


def test_every_claim_file_is_registered():
    folder = ROOT / "src" / "danlu" / "claims"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "frame"}
    assert files == set(REGISTRY)
