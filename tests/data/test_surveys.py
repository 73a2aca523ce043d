"""Surveys are remembered by size, time and place of the files."""

import os
import threading
import time

import pytest

from danlu.data import open_corpus, surveys
from danlu.data.surveys import remembered

OPTIONS = [0.1, "text", "strict"]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "texts"
    place.mkdir()
    for n in range(20):
        (place / f"{n:02}.txt").write_text(f"text {n} " * 9)
        age(place / f"{n:02}.txt")
    (place / "photo.png").write_bytes(b"\0")
    age(place / "photo.png")
    return place


def age(path, seconds=100.0):
    then = time.time() - seconds
    os.utime(path, (then, then))


def survey(folder, cache, options=OPTIONS):
    return remembered(open_corpus((str(folder),)), options, cache)


@pytest.fixture
def passes(monkeypatch):
    """Counts how often documents are read."""
    made, read = [], surveys.survey

    def counted(*arguments):
        made.append(1)
        return read(*arguments)

    monkeypatch.setattr(surveys, "survey", counted)
    return made


def test_files_as_they_were_are_not_read_again(folder, tmp_path, passes):
    found = survey(folder, tmp_path / "cache")
    assert survey(folder, tmp_path / "cache") == found
    assert found.documents == 20
    assert found.skipped == {"binary": 1}
    assert len(passes) == 1


def test_another_time_size_place_or_option_reads_again(folder, tmp_path, passes):
    cache = tmp_path / "cache"
    first = survey(folder, cache)
    age(folder / "03.txt", 50)
    assert survey(folder, cache) == first
    (folder / "04.txt").write_text("other")
    age(folder / "04.txt")
    assert survey(folder, cache).sha256 != first.sha256
    (folder / "05.txt").write_text("twin")
    age(folder / "05.txt")
    os.replace(folder / "05.txt", folder / "06.txt")
    survey(folder, cache)
    survey(folder, cache, [0.2, "text", "strict"])
    assert len(passes) == 5


def test_what_was_written_a_moment_ago_is_read_again(folder, tmp_path, passes):
    (folder / "03.txt").write_text("a")
    first = survey(folder, tmp_path / "cache")
    stat = (folder / "03.txt").stat()
    (folder / "03.txt").write_text("b")
    os.utime(folder / "03.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert survey(folder, tmp_path / "cache").sha256 != first.sha256


def test_of_many_at_once_one_reads_and_the_others_take_what_it_found(folder, tmp_path, monkeypatch):
    for path in folder.iterdir():
        age(path, 0)  # even of files that are new
    read, made, begun = surveys.survey, [], threading.Barrier(4)

    def slow(*arguments):
        made.append(1)
        time.sleep(0.3)
        return read(*arguments)

    monkeypatch.setattr(surveys, "survey", slow)
    found = []

    def want():
        begun.wait()
        found.append(survey(folder, tmp_path / "cache"))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == found[:1] * 4
    assert len(made) == 1


def test_a_damaged_entry_and_a_cache_that_cannot_be_written_only_cost_time(folder, tmp_path, passes):
    first = survey(folder, tmp_path / "cache")
    for content in ("", "[]", '{"settled": true}'):
        next((tmp_path / "cache").glob("*.json")).write_text(content)
        assert survey(folder, tmp_path / "cache") == first
    (tmp_path / "file").touch()
    assert survey(folder, tmp_path / "file" / "cache") == first
    assert len(passes) == 5
