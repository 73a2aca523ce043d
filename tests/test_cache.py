"""Where danlu keeps what it can make again."""

from pathlib import Path

from danlu._cache import cache_folder


def test_the_cache_is_where_the_environment_says_unless_it_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DANLU_CACHE")
    assert cache_folder() == tmp_path / "shared" / "danlu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "danlu"
