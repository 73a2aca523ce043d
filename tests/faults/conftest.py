"""Lets these tests, and the programs that they start, import the small task of ``tests/train``."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

_path = Path(__file__).parents[1] / "train" / "toy.py"
if "toy" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("toy", _path)
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["toy"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["toy"])


@pytest.fixture(scope="session")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a program that trains the small task."""
    path = os.pathsep.join([str(_path.parent), os.environ.get("PYTHONPATH", "")])
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "PYTHONPATH": path, "DANLU_CACHE": cache, "OMP_NUM_THREADS": "1"}
