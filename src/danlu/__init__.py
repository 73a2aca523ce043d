"""danlu: methods that decide how well a model trains, usable alone and together.

Its packages (``danlu.optim``, ``danlu.nn``, ...; ``dir(danlu)`` lists them) are imported when they are
first used, so that ``import danlu`` itself loads nothing heavy.

>>> import danlu
>>> danlu.__version__
'0.2.0.dev0'
>>> "optim" in dir(danlu)
True
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> ModuleType:
    if not name.startswith("_") and importlib.util.find_spec(f"danlu.{name}") is not None:
        return importlib.import_module(f"danlu.{name}")
    raise AttributeError(f"module 'danlu' has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted({*globals(), *(name for name in modules if not name.startswith("_"))})
