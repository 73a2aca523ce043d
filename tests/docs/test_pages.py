"""The site's navigation and the table of methods say what is true of the files."""

import re
from pathlib import Path

import pytest

from danlu.claims import REGISTRY

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAV = re.findall(r"(\S+\.md)\s*$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
METHODS = re.findall(
    r"^\| (.+?) \| `(\S+)` \| (here|in part|to come)\b.*\|$",
    (DOCS / "methods.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_the_navigation_lists_every_page_once_and_no_other():
    assert sorted(NAV) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_method_with_a_claim_is_in_the_navigation():
    assert {f"{room}/{method}.md" for method, room in REGISTRY.items()} <= set(NAV)


def test_the_table_names_all_thirty_one_methods():
    assert len(METHODS) == 31


@pytest.mark.parametrize(("method", "path", "today"), METHODS, ids=[method for method, *_ in METHODS])
def test_a_method_that_is_here_has_its_file_and_one_to_come_has_none(method, path, today):
    assert (ROOT / "src" / "danlu" / path).exists() == (today != "to come")


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_every_relative_link_of_a_page_leads_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []
