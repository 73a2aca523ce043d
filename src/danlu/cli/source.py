"""Where a run's configuration comes from: a recipe, code of your own, a saved configuration, and what changes it."""

import argparse
import inspect
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from danlu._validate import nearest
from danlu.usercode import CodeFile, UserCode, call, code_of, load

if TYPE_CHECKING:
    from danlu.config.tree import Reader
    from danlu.train import RunConfig

__all__ = ["FIXED", "configure", "is_code", "recipe_of"]

# It says where a configuration comes from; the first word of `danlu train` chooses it.
FIXED = ("recipe",)


def is_code(word: str) -> bool:
    """Whether a word names code rather than a recipe of danlu or of an installed package.

    >>> [is_code(word) for word in ("my_recipe.py", "my_recipe.py:smooth", "package.module:smooth", "lm-dense")]
    [True, True, True, False]
    """
    return word.endswith(".py") or ":" in word


def recipe_of(word: str) -> "tuple[str, RunConfig, tuple[CodeFile, ...]]":
    """Return the name of a recipe, its configuration, and the code of the user's that it came from.

    Raises:
        ValueError, OSError: there is no such recipe, file, module or function, or it fails.
    """
    from danlu import recipes

    if word in recipes.REGISTRY:
        return word, recipes.load(word), ()
    more = recipes.installed()
    if word in more:
        target, _, function = more[word].target.partition(":")
        module, file = load(target)
        return word, replace(_called(module, function or _only(module, target), word), recipe=word), (file,)
    if not is_code(word) and not ("." in word and all(part.isidentifier() for part in word.split("."))):
        known = [*recipes.REGISTRY, *more]
        close = nearest(word, known)
        hint = f"; did you mean {close!r}?" if close else f". All: {', '.join(known)}."
        file_hint = f" {word}.py is a file: danlu train {word}.py." if Path(f"{word}.py").is_file() else ""
        data_hint = " Data are given by --data." if Path(word).exists() or "/" in word or "." in word else ""
        raise ValueError(f"no recipe is called {word!r}{hint}{file_hint}{data_hint}")
    target, function = word, ""
    if ":" in word and not word.endswith(".py"):
        target, _, function = word.rpartition(":")
        if not function:
            raise ValueError(f"{word!r} names no function after the colon")
    if not target.endswith(".py") and Path(word).exists():
        raise ValueError(f"no recipe is called {word!r}. Data are given by --data.")
    module, file = load(target)
    shown = Path(target).name if target.endswith(".py") else target
    chosen = function or _only(module, shown)
    name = file.module if not function else f"{file.module}:{function}"
    config = _called(module, chosen, f"{shown}:{chosen}")
    return name, replace(config, recipe=name), (file,)


def configure(arguments: argparse.Namespace) -> "tuple[str, RunConfig, UserCode]":
    """Return the name, the configuration and the user's code that the words of ``danlu train`` say.

    Raises:
        ValueError, TypeError, OSError: one of them is wrong.
    """
    from danlu.cli.overrides import change, one_length
    from danlu.config import Draft, absolute_paths, flatten
    from danlu.config.migrations import migrate
    from danlu.config.tree import Reader
    from danlu.recipes import REGISTRY

    files = [load(target)[1] for target in arguments.code or ()]
    reader = Reader()
    path = Path(arguments.config or "")
    saved = None if arguments.config is None else migrate(_object(path), str(path))
    if saved is not None and arguments.recipe is None:
        config = _complete(saved, reader, path)
        name, draft = config.recipe, Draft.of(config)
    else:
        name, config, own = recipe_of(arguments.recipe or "lm")
        files += own
        draft = Draft.of(config)
        part = {key: value for key, value in (saved or {}).items() if key not in FIXED}
        draft.overlay(part, reader)
        one_length(draft, flatten(part))

    def find(word: str) -> Any:
        target, _, cls = word.rpartition(":")
        module, file = load(target)
        if not isinstance(found := getattr(module, cls, None), type) or not hasattr(found, "__dataclass_fields__"):
            raise ValueError(f"{target} has no dataclass {cls!r}")
        if not file.module.startswith("danlu."):
            files.append(file)
        return found

    for word in arguments.data or ():
        if word in REGISTRY and not Path(word).exists():
            raise ValueError(f"--data takes the words that follow it: put the recipe {word!r} before --data")
    data = ["--data.path", *arguments.data] if arguments.data else []
    reader.old += change(draft, [*data, *arguments.overrides], fixed=FIXED, find=find)
    reader.warn()
    config = absolute_paths(draft.build())
    return name, config, code_of(config, files)


def _object(path: Path) -> dict[str, Any]:
    """What a file of JSON holds, which must be an object."""
    from danlu.config.tree import parse

    tree = parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(tree).__name__}")
    return tree


def _complete(tree: dict[str, Any], reader: "Reader", path: Path) -> "RunConfig":
    """The configuration of a file that is not a part of one."""
    from danlu.train import RunConfig

    try:
        return reader.read(RunConfig, tree, "")
    except ValueError as error:
        part = "is missing and has no default" in str(error)
        more = f"; a part of a configuration changes a recipe: danlu train RECIPE --config {path}" if part else ""
        raise ValueError(f"{path}: {error}{more}") from error


def _only(module: ModuleType, shown: str) -> str:
    """The name of the function of a module that is its recipe."""
    own = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    free = {name: value for name, value in own.items() if not _required(value)}
    annotated = [n for n, value in free.items() if "RunConfig" in str(value.__annotations__.get("return", ""))]
    names = annotated or list(free)
    if len(names) == 1:
        return names[0]
    stem = module.__name__.rpartition(".")[2]
    chosen = next((name for name in (stem, "recipe") if name in names), None)
    if chosen is not None:
        return chosen
    if not names:
        raise ValueError(f"{shown} has no function without arguments that returns a RunConfig")
    raise ValueError(f"{shown} has several recipes; choose one: {', '.join(f'{shown}:{name}' for name in names)}")


def _required(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _called(module: ModuleType, function: str, shown: str) -> "RunConfig":
    from danlu.train import RunConfig

    found = getattr(module, function, None)
    if found is None:
        there = [name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")]
        close = nearest(function, there)
        hint = f"; did you mean {close!r}?" if close else f"; it has {', '.join(there) or 'none'}"
        raise ValueError(f"{module.__name__} has no function {function!r}{hint}")
    if inspect.isfunction(found) and _required(found):
        raise ValueError(f"{shown} must be a function without arguments")
    config = call(found, shown)
    if not isinstance(config, RunConfig):
        raise ValueError(f"{shown} must return a RunConfig, got {type(config).__name__}")
    return config
