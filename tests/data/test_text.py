import json
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data import shards
from danlu.data.corpus import open_corpus, survey
from danlu.data.encoding import pieces
from danlu.data.loader import IGNORE
from danlu.data.preparing import Progress
from danlu.data.shards import cached
from danlu.data.text import TextConfig, _tokenizer_texts, open_text

SENTENCES = [
    f"On day {i} the furnace was at {i * 37 % 101} degrees, and the {i % 7}th vessel held cinnabar.\n"
    for i in range(60)
]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        write(tmp_path / "texts" / f"{i:02}.txt", "".join(SENTENCES[i : i + 9]) + f"Ende № {i}.")
    return tmp_path / "texts"


def config(path, **options):
    return TextConfig(
        **({"path": (str(path),), "vocab_size": 300, "length": 32, "batch": 4, "validation": 0.1} | options)
    )


def text_of(data, batches):
    ids = torch.cat([b["targets"][b["targets"] != IGNORE] for b in batches])
    return data.tokenizer.decode(i for i in ids.tolist() if i != data.tokenizer.end)


def test_validation_text_is_the_text_of_the_documents_held_out(folder, tmp_path):
    data = open_text(config(folder), cache_dir=tmp_path / "cache")
    held_out = text_of(data, data.validation())
    documents = [p.read_text() for p in sorted(folder.iterdir())]
    kept = [d for d in documents if d in held_out]
    assert held_out == "".join(kept)
    assert len(kept) == data.manifest["validation_documents"] > 0
    assert data.manifest["train_documents"] == 40 - len(kept)
    assert data.manifest["split"] == "documents"


def test_bytes_of_the_validation_targets_sum_to_the_bytes_of_the_text(folder, tmp_path):
    data = open_text(config(folder), cache_dir=tmp_path / "cache")
    total = sum(int(data.byte_lengths[b["targets"].clamp(min=0)][b["targets"] >= 0].sum()) for b in data.validation())
    assert total == data.manifest["validation_bytes"] == len(text_of(data, data.validation()).encode())
    assert data.manifest["bytes"] == data.manifest["train_bytes"] + data.manifest["validation_bytes"]


def test_adding_a_document_moves_no_other_between_training_and_validation(folder, tmp_path):
    before = open_text(config(folder), cache_dir=tmp_path / "cache")
    held_out = text_of(before, before.validation())
    write(folder / "05a.txt", "A page that was not there before.\n" * 3)
    after = open_text(config(folder), cache_dir=tmp_path / "cache")
    assert text_of(after, after.validation()).replace("A page that was not there before.\n", "") == held_out
    assert after.manifest["sha256"] != before.manifest["sha256"]


def test_one_document_gives_its_tail_and_the_manifest_says_so(tmp_path):
    path = write(tmp_path / "one.txt", "".join(SENTENCES))
    data = open_text(config(path, validation=0.2), cache_dir=tmp_path / "cache")
    held_out = text_of(data, data.validation())
    assert "".join(SENTENCES).endswith(held_out)
    assert 0.1 < len(held_out) / len("".join(SENTENCES)) <= 0.2
    assert data.manifest["split"] == "tails"
    assert "cut" in data.manifest["warnings"][0]


@given(text=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=2, max_size=30))
def test_one_line_of_any_text_trains_or_says_what_it_needs(text):
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, "line.txt")
        with open(path, "wb") as file:
            file.write(text.encode())
        if not text.encode().strip() or len(text.removeprefix("\ufeff")) < 2:
            with pytest.raises(ValueError, match=r"empty|at least 2"):
                open_text(config(path), cache_dir=place)
            return
        data = open_text(config(path, length=256), cache_dir=place)
        batch = next(data.train)
        assert batch["tokens"].shape == batch["targets"].shape == (4, data.length)
        assert data.length < 256
        assert any("windows are" in w for w in data.manifest["warnings"])
        assert text.endswith(text_of(data, data.validation()))


def test_a_second_opening_reads_the_cache_and_gives_the_same_batches(folder, tmp_path, monkeypatch):
    first = open_text(config(folder), cache_dir=tmp_path / "cache", seed=5)
    monkeypatch.setattr("danlu.data.text.train_tokenizer", lambda *a, **k: pytest.fail("trained again"))
    second = open_text(config(folder), cache_dir=tmp_path / "cache", seed=5)
    assert second.manifest == first.manifest
    for _ in range(3):
        one, other = next(first.train), next(second.train)
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_building_twice_from_nothing_gives_the_same_tokens(folder, tmp_path):
    one, other = (open_text(config(folder), cache_dir=tmp_path / name) for name in ("a", "b"))
    assert one.manifest == other.manifest
    assert (one.train.tokens == other.train.tokens).all()


