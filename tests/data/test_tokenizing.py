"""Folders of tokens: the same whatever the processes and interruptions, opened at once, checked when read."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from danlu.cli import main
from danlu.data import TextConfig, joined, open_text, tokenize, units
from danlu.data.joined import Joined
from danlu.data.loader import IGNORE, Loader
from danlu.data.tokenized import check, is_tokenized, open_folder
from danlu.data.workers import perform_all

LINES = [
    f"On day {i} the furnace was at {i * 37 % 101} degrees, and the {i % 7}th vessel held cinnabar.\n"
    for i in range(900)
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of lines and some of text, in several units."""
    place = tmp_path_factory.mktemp("texts")
    for name, lines in (("a", LINES[:500]), ("b", LINES[500:])):
        records = [json.dumps({"text": "".join(lines[i : i + 3])}) + "\n" for i in range(0, len(lines), 3)]
        (place / f"{name}.jsonl").write_text("".join(records))
    for n in range(30):
        (place / f"{n:02}.txt").write_text(f"Note {n}. " * (n + 1))
    (place / ".hidden").write_text("secret")
    (place / "photo.png").write_bytes(b"\0")
    return place


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr(units, "_SMALLEST", 5000)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """The folder that one process makes in one go."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    before, units._SMALLEST = units._SMALLEST, 5000
    try:
        tokenize([str(texts)], out, vocab_size=300, validation=0.1)
    finally:
        units._SMALLEST = before
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def config(*folders, **options):
    return TextConfig(**({"path": tuple(map(str, folders)), "length": 31, "batch": 4} | options))


def test_the_tokens_are_the_texts_and_the_held_out_ones_those_of_an_ordinary_run(texts, whole, tmp_path):
    index = json.loads((whole / "index.json").read_text())
    assert len(index["train"]) > 9
    assert index["skipped"] == {"binary": 1, "hidden": 1}
    folder = open_folder(whole)
    ordinary = open_text(
        TextConfig(path=(str(texts),), validation=0.1, tokenizer=str(whole / "tokenizer.json"), length=31, batch=4),
        cache_dir=tmp_path,
    )
    assert index["split"] == ordinary.manifest["split"] == "documents"
    assert (folder.train.rows(np.array([0]), len(folder.train))[0] == ordinary.train.tokens).all()
    opened = open_text(config(whole))
    for mine, theirs in zip(opened.validation(), ordinary.validation(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in ("documents", "bytes", "tokens", "train_documents", "validation_bytes", "vocab_size", "skipped"):
        assert opened.manifest[name] == ordinary.manifest[name]


def test_windows_cross_the_ends_of_shards_as_if_there_were_none(whole):
    folder = open_folder(whole)
    tokens = folder.train.rows(np.array([0]), len(folder.train))[0]
    assert tokens.dtype == np.uint16
    options = {"end": folder.tokenizer.end, "length": 1811, "batch": 5, "seed": 3}
    one, many = Loader(tokens, **options), Loader(folder.train, **options)
    assert max(len(part) for part in folder.train.parts) < 3 * 1811
    for _ in range(2 * one.windows // 5):
        mine, theirs = next(many), next(one)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_rows_of_a_ring_are_its_tokens_however_it_is_cut():
    array = np.arange(23)
    for cuts in ([], [7], [1, 2, 20], list(range(1, 23))):
        ring = Joined(np.split(array, cuts))
        for width in (1, 5, 23, 61):
            expected = (np.arange(23)[:, None] + np.arange(width)) % 23
            assert (ring.rows(np.arange(23), width) == expected).all()


def test_two_processes_make_what_one_makes_and_a_second_call_does_nothing(texts, whole, tmp_path):
    out = tmp_path / "tokens"
    words = ["tokenize", str(texts), "--vocab-size", "300", "--validation", "0.1", "--workers", "2", "--out", str(out)]
    assert main(words) == 0
    assert contents(out) == contents(whole)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.bin")} == times
    assert is_tokenized(out)


class KilledError(Exception):
    """Stands for a process that ends anywhere."""


@pytest.mark.parametrize("steps", [1, 9, 25, 39])
def test_killed_anywhere_it_goes_on_and_makes_the_same(texts, whole, tmp_path, monkeypatch, steps):
    out, left = tmp_path / "tokens", [steps]

    def write(path, content, write=units.write_whole):
        left[0] -= 1
        if not left[0]:
            path.with_name(f".{path.name}.left").write_bytes(b"half")  # and a scratch file is left behind
            raise KilledError
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(units, "write_whole", write)
        with pytest.raises(KilledError):
            tokenize([str(texts)], out, vocab_size=300, validation=0.1)
    assert not (out / "index.json").exists()
    assert is_tokenized(out)
    with pytest.raises(ValueError, match="is not complete: give danlu tokenize --out"):
        open_text(config(out))
    done = {path: path.stat().st_mtime_ns for path in (out / units.RECORDS).glob("*.json")}
    made = []
    for name in ("survey_unit", "encode_unit"):
        work = getattr(units, name)
        monkeypatch.setattr(f"danlu.data.tokenizing.{name}", lambda *a, work=work: (made.append(a[1]), work(*a)))
    tokenize([str(texts)], out, vocab_size=300, validation=0.1)
    assert len(made) + len(done) == 2 * (1 + max(made)) > 30
    assert {name: data for name, data in contents(out).items() if not name.endswith(".left")} == contents(whole)


def test_a_killed_command_leaves_no_process_and_goes_on(texts, tmp_path):
    big = tmp_path / "big.jsonl"
    with big.open("w") as file:
        for n in range(12_000):
            file.write(json.dumps({"text": f"{n} " + LINES[n % 900] * 8}) + "\n")
    tokenizer = tmp_path / "tokenizer.json"
    open_text(TextConfig(path=(str(texts),), vocab_size=300), cache_dir=tmp_path).tokenizer.save(tokenizer)
    words = [sys.executable, "-m", "danlu", "tokenize", str(big), "--out", "out", "--workers", "2"]
    words += ["--tokenizer", str(tokenizer)]
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True)
        assert process.stderr is not None
        while b"encoding" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.3)
        process.send_signal(number)
        started = time.monotonic()
        assert process.wait(20) == code
        while alive(process.pid):
            assert time.monotonic() - started < 20
            time.sleep(0.1)
        assert not (tmp_path / "out" / "index.json").exists()
    index = tokenize([str(big)], tmp_path / "out", tokenizer=tokenizer)
    assert index["documents"] == 12_000
    assert check(tmp_path / "out") == []


def alive(group):
    """Whether a process of a group runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_damaged_shard_is_found_by_the_check_and_by_the_first_window_that_touches_it(whole, tmp_path, capsys):
    out = copy(whole, tmp_path)
    assert main(["tokenize", "--check", str(out)]) == 0
    shard = out / "train-00003.bin"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(data)
    (out / "train-00005.crc").unlink()
    (out / "train-00006.crc").write_bytes(bytes((out / "train-00006.crc").stat().st_size))
    assert main(["tokenize", "--check", str(out)]) == 1
    said = capsys.readouterr().err
    assert "train-00003.bin is not what was written in 1 of" in said
    assert "train-00005.crc" in said
    assert "train-00006.bin is whole, but its .crc file is not" in said
    assert said.count("damaged:") == 3
    for name in ("train-00005.crc", "train-00006.crc"):
        shutil.copy(whole / name, out / name)
    loader = open_text(config(out)).train
    with pytest.raises(ValueError, match=r"train-00003.bin is damaged between bytes .*--check"):
        list(islice(loader, loader.windows))


