"""The support matrix is what the tests say, and the tests that it names exist."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "tools" / "support_matrix.py")
matrix = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(matrix)


def test_the_page_is_what_the_tables_of_the_tests_say():
    expected = matrix.page()
    assert matrix.PAGE.read_text(encoding="utf-8") == expected, "run python tools/support_matrix.py"


def test_the_tests_named_for_optimizers_are_collected():
    for package in ("transformers", "lightning", "accelerate"):
        pytest.importorskip(package)
    files = sorted({test.partition("::")[0] for test in matrix.named_tests()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=--import-mode=importlib -q", *files]
    found = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert matrix.named_tests() <= set(found.stdout.splitlines()), found.stderr
