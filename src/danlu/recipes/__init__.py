"""Complete run configurations, one function each: ``load(name)`` returns the tree that ``danlu train NAME`` runs.

A recipe is a public function without arguments in a file of this folder, annotated ``-> RunConfig``; its name is the
function's with hyphens, its summary the first line of its docstring. The files are read, not imported, to list them.
An installed package adds recipes by the entry point group ``danlu.recipes``.
"""

import ast
import functools
import importlib
import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from danlu._validate import nearest

if TYPE_CHECKING:
    from danlu.train import RunConfig

__all__ = ["REGISTRY", "Recipe", "installed", "load"]

_log = logging.getLogger("danlu.recipes")


@dataclass(frozen=True)
class Recipe:
    """What a recipe trains, and where it is: ``module:function``."""

    summary: str
    target: str


def _own() -> dict[str, Recipe]:
    """Read the recipes out of this folder: language models first, then what comes next in a file."""
    found: dict[str, Recipe] = {}
    folder = Path(__file__).parent
    files = sorted(folder.glob("[!_]*.py"), key=lambda path: (path.stem != "lm", path.stem))
    for path in files:
        for node in ast.parse(path.read_bytes()).body:
            if (
                isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and not (node.args.args or node.args.posonlyargs or node.args.kwonlyargs)
                and isinstance(node.returns, ast.Name)
                and node.returns.id == "RunConfig"
            ):
                summary = (ast.get_docstring(node) or "").partition("\n")[0].removesuffix(".")
                found[node.name.replace("_", "-")] = Recipe(summary, f"danlu.recipes.{path.stem}:{node.name}")
    groups = list(dict.fromkeys(name.partition("-")[0] for name in found))
    return dict(sorted(found.items(), key=lambda item: groups.index(item[0].partition("-")[0])))


REGISTRY: dict[str, Recipe] = _own()
"""Every recipe of danlu by name."""


def installed() -> dict[str, Recipe]:
    """Return the recipes that installed packages register, by name.

    One that has the name of a recipe of danlu, or of another package's, is left out with a warning.
    """
    claims: dict[str, dict[str, Recipe]] = {}
    for entry in importlib.metadata.entry_points(group="danlu.recipes"):
        package = entry.dist.name if entry.dist is not None else "an installed package"
        # By target: a package that is installed twice registers the same recipe twice.
        claims.setdefault(entry.name, {})[entry.value] = Recipe(f"of {package}", entry.value)
    found: dict[str, Recipe] = {}
    for name, claim in claims.items():
        if name in REGISTRY or len(claim) > 1:
            there = "danlu has one of this name" if name in REGISTRY else "several packages have one of this name"
            ways = " or ".join(f"danlu train {target}" for target in claim)
            packages = " and ".join(dict.fromkeys(recipe.summary.removeprefix("of ") for recipe in claim.values()))
            _warn_once(f"the recipe {name!r} of {packages} is left out: {there}; run it by {ways}")
        else:
            found[name] = next(iter(claim.values()))
    return found


@functools.cache
def _warn_once(sentence: str) -> None:
    _log.warning("%s", sentence)


def load(name: str) -> "RunConfig":
    """Return the configuration of a recipe of danlu.

    Raises:
        ValueError: no such recipe; the nearest name is suggested.

    >>> load("lm-basline")
    Traceback (most recent call last):
    ...
    ValueError: no recipe is called 'lm-basline'; did you mean 'lm-baseline'? All: lm, ...
    """
    if name not in REGISTRY:
        close = nearest(name, REGISTRY)
        hint = f"; did you mean {close!r}?" if close else "."
        raise ValueError(f"no recipe is called {name!r}{hint} All: {', '.join(REGISTRY)}")
    module, _, function = REGISTRY[name].target.partition(":")
    config: RunConfig = getattr(importlib.import_module(module), function)()
    return config
