"""What all configurations have in common."""

from typing import Any, ClassVar, Protocol

__all__ = ["Config"]


class Config(Protocol):
    """What all configurations have in common: they are dataclasses, frozen and keyword-only by convention."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