@pytest.mark.parametrize("block", [0, 4096, 4097, 8191])
def test_every_byte_is_under_a_checksum(tmp_path, block):
    from danlu.data.joined import Shard, checksums

    data = np.arange(4096, dtype="<u2")
    checksums(data.tobytes()).tofile(tmp_path / "a.crc")
    changed = bytearray(data.tobytes())
    changed[block] ^= 1
    (tmp_path / "a.bin").write_bytes(changed)
    shard = Shard(str(tmp_path / "a.bin"), 4096, np.dtype("<u2"))
    with pytest.raises(ValueError, match="damaged"):
        shard[block // 2 : block // 2 + 1]
    other = 3000 if block < 4096 else 100
    assert shard[other : other + 7].tolist() == list(range(other, other + 7))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: os.truncate(out / "train-00002.bin", 100), r"train-00002.bin has 100 bytes and had"),
        (lambda out: (out / "validation-00004.bin").unlink(), r"validation-00004.bin is missing"),
        (lambda out: (out / "index.json").write_text('{"format": "danlu tokens", "vers'), "index.json is damaged"),
        (lambda out: (out / "index.json").write_text('{"format": "danlu tokens", "version": 9}'), "later release"),
        (lambda out: edit(out / "tokenizer.json"), "is not the vocabulary"),
    ],
)
def test_a_folder_that_is_not_what_it_was_is_not_opened(whole, tmp_path, damage, message):
    out = copy(whole, tmp_path)
    damage(out)
    with pytest.raises(ValueError, match=message):
        open_text(config(out))


