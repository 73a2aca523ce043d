"""Where danlu keeps what it can make again: prepared data, measurements of the machine, feature networks."""

import os
from pathlib import Path


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache folder: the argument, else ``$DANLU_CACHE``, ``$XDG_CACHE_HOME/danlu`` or ``~/.cache/danlu``.

    >>> cache_folder("somewhere").name
    'somewhere'
    """
    if folder is not None:
        return Path(folder)
    if own := os.environ.get("DANLU_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "danlu"
    try:
        return Path.home() / ".cache" / "danlu"
    except RuntimeError:
        # A container may run as a user that the system does not know.
        raise OSError("this user has no home folder to keep the cache in: set DANLU_CACHE to a folder") from None
