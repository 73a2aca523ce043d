"""Another run's trained objective, as a field of a configuration."""

import os
from dataclasses import dataclass
from typing import Annotated

from danlu.config.hints import IsPath

__all__ = ["Pretrained"]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The trained objective of another run, as a field of an objective's configuration.

    The objective is given it in evaluation mode and with averaged weights if the run keeps them.

    Attributes:
        run: the other run's folder; made absolute, so that a run can be resumed from any folder.
    """

    run: Annotated[str, IsPath()]

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not self.run:
            raise ValueError(f"run must be the folder of a finished run, got {self.run!r}")
        object.__setattr__(self, "run", os.path.abspath(self.run))
