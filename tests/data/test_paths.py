"""The files behind the paths that somebody names."""

from pathlib import Path

import pytest

from danlu.data.paths import expand, walk


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_files_and_folders_are_named_outright_and_what_a_glob_matches_is_not_and_is_sorted(folder):
    given = [str(folder / "b.txt"), str(folder), str(folder / "*.txt")]
    assert list(expand(given)) == [
        (folder / "b.txt", True),
        (folder, True),
        (folder / "a.txt", False),
        (folder / "b.txt", False),
    ]


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert list(expand(["~/a.txt"])) == [(folder / "a.txt", True)]


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        ("a.txt", TypeError, r"got the string 'a.txt'; give \('a.txt',\)"),
        ([], ValueError, "at least one file, folder or glob"),
        (["absent.txt"], FileNotFoundError, "no file or folder is called absent.txt"),
        (["absent*.txt"], FileNotFoundError, r"the pattern absent\*.txt matches no file"),
    ],
)
def test_what_names_no_file_is_an_error(folder, monkeypatch, paths, error, message):
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=message):
        list(expand(paths))


def test_a_walk_is_in_order_and_lists_what_is_hidden_if_it_is_asked_to(folder):
    hidden = []
    found = [path.relative_to(folder) for path in walk(folder, hidden=hidden)]
    assert found == [Path("a.txt"), Path("b.txt"), Path("sub/c.txt")]
    assert sorted(hidden) == [".e.txt", ".hidden"]
    assert len(list(walk(folder))) == 5
    assert len(list(walk(folder, skip=frozenset({"sub"})))) == 4
