"""Examples of a module and tests of what it defines run in one process, whichever comes first."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

AFTERWARDS = """
import sys

from danlu.approx import minimax
from danlu.approx.minimax import Minimax


def test_names_are_those_of_the_one_module():
    module = sys.modules["danlu.approx.minimax"]
    assert minimax is module.minimax and minimax.__globals__ is vars(module) and Minimax is module.Minimax
    assert isinstance(minimax(abs, 2), Minimax)
"""


def test_a_function_called_as_its_module_is_survives_the_test_of_its_example(tmp_path: Path) -> None:
    later = tmp_path / "test_later.py"
    later.write_text(AFTERWARDS, encoding="utf-8")
    arguments = ["-n", "0", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    files = ["src/danlu/approx/minimax.py", str(later)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
