"""Code of your own on the command line: loaded from a file or module that was named there, and recorded in the run.

What such a file imports is recorded too where a class of the configuration comes from it.

A file is loaded under its own name as a module, not as ``__main__``: what it defines is written into a run's
``config.json`` as ``my_recipe:MyMixerConfig``, and is found under this name again when the file is given again. Nothing
is ever loaded because a file in a run's folder names it.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import re
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

__all__ = ["CodeFile", "UserCode", "call", "code_of", "code_words", "load", "load_again"]

_log = logging.getLogger("danlu.usercode")
_RECORD = "code.json"
# Folders of installed packages: what is there has a version, and is no code of the run's own.
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True, kw_only=True)
class CodeFile:
    """A file or module that a run's configuration needs.

    Attributes:
        given: the absolute path of a file, or the name of a module.
        module: the name under which it is imported.
        sha256: of its text.
        text: what was run.
    """

    given: str
    module: str
    sha256: str
    text: bytes


@dataclass(frozen=True)
class UserCode:
    """The files and modules of a run that are not danlu's; often none."""

    files: tuple[CodeFile, ...] = ()

    def write(self, folder: Path | str) -> None:
        """Record them in a run's folder: ``code.json``, and copies in ``code/`` for people to read.

        Nothing is written where there are none.
        """
        if not self.files:
            return
        copies = Path(folder) / "code"
        copies.mkdir(exist_ok=True)
        record = []
        for file in self.files:
            copy = copies / f"{file.module}.py"
            copy.write_bytes(file.text)
            named = {"given": file.given, "module": file.module, "sha256": file.sha256}
            record.append({**named, "copy": copy.relative_to(folder).as_posix()})
        (Path(folder) / _RECORD).write_text(json.dumps(record, indent=2) + "\n")


def load(target: str, modules: Iterable[str] = ()) -> tuple[ModuleType, CodeFile]:
    """Import the file ``my_recipe.py`` or the module ``package.module``.

    A file's folder and the current folder are searched last for what they import, so that no file there can take the
    place of an installed package.

    Args:
        target: the file or module.
        modules: names under which code is wanted: of these a file ``mylab/shift.py`` is ``mylab.shift``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has the name of another module, there is no such module, or its code fails (the line is
            named).
    """
    if not target.endswith(".py"):
        return _load_module(target)
    path = Path(target).absolute()
    parts = path.with_suffix("").parts[: -1 if path.stem == "__init__" else None]
    for name in modules:
        inner = tuple(name.split("."))
        if path.is_file() and parts[-len(inner) :] == inner and path.stem != name:
            return _load_inner(path, name, Path(*parts[: -len(inner)]))
    return _load_file(path, target)


def code_of(config: object, files: Iterable[CodeFile]) -> UserCode:
    """Return the code that a configuration needs: ``files``, and those from which its other classes were imported.

    Neither danlu nor installed packages are among them.
    """
    found = {file.module: file for file in files}
    for name in dict.fromkeys(type(part).__module__ for part in _parts(config)):
        file = None if name in found else _imported(name)
        if file is not None:
            found[name] = file
    return UserCode(tuple(found.values()))


def load_again(folder: Path | str, targets: Sequence[str], command: str) -> UserCode:
    """Load the code of a run: what it recorded must be among ``targets``, or be imported by them.

    A file that has changed since is used, with a warning.

    Args:
        folder: of the run.
        targets: files and modules, which were given on the command line.
        command: what was asked for, such as "resume", to say how it is to be given.

    Raises:
        ValueError: the run needs code that was not given; the message has the whole command.
    """
    recorded = _recorded(Path(folder))
    names = [then["module"] for then in recorded]
    loaded = [load(target, names)[1] for target in targets]
    for then in recorded:
        name = then["module"]
        now = next((file for file in loaded if file.module == name), None) or _imported(name)
        if now is None:
            for other in loaded:
                if other.module not in names:
                    raise ValueError(
                        f"{folder} names its classes by the module {name}, and {other.given} is the module "
                        f"{other.module}: the file's name has to be {name.replace('.', '/')}.py"
                    )
            wanted = shlex.join([command, str(folder), *code_words(folder)])
            raise ValueError(f"{folder} was made with code of your own, {then['given']}; give it: danlu {wanted}")
        if now.sha256 != then["sha256"]:
            _log.warning("%s has changed since %s was made; it is used as it is now", now.given, folder)
    return UserCode(tuple(loaded))