def test_a_truncated_cache_is_built_again(folder, tmp_path):
    first = open_text(config(folder), cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob("train.bin")
    size = path.stat().st_size
    del first
    os.truncate(path, size // 2)
    open_text(config(folder), cache_dir=tmp_path / "cache")
    assert path.stat().st_size == size


def test_a_state_of_other_text_is_rejected(folder, tmp_path):
    state = open_text(config(folder), cache_dir=tmp_path / "cache").train.state_dict()
    write(folder / "new.txt", "one more")
    with pytest.raises(ValueError, match="cannot resume: sha256"):
        open_text(config(folder), cache_dir=tmp_path / "cache").train.load_state_dict(state)


def test_a_saved_tokenizer_can_be_used_for_other_text(folder, tmp_path):
    first = open_text(config(folder), cache_dir=tmp_path / "cache")
    first.tokenizer.save(tmp_path / "tokenizer.json")
    path = write(tmp_path / "other.txt", "Quicksilver and sulphur. " * 50)
    second = open_text(config(path, tokenizer=str(tmp_path / "tokenizer.json")), cache_dir=tmp_path / "cache")
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert text_of(second, second.validation()) in "Quicksilver and sulphur. " * 50


def test_the_manifest_is_json_and_says_what_was_read(folder, tmp_path):
    (folder / "photo.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").write_text("secret")
    manifest = open_text(config(folder), cache_dir=tmp_path / "cache").manifest
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["skipped"] == {"binary": 1, "hidden": 1}
    assert manifest["documents"] == 40
    assert manifest["tokens"] == manifest["train_tokens"] + manifest["validation_tokens"]


def test_text_that_spells_the_end_token_stays_text(tmp_path):
    text = "before <|end|> after\n" * 30
    data = open_text(config(write(tmp_path / "a.txt", text)), cache_dir=tmp_path / "cache")
    assert (data.train.tokens == data.tokenizer.end).sum() == 1
    assert text.endswith(text_of(data, data.validation()))


@given(text=st.text(alphabet="ab\n", max_size=300), size=st.integers(1, 50))
def test_pieces_put_together_are_the_text(text, size):
    import danlu.data.encoding as module

    before, module._PIECE = module._PIECE, size
    try:
        found = list(pieces(text))
    finally:
        module._PIECE = before
    assert "".join(found) == text
    assert all(len(p) <= size for p in found)


def test_bits_per_byte_of_a_uniform_model_is_what_its_token_count_says(folder, tmp_path):
    data = open_text(config(folder), cache_dir=tmp_path / "cache")
    targets = torch.cat([b["targets"].flatten() for b in data.validation()])
    targets = targets[targets != IGNORE]
    nll = math.log(data.tokenizer.vocab_size) * len(targets)
    bpb = nll / (math.log(2) * int(data.byte_lengths[targets].sum()))
    tokens, size = data.manifest["validation_tokens"], data.manifest["validation_bytes"]
    assert bpb == pytest.approx(math.log2(data.tokenizer.vocab_size) * tokens / size, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"vocab_size": 256}, "vocab_size"),
        ({"length": 0}, "length"),
        ({"batch": 0}, "batch"),
        ({"validation": 0.0}, "validation"),
        ({"validation": 0.6}, "validation"),
        ({"corpus": "stdlid"}, "corpus.*did you mean 'stdlib'"),
        ({"errors": "ignore"}, "errors"),
    ],
)
def test_impossible_settings_are_rejected_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        TextConfig(**options)


@pytest.mark.parametrize("locks", [True, False])
def test_a_cache_wanted_by_many_at_once_is_built_into_one_whole_entry(folder, tmp_path, monkeypatch, locks):
    # A file lock belongs to an open file, so threads contend for it as processes do.
    if not locks:
        monkeypatch.setattr(shards, "fcntl", None)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_text(config(folder), cache_dir=tmp_path / "cache"), range(4)))
    assert all((data.train.tokens == opened[0].train.tokens).all() for data in opened)
    entries = [p for p in (tmp_path / "cache" / "text").iterdir() if p.is_dir()]
    assert len(entries) == 1


def test_what_a_killed_build_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / ".entry-killed").mkdir()
    cached(tmp_path / "entry", lambda scratch: (scratch / "whole").touch(), lambda entry: (entry / "whole").exists())
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["entry"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    def build(scratch):
        (scratch / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        cached(tmp_path / "entry", build, lambda folder: folder.exists())
    assert "DANLU_CACHE" in caught.value.__notes__[0]
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_a_word_without_end_is_cut_where_the_tokenizer_learns_and_nowhere_else(tmp_path):
    text = "ACGT" * 5000
    options = config(write(tmp_path / "dna.txt", text))
    corpus = open_corpus(options.path)
    seen = "".join(_tokenizer_texts(corpus, survey(corpus, 0.1), options, Progress()))
    assert max(map(len, seen.split())) == 256
    data = open_text(options, cache_dir=tmp_path / "cache")
    assert text.endswith(text_of(data, data.validation()))
    assert data.manifest["bytes"] == len(text)
