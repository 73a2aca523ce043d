import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from danlu.data.tokenizer import END, _alphabet, load_tokenizer, train_tokenizer

TEXT = [
    "The alchemist heats the vessel, and heats it again; ça marche, 丹炉 ☿ 🜍.\n    def f(x):\n        return x\n"
] * 3
TOKENIZER = train_tokenizer(TEXT, vocab_size=320)
any_text = st.text(st.characters(codec="utf-8"), max_size=200)


@given(any_text)
def test_decoding_gives_back_the_text_that_was_encoded(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode_batch([text, ""]) == [TOKENIZER.encode(text), []]


@given(any_text)
def test_byte_lengths_of_the_tokens_of_a_text_sum_to_its_bytes(text):
    assert int(TOKENIZER.byte_lengths[TOKENIZER.encode(text)].sum()) == len(text.encode())


@given(any_text)
def test_a_stream_yields_whole_characters_and_together_the_text(text):
    parts = list(TOKENIZER.decode_stream(TOKENIZER.encode(text)))
    assert "".join(parts) == text
    assert "" not in parts


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60))
def test_a_stream_of_any_tokens_says_what_decoding_them_at_once_says(ids):
    assert "".join(TOKENIZER.decode_stream(ids)) == TOKENIZER.decode(ids)


def test_a_character_of_many_tokens_comes_out_when_its_last_byte_is_there():
    tokenizer = train_tokenizer(["a"], vocab_size=257)
    ids = tokenizer.encode("炉")
    assert len(ids) == 3
    seen = []
    stream = tokenizer.decode_stream(seen.append(i) or i for i in ids)
    assert next(stream) == "炉"
    assert seen == ids


@pytest.mark.parametrize("text", [END, f"a{END}b", END * 3, f" {END} "])
def test_text_that_spells_the_end_token_is_text(text, tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    for tokenizer in (TOKENIZER, load_tokenizer(tmp_path / "t.json")):
        ids = tokenizer.encode(text)
        assert tokenizer.end not in ids
        assert tokenizer.decode(ids) == text


def test_the_end_token_has_no_bytes_and_is_left_out_of_text():
    assert TOKENIZER.byte_lengths[TOKENIZER.end] == 0
    assert TOKENIZER.decode([TOKENIZER.end, *TOKENIZER.encode("a"), TOKENIZER.end]) == "a"
    assert (TOKENIZER.byte_lengths == 0).sum() == 1


def test_the_alphabet_is_the_one_of_the_library():
    backend = Backend.from_str(TOKENIZER._backend.to_str())
    alphabet = _alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    for character, byte in alphabet.items():
        if byte < 128:
            assert backend.decode([backend.token_to_id(character)]) == chr(byte)
    assert set(alphabet) == set(backend.pre_tokenizer.alphabet())


def test_training_twice_gives_the_same_vocabulary():
    assert train_tokenizer(iter(TEXT), vocab_size=320).sha256 == TOKENIZER.sha256


def test_text_that_repeats_too_little_gives_a_smaller_vocabulary():
    assert train_tokenizer(["abcdefg"], vocab_size=5000).vocab_size == 257
    assert train_tokenizer([], vocab_size=5000).vocab_size == 257
    assert train_tokenizer(TEXT, vocab_size=320).vocab_size == 320


def test_a_saved_tokenizer_is_the_same_when_loaded_here_and_by_the_library(tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    here, library = load_tokenizer(tmp_path / "t.json"), Backend.from_file(str(tmp_path / "t.json"))
    assert here.sha256 == TOKENIZER.sha256
    assert here.end == TOKENIZER.end == library.token_to_id(END)
    assert here.encode(TEXT[0]) == library.encode(TEXT[0]).ids == TOKENIZER.encode(TEXT[0])
    assert library.decode(library.encode(TEXT[0]).ids) == TEXT[0]


def test_an_id_outside_the_vocabulary_is_rejected():
    for bad in (-1, TOKENIZER.vocab_size):
        with pytest.raises(ValueError, match="token ids must be from 0"):
            TOKENIZER.decode([bad])


def test_a_vocabulary_too_small_for_all_bytes_is_rejected():
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 257, got 256"):
        train_tokenizer(TEXT, vocab_size=256)


def spec():
    return json.loads(TOKENIZER._backend.to_str())


def changed(*path_and_value):
    *path, last, value = path_and_value
    made = spec()
    part = made
    for key in path:
        part = part[key]
    part[last] = value
    return made


BROKEN = {
    "no object": ([], "model must be BPE"),
    "other model": (changed("model", "type", "Unigram"), "model must be BPE"),
    "no model": (changed("model", None), "model must be BPE"),
    "normalizer": (changed("normalizer", {"type": "Lowercase"}), "no normalizer"),
    "truncation": (
        changed("truncation", {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
        "no truncation",
    ),
    "prefix space": (changed("pre_tokenizer", "add_prefix_space", True), "prefix space"),
    "other pre-tokenizer": (changed("pre_tokenizer", {"type": "Whitespace"}), "ByteLevel"),
    "dropout": (changed("model", "dropout", 0.5), "dropout"),
    "prefix": (changed("model", "continuing_subword_prefix", "##"), "prefix"),
    "gap in ids": (changed("model", "vocab", "!", 10**9), "without gaps"),
    "negative id": (changed("model", "vocab", "!", -1), "without gaps"),
    "id that is no integer": (changed("model", "vocab", "!", "1"), "without gaps"),
    "id that is true": (changed("model", "vocab", "!", True), "without gaps"),
    "vocabulary that is a list": (changed("model", "vocab", []), "vocabulary"),
    "added token that is not special": (changed("added_tokens", 0, "special", False), "special"),
    "added token that is a number": (changed("added_tokens", [3]), "special"),
    "no end token": (changed("added_tokens", 0, "content", "<pad>"), "tokens|alphabet|gaps"),
    "no added tokens": (changed("added_tokens", []), "<|end|>|alphabet"),
    "missing merge parts": (changed("model", "merges", [["qq", "zz"]]), "cannot be used"),
    "merges that are numbers": (changed("model", "merges", [1, 2]), "cannot be used"),
    "not a byte-level token": (changed("model", "vocab", {**spec()["model"]["vocab"], "日": 320}), "alphabet"),
    "missing byte": (
        changed("model", "vocab", {k: v for k, v in spec()["model"]["vocab"].items() if v != 256}),
        "gaps|bytes",
    ),
    "fewer than all bytes": (changed("model", "vocab", {END: 0, "a": 1}), "256 bytes"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_tokenizer_file_of_another_kind_is_rejected_in_one_sentence(what, tmp_path):
    content, message = BROKEN[what]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"\0" * 10])
def test_a_file_that_is_no_tokenizer_is_rejected_in_one_sentence(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_a_missing_or_enormous_tokenizer_file_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_tokenizer(tmp_path / "nothing.json")
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="64 MiB"):
        load_tokenizer(tmp_path / "big.json")
