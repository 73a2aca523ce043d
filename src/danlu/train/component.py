"""What a configuration is the configuration of, found beside it: the rule by which a recipe needs no registry."""

import re
import sys
from typing import Any

__all__ = ["component", "opener"]


def component(config: Any) -> Any:
    """Return the class that a configuration is the configuration of: ``X`` beside ``XConfig``.

    Raises:
        TypeError: the configuration's module has no such class.

    >>> from danlu.models import TransformerConfig
    >>> component(TransformerConfig()).__name__
    'Transformer'
    """
    kind = type(config)
    found = getattr(sys.modules[kind.__module__], kind.__name__.removesuffix("Config"), None)
    if found is None or found is kind:
        raise TypeError(f"{kind.__module__} has no class {kind.__name__.removesuffix('Config')} beside {kind.__name__}")
    return found


def opener(config: Any) -> Any:
    """Return the function that opens the data of a configuration: ``open_x`` beside ``XConfig``.

    Raises:
        TypeError: the configuration's module has no such function.

    >>> from danlu.data.text import TextConfig
    >>> opener(TextConfig()).__name__
    'open_text'
    """
    kind = type(config)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__.removesuffix("Config")).lower()
    found = getattr(sys.modules[kind.__module__], f"open_{snake}", None)
    if found is None:
        raise TypeError(f"{kind.__module__} has no function open_{snake} beside {kind.__name__}")
    return found
