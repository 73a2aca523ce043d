"""danlu: methods that decide how well a model trains, usable alone and together.

The rooms (``approx``, ``linalg``, ``optim``, ``nn``, ``distributions``, ``diffusion``, ``analysis``, ``models``,
``objectives``, ``data``, ``train``, ``interop``, ``report``, ``recipes``, ``claims``) are imported when they are first
touched, so that ``import danlu`` itself loads nothing heavy.

>>> import danlu
>>> danlu.__version__
'0.1.0'
"""

import importlib
import importlib.util
from types import ModuleType

__version__ = "0.1.0"

_ROOMS = (
    "approx",
    "linalg",
    "optim",
    "nn",
    "distributions",
    "diffusion",
    "analysis",
    "models",
    "objectives",
    "data",
    "train",
    "interop",
    "serve",
    "report",
    "recipes",
    "claims",
)


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS and importlib.util.find_spec(f"danlu.{name}") is not None:
        return importlib.import_module(f"danlu.{name}")
    raise AttributeError(f"module 'danlu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