def edit(path):
    tree = json.loads(path.read_text())
    merges = tree["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(tree))


def test_a_training_takes_the_vocabulary_and_reads_only_what_it_needs(whole, monkeypatch):
    read, real = [], joined._read
    monkeypatch.setattr(joined, "_read", lambda *where: (read.append(where), real(*where))[1])
    data = open_text(config(whole, vocab_size=4096))
    assert data.sizes == {"vocab_size": 300}
    index = (whole / "index.json").read_bytes()
    assert data.manifest["sha256"] == data.train.sha256 == hashlib.sha256(index).hexdigest()
    assert read == []
    batch = next(data.train)
    assert 1 <= len({path for path, _, _ in read if path.endswith(".bin")}) <= 8
    assert all(stop - start <= 2 * 4096 for _, start, stop in read)
    assert batch["tokens"].shape == (4, 31)
    targets = torch.cat([b["targets"][b["targets"] != IGNORE] for b in data.validation()])
    assert int(data.byte_lengths[targets].sum()) == data.manifest["validation_bytes"]


def test_options_that_tokens_have_decided_are_named_and_the_vocabulary_is_known_before_they_are_opened(whole):
    set_here = {"vocab_size": 999, "validation": 0.3, "field": "body"}
    warnings = open_text(TextConfig(path=(str(whole),), length=8, batch=2, **set_here)).manifest["warnings"]
    assert [line.split(" = ")[0] for line in warnings] == ["data.field", "data.vocab_size", "data.validation"]
    assert "data.validation = 0.3 has no effect: the data are tokens already (theirs: 0.1)." in warnings
    same = open_text(TextConfig(path=(str(whole),), length=8, batch=2, vocab_size=300, validation=0.1))
    assert same.manifest["warnings"] == []
    assert TextConfig(path=(str(whole),)).expected_sizes() == {"vocab_size": 300}


def test_a_folder_is_not_overwritten_and_says_what_it_was_begun_with(texts, whole, tmp_path):
    out = copy(whole, tmp_path)
    with pytest.raises(FileExistsError, match="was made of other input"):
        tokenize([str(texts)], out, vocab_size=301, validation=0.1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="left as it is"):
        tokenize([str(texts)], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.name != ".lock"] == ["thesis.txt"]
    (out / "index.json").unlink()
    (out / "plan.json").write_text(json.dumps({"format": 1, "vocab": 1}))
    with pytest.raises(FileExistsError, match="was begun with other tokenizer, validation, field, errors, unit, files"):
        tokenize([str(texts)], out)


def test_input_that_changes_on_the_way_is_an_error(texts, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one text " * 100)

    def encode(*arguments, encode=units.encode_unit):
        path.write_text("two text " * 100)
        encode(*arguments)

    monkeypatch.setattr("danlu.data.tokenizing.encode_unit", encode)
    with pytest.raises(ValueError, match=r"a\.txt changed while it was read"):
        tokenize([str(path)], tmp_path / "out")


def fails(task, advance):
    if task == 5:
        raise FileNotFoundError(2, "No such file", "a.txt")
    if task == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(task)


def test_what_a_process_raises_is_raised_here_and_one_that_is_killed_is_named():
    for tasks, error, message in (
        ([1, 5], FileNotFoundError, "a.txt"),
        ([1, 7], ChildProcessError, "ended by signal 9; memory may be short"),
    ):
        with pytest.raises(error, match=message):
            perform_all(tasks, fails, workers=1, advance=lambda count: None)
    counted = []
    perform_all(range(1, 5), fails, workers=2, advance=counted.append)
    assert sum(counted) == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "needs files to read and a folder to write"),
        (["--check", "a", "--out", "b"], "takes a folder and nothing else"),
        (["a", "--out", "b", "--tokenizer", "t", "--vocab-size", "300"], "choose one"),
        (["a", "--out", "b", "--workers", "0"], "--workers must be at least 1"),
        (["nothing-there", "--out", "b"], "no file or folder is called nothing-there"),
        (["--check", "nothing-there"], "nothing-there is no folder of tokens"),
    ],
)
def test_commands_that_cannot_be_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tokenize", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
