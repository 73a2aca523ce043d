"""The table of methods says what is true of the files, and links lead to files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TABLE = (DOCS / "methods.md").read_text(encoding="utf-8")
METHODS = re.findall(r"^\| (.+?) \| `(\S+)` \| (here|in part|to come)\b.*\|$", TABLE, re.MULTILINE)


def test_every_row_of_the_table_is_understood():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    assert len(METHODS) == len(rows), "a row is: | [name](package/method.md) | `package/method.py` | here |"


@pytest.mark.parametrize(("method", "path", "today"), METHODS, ids=[method for method, *_ in METHODS])
def test_a_method_that_is_here_has_its_file_and_one_to_come_has_none(method, path, today):
    assert (ROOT / "src" / "danlu" / path).exists() == (today != "to come"), f"src/danlu/{path} and {today!r} differ"


@pytest.mark.parametrize("path", sorted({path for _, path, today in METHODS if today != "to come"}))
def test_a_method_of_the_table_has_a_test(path):
    method = Path(path)
    place = ROOT / "tests" / method.parent / f"test_{method.stem}.py" if method.suffix else ROOT / "tests" / method
    assert place.is_file() or [*place.glob("test_*.py")], f"write {place.relative_to(ROOT).as_posix()}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_relative_link_of_a_page_leads_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_a_page_begins_with_its_title(page):
    assert page.read_text(encoding="utf-8").startswith("# "), "the first line is the page's title in the navigation"
