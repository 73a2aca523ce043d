"""Tests and claims run against a changed copy of the tree, each time in a forked process: for `tools/mutate.py`."""

import contextlib
import doctest
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
_MEMORY = 24 << 30


class Order:
    """The pytest plugin of a try: the quickest test first, without those that fail anyway."""

    def __init__(self, known: dict[str, float]) -> None:
        self.known, self.seconds = known, dict[str, float]()
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Sort the tests by what they took without a change."""
        items[:] = [item for item in items if self.known.get(item.nodeid, 0.0) >= 0]
        items.sort(key=lambda item: self.known.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note durations and failures."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def run_tests(paths: Sequence[str], module: str, known: dict[str, float], *, first: bool) -> dict[str, Any]:
    """Run tests and a module's examples in this process; stop at the first failure where ``first``."""
    import pytest

    order = Order(known)
    quiet = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "--no-header", "-W", "ignore"]
    quiet += ["-x"] if first else []
    code = pytest.main([*quiet, *(f"tests/{path}" for path in paths)], plugins=[order]) if paths else 0
    if code not in (0, 1, 5):
        return {"killed": "collection", "seconds": order.seconds, "failed": order.failed}
    if order.failed and first:
        return {"killed": order.failed[0]}
    examples = _examples(module) if module and known.get("examples", 0.0) >= 0 else ""
    if examples:
        order.failed.append("examples")
    return {"killed": examples or None, "seconds": order.seconds, "failed": order.failed}


def _examples(module: str) -> str:
    importlib.import_module(module)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    report = io.StringIO()
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=_FLAGS, verbose=False)
    for test in finder.find(sys.modules[module], module):
        if runner.run(test, out=report.write, clear_globs=False).failed:
            return f"example of {test.name}"
    return ""


def run_claims(methods: Sequence[str], known: dict[str, float], *, first: bool) -> dict[str, Any]:
    """Measure the quick claims of methods in this process; stop at the first that does not hold where ``first``."""
    claims = importlib.import_module("danlu.claims")
    chosen = [(name, claim) for name, claim in claims.select(methods) if not claim.slow and known.get(name, 0.0) >= 0]
    seconds, failed = dict[str, float](), []
    for name, claim in sorted(chosen, key=lambda pair: known.get(pair[0], 0.0)):
        started = time.perf_counter()
        if claims.judge(name, claim).verdict != "holds":
            failed.append(name)
            if first:
                return {"killed": name}
        seconds[name] = time.perf_counter() - started
    return {"killed": None, "seconds": seconds, "failed": failed}


class Tree:
    """A copy of the tree in a temporary folder, in which one file at a time is changed."""

    def __init__(self, root: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mutate-"))
        for name in ("src", "tests"):
            shutil.copytree(root / name, self.path / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in root.iterdir():
            if path.name not in ("src", "tests", "runs") and not path.name.startswith("."):
                (self.path / path.name).symlink_to(path)

    def remove(self) -> None:
        """Delete the copy."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, file: str, source: str) -> None:
        """Write a source file; nothing compiled of it is left."""
        path = self.path / "src" / "danlu" / file
        path.write_text(source, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def run(self, work: Callable[[], dict[str, Any]], limit: float, *, keep: bool = False) -> dict[str, Any]:
        """Do ``work`` in a forked process whose danlu is this tree's; its result, or what ended it.

        ``keep`` lets Python keep what it compiles, which is for the unchanged tree.
        """
        started = time.perf_counter()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._enter(writing, work, keep)
        os.close(writing)
        answer, status = bytearray(), None
        os.set_blocking(reading, False)
        while status is None:
            if time.perf_counter() - started > limit:
                break
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            answer += _read(reading)
            time.sleep(0.02 if status is None else 0.0)
        answer += _read(reading)
        os.close(reading)
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            result: dict[str, Any] = {"killed": f"no end in {limit:.0f} s"}
        else:
            result = json.loads(answer) if answer else {"killed": f"the process ended with status {status}"}
        return {**result, "took": round(time.perf_counter() - started, 2)}

    def _enter(self, writing: int, work: Callable[[], dict[str, Any]], keep: bool) -> None:
        try:
            os.setsid()
            os.chdir(self.path)
            sys.path[:0] = [str(self.path / "src"), str(self.path / "tests")]
            os.environ["PYTHONPATH"] = str(self.path / "src")
            sys.dont_write_bytecode = not keep
            os.environ["PYTHONDONTWRITEBYTECODE"] = "" if keep else "1"
            resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            sys.argv = ["mutate"]
            # Reading every installed package's entry points for plugins takes longer than most tests.
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            before = set(sys.modules)
            try:
                answer = work()
                if keep:
                    answer["modules"] = [name for name in set(sys.modules) - before if self._foreign(name)]
            except BaseException as problem:  # an import that fails notices the change as well
                answer = {"killed": f"{type(problem).__name__}: {problem}"[:200], "seconds": {}, "failed": ["import"]}
            data = json.dumps(answer).encode()
            os.set_blocking(writing, True)
            while data:
                data = data[os.write(writing, data) :]
        finally:
            os._exit(0)

    def _foreign(self, name: str) -> bool:
        """Say whether a module that a try has imported is the same for every mutant: from no file of this tree."""
        file = getattr(sys.modules[name], "__file__", None)
        return file is not None and not Path(file).is_relative_to(self.path) and "danlu" not in name


def _read(pipe: int) -> bytes:
    data = b""
    try:
        while block := os.read(pipe, 1 << 16):
            data += block
    except BlockingIOError:
        pass
    return data


def preload(modules: Sequence[str]) -> None:
    """Import what the tries of one file need beside danlu, in the process that they are forked from."""
    for name in sorted(modules):
        with contextlib.suppress(BaseException):
            importlib.import_module(name)
