"""Makes ``steps.py`` importable by its name, and leaves the programs of several processes to their test."""

import importlib.util
import sys
from pathlib import Path

# Programs of four processes, which ``test_sharded.py`` starts: they import one another, as programs do.
collect_ignore_glob = ["sharding_*.py"]

_path = Path(__file__).with_name("steps.py")
if "steps" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("steps", _path)
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["steps"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["steps"])
