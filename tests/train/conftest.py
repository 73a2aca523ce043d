"""Makes ``toy.py`` importable by its name and gives every test of this folder a cache of its own."""

import importlib.util
import sys
from pathlib import Path

import pytest

_path = Path(__file__).with_name("toy.py")
if "toy" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("toy", _path)
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["toy"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["toy"])


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_CACHE", str(cache))
    toy = sys.modules["toy"]
    toy.SIGNALS.clear()
    toy.EVALUATION_SIGNALS.clear()
