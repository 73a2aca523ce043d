"""What changed in saved configurations from release to release: the one place that knows old files.

A renamed field is not here: its class names it in ``renamed``. A key that is absent needs nothing, it takes today's
default.
"""

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["FORMAT", "MOVED", "migrate"]

FORMAT = 2
"""Number that a configuration is written with under ``"format"``; a file without one is of format 1."""

MOVED: dict[str, str] = {
    "danlu.optim.build:AdamWConfig": "danlu.optim.adamw:AdamWConfig",
    "danlu.optim.build:AmosConfig": "danlu.optim.amos:AmosConfig",
    "danlu.optim.build:LionConfig": "danlu.optim.lion:LionConfig",
    "danlu.optim.build:MuonConfig": "danlu.optim.muon:MuonConfig",
    "danlu.optim.build:TigerConfig": "danlu.optim.tiger:TigerConfig",
}
"""Classes that open places were written with, ``module:Class`` as it was to what it is now.

Not needed for a class that its place knows by name: there the old module is ignored.
"""


def _all_decayed(tree: dict[str, Any]) -> dict[str, Any]:
    """In format 1 Muon's configuration decayed gains and biases unless it said otherwise.

    That format also names the module of every component; the reader takes both forms.
    """
    optim = tree.get("optim")
    if isinstance(optim, Mapping) and str(optim.get("type")).rpartition(":")[2] == "MuonConfig":
        return {**tree, "optim": {"no_decay": [], **optim}}
    return tree


def _latents_normed(tree: dict[str, Any]) -> dict[str, Any]:
    """In format 1 a Transformer's ``norm_eps`` did not reach the norms of MLA's latents, which had 1e-6."""

    def told(mixer: Any) -> Any:
        latent = isinstance(mixer, Mapping) and str(mixer.get("type")).rpartition(":")[2] == "MLAConfig"
        return {"norm_eps": 1e-6, **mixer} if latent else mixer

    model = tree.get("model")
    if not isinstance(model, Mapping) or model.get("norm_eps", 1e-6) == 1e-6:
        return tree
    held = {"attention": told(model["attention"])} if "attention" in model else {}
    if "mixers" in model:
        held["mixers"] = [told(mixer) for mixer in model["mixers"]]
    return {**tree, "model": {**model, **held}}


def _first(tree: dict[str, Any]) -> dict[str, Any]:
    return _latents_normed(_all_decayed(tree))


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _first}
"""From a format to the next one."""


def migrate(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the tree of a saved configuration in today's form, without its format number.

    Raises:
        ValueError: the format is not a number that this release knows.

    >>> migrate({"format": 2, "seed": 0}, "config.json")
    {'seed': 0}
    """
    tree = dict(document)
    number = tree.pop("format", 1)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name}: format must be an integer from 1 to {FORMAT}, got {number!r}")
    if number > FORMAT:
        raise ValueError(f"{name} has format {number}, this release of danlu reads up to {FORMAT}: use a newer one")
    for step in range(number, FORMAT):
        tree = _STEPS[step](tree)
    return tree