def code_words(folder: Path | str) -> list[str]:
    """Return the words that give a run's code to a command, for people to read; none without such code."""
    return [word for entry in _recorded(Path(folder)) for word in ("--code", entry["given"])]


def call(function: object, name: str) -> object:
    """Return what a function of the user's returns.

    Raises:
        ValueError: it fails; the line is named.
    """
    if not callable(function):
        raise ValueError(f"{name} is no function")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} {_what_failed(error, getattr(function, '__code__', None))}") from error


def _recorded(folder: Path) -> list[dict[str, str]]:
    path = folder / _RECORD
    if not path.is_file():
        return []
    try:
        record = json.loads(path.read_text())
        return [{key: str(entry[key]) for key in ("given", "module", "sha256")} for entry in record]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no record of code: {error}") from error


def _parts(value: object) -> Iterator[object]:
    """Yield every dataclass of a configuration's tree."""
    if dataclasses.is_dataclass(value):
        yield value
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item)


def _imported(name: str) -> CodeFile | None:
    """The file of a module that has been imported; None if it has not, or is danlu's or an installed package's."""
    origin = getattr(sys.modules.get(name), "__file__", None)
    if origin is None or name.partition(".")[0] == "danlu" or not _INSTALLED.isdisjoint(Path(origin).parts):
        return None
    path = Path(origin).absolute()
    return _file(str(path) if path.stem == name else name, name, path)


def _file(given: str, module: str, path: Path | None) -> CodeFile:
    text = b"" if path is None else path.read_bytes()
    return CodeFile(given=given, module=module, sha256=hashlib.sha256(text).hexdigest(), text=text)


def _load_inner(path: Path, name: str, root: Path) -> tuple[ModuleType, CodeFile]:
    """Import a file of a package under its whole name; the package's folder is in ``root``."""
    _search_last(root)
    module, file = _load_module(name)
    if _path_of(module) != path.resolve():
        raise ValueError(f"{path} is not what `import {name}` finds: that is {_path_of(module)}")
    return module, file


def _path_of(module: ModuleType | None) -> Path | None:
    origin = getattr(module, "__file__", None)
    return None if origin is None else Path(origin).resolve()


def _load_file(path: Path, shown: str) -> tuple[ModuleType, CodeFile]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {shown}")
    name = re.sub(r"\W", "_", path.stem)
    file = _file(str(path), name, path)
    held = sys.modules.get(name)
    if held is not None and _path_of(held) == path.resolve():
        return held, file
    _check_name(path, name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _search_last(path.parent)
    _search_last(Path.cwd())
    try:
        # Not by the loader, which would write a __pycache__ and might run an older text than the one recorded.
        exec(compile(file.text, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{path.name} {_what_failed(error, path)}") from error
    return module, file


def _check_name(path: Path, name: str) -> None:
    """Raise if a module of this name exists: imports of it would then find the file."""
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # a module that was made by hand
        found = None
    other = name in sys.stdlib_module_names or name in sys.modules
    if found is not None and found.origin is not None:
        other = other or Path(found.origin).resolve() != path.resolve()
    if other:
        raise ValueError(f"{path.name} has the name of the installed module {name!r}; rename the file")


def _load_module(name: str) -> tuple[ModuleType, CodeFile]:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is neither a file ending in .py nor the name of a module")
    _search_last(Path.cwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"there is no module {error.name!r}, installed or in {Path.cwd()}") from error
        raise ValueError(f"{name} {_what_failed(error, None)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} {_what_failed(error, None)}") from error
    return module, _file(name, name, _path_of(module))


def _search_last(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _what_failed(error: BaseException, source: object) -> str:
    """Say what an exception of the user's code was, and in which line of it."""
    if isinstance(error, SystemExit):
        return "calls sys.exit when it is loaded; only functions and classes may stand outside of `if __name__ ...`"
    # What it imports may be what cannot be read; then the error says where.
    if isinstance(error, SyntaxError) and (source is None or error.filename in (None, str(source))):
        line_of_it = f"line {error.lineno}: " if error.lineno else ""
        return f"cannot be read: {line_of_it}{error.msg}"
    name = str(source) if isinstance(source, Path) else getattr(source, "co_filename", None)
    frames: Iterable[traceback.FrameSummary] = reversed(traceback.extract_tb(error.__traceback__))
    line = next((frame.lineno for frame in frames if frame.filename == name), None)
    where = "" if line is None else f" in line {line}"
    return f"fails{where}: {type(error).__name__}: {' '.join(str(error).split())}"
