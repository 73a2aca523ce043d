"""One reader per suffix, found by its file's name."""

import gzip
import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from danlu.data import Document, open_corpus
from danlu.data.files import Part, read_part
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


RECORDS = [{"text": f"document {i}\nof the record № {i}", "id": i} for i in range(2000)]
TEXTS = [record["text"] for record in RECORDS]


def as_lines(records=RECORDS):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_compressed_files_are_read_as_what_they_hold(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines()[:999]) + gzip.compress(as_lines()[999:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "b.jsonl.zst").write_bytes(pack(as_lines()[:5000]) + pack(as_lines()[5000:]))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("ü".encode()))
    assert [text for _, text in documents(tmp_path / "a.jsonl.gz")] == TEXTS
    assert [text for _, text in documents(tmp_path / "b.jsonl.zst")] == TEXTS
    assert [text for _, text in documents(tmp_path)] == [*TEXTS, *TEXTS, "ü"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_or_is_none_is_named(tmp_path, suffix):
    zstandard = pytest.importorskip("zstandard")
    whole = gzip.compress(as_lines()) if suffix == "gz" else zstandard.ZstdCompressor().compress(as_lines())
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"no such thing" * 9)
    with pytest.raises(ValueError, match=f"a.jsonl.{suffix} cannot be decompressed"):
        documents(path)
    path = path.replace(tmp_path / f"a.txt.{suffix}")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"a.txt.{suffix} cannot be decompressed"):
        documents(path)


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, package in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.arrow", "pyarrow")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ImportError, match=rf"{package}: pip install 'danlu\[files\]'"):
            documents(tmp_path / name)


def test_parquet_and_both_forms_of_arrow_give_a_document_per_row(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": [*TEXTS, "", None], "id": list(range(2002))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=333)
    for name, form in (("b.arrow", pa.ipc.new_stream), ("c.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as file, form(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=77)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        skipped = Counter()
        found = documents(tmp_path / name, skipped)
        assert [text for _, text in found] == TEXTS
        assert found[2].name == f"{tmp_path / name}: row 3"
        assert skipped == {"empty": 2}
        with pytest.raises(ValueError, match=r"has the columns text, id and not 'body'; set field"):
            documents(tmp_path / name, field="body")
        with pytest.raises(ValueError, match=r"the column 'id' must hold strings, got int64"):
            documents(tmp_path / name, field="id")
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=name):
            documents(tmp_path / name)


def test_a_saved_hugging_face_data_set_is_its_training_rows_and_not_its_descriptions(tmp_path):
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    for split in ("test", "train"):
        folder = tmp_path / split
        folder.mkdir()
        names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text("{}")
        for n, name in enumerate(names):
            table = pa.table({"text": [f"{split} {n}"]})
            with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    assert [text for _, text in documents(tmp_path)] == ["train 0", "train 1"]
    assert [text for _, text in documents(tmp_path / "test")] == ["test 0", "test 1"]


@pytest.mark.parametrize("size", [1, 7, 997, 50_000])
def test_ranges_of_lines_put_together_are_the_file(tmp_path, size):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(RECORDS[:50]) + b"\n\n" + as_lines(RECORDS[50:90])[:-1])
    starts = range(0, path.stat().st_size, size)
    parts = [Part(path, True, start, start + size if start + size < path.stat().st_size else None) for start in starts]
    found = [d.text for p in parts for d in read_part(p, field="text", errors="strict", skipped=Counter())]
    assert found == TEXTS[:90]


def test_an_error_in_a_later_range_says_where_its_lines_are_counted_from(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(RECORDS[:50]) + b"{")
    with pytest.raises(ValueError, match="is not JSON") as caught:
        list(read_part(Part(path, True, 1000), field="text", errors="strict", skipped=Counter()))
    assert "counted from byte 1,000" in caught.value.__notes__[0]


def test_a_large_file_of_lines_is_not_read_whole(tmp_path):
    class Counted(io.BytesIO):
        def readline(self, *limit):
            read.append(1)
            return super().readline(*limit)

        __next__ = readline

    read = []
    file = Counted(as_lines())
    rows = reader(Path("a.jsonl"))(Path("a"), file, field="text", errors="strict", skipped=Counter())
    assert next(rows).text == TEXTS[0]
    assert 0 < len(read) < 1900
