"""One reader per suffix, found by its file's name."""

from collections import Counter
from pathlib import Path

import pytest

from danlu.data import Document, open_corpus
from danlu.data.readers import reader


def documents(path, skipped=None, **options):
    return list(open_corpus((str(path),), **options).read(Counter() if skipped is None else skipped))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("a.txt", "txt"),
        ("a.jsonl", "jsonl"),
        ("a.NDJSON", "jsonl"),
        ("a.tsv", "tsv"),
        ("a.TSV", "tsv"),
        ("a.md", "txt"),
        ("a", "txt"),
        ("a.__init__", "txt"),
        ("..", "txt"),
    ],
)
def test_a_reader_is_found_by_the_suffix_and_every_other_file_is_plain_text(name, module):
    assert reader(Path(name)).__module__ == f"danlu.data.readers.{module}"


def test_a_table_gives_a_document_per_row_out_of_the_column_that_is_named(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes('\ufeffnumber\ttext\r\n1\t"one" ü\r\n2\t\r\n\r\n3\tthree'.encode())
    skipped = Counter()
    assert documents(path, skipped) == [Document(f"{path}:2", '"one" ü'), Document(f"{path}:5", "three")]
    assert skipped == {"empty": 1}
    assert [text for _, text in documents(path, field="number")] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id\tbody\n1\tx\n", r"has the columns id, body and not 'text'; set field"),
        (b"id\ttext\n1\tx\ty\n", r"a.tsv:2 must have 2 values, one for each column, got 3"),
        (b"id\ttext\n1\t\xff\n", r"a.tsv:2 is not UTF-8 at byte 2"),
    ],
)
def test_a_table_that_is_none_is_an_error_that_says_where(tmp_path, content, message):
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / "a.tsv")
