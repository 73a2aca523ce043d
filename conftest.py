"""A module whose examples are tested is the one that everybody imports."""

import importlib
from pathlib import Path

_SOURCES = Path(__file__).parent / "src"


def pytest_collect_file(file_path: Path) -> None:
    """Import the package of a module of danlu before pytest imports the module by its path.

    A package that imports its modules does so while pytest imports the first of them, which then exists twice; and a
    function that is called as its module is, such as ``msign``, is replaced in the package by the second one.
    """
    if file_path.suffix == ".py" and file_path.is_relative_to(_SOURCES):
        package = file_path.parent.relative_to(_SOURCES).parts
        importlib.import_module(".".join(package))
