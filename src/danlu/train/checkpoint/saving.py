"""Saves a run's checkpoints, on the training thread or off it."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from danlu.optim._sharded import local
from danlu.train.checkpoint.packing import pack
from danlu.train.checkpoint.writing import Packed, write
from danlu.train.distributed import time_limit, world

__all__ = ["Saver"]

_LOG = logging.getLogger(__name__)


class Saver:
    """Save the checkpoints of one run, one after the other; all processes make one and call the same methods.

    In the background a save copies the state to the memory of the host (pinned where it comes from a GPU; the copies
    are kept for the next save) and returns; a thread does the rest, and speaks with those of the other processes in a
    process group of its own. The next save waits for it.

    Args:
        folder: the run's ``checkpoints`` folder; None saves nothing.
        background: whether :meth:`save` returns before the checkpoint is complete.
        options: of every save, as of :func:`danlu.train.checkpoint.save`.
    """

    def __init__(self, folder: Path | None, *, background: bool = False, **options: Any) -> None:
        self.folder, self.background, self.options = folder, background, options
        self.group = (
            dist.new_group(backend="gloo", timeout=time_limit()) if world().size > 1 and folder is not None else None
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed, as far as this process knows by now; :meth:`wait` raises why."""
        return self._error is not None

    def save(self, step: int, state: Any, *, metrics: Mapping[str, Any] | None = None) -> None:
        """Write ``state``, or copy it and have it written.

        Raises:
            CheckpointError: it, or the one before, could not be written.
        """
        self.wait()
        folder = self.folder
        if folder is None:
            return
        options = {**self.options, "metrics": metrics, "group": self.group}
        if not self.background:
            write(folder, step, Packed.of(state), **options)
            return
        tensors, tree = pack(state)
        held, arrived = self._copies(tensors)

        def work() -> None:
            try:
                arrived()
                write(folder, step, Packed(tensors, held, tree), **options)
            except BaseException as error:  # raised where the run can end: on the training thread
                self._error = error

        # A second Ctrl-C ends the program at once, as it does in a save on the training thread.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self) -> None:
        """Wait for the save under way where another error ends the run already: its own is only logged."""
        try:
            self.wait()
        except (Exception, SystemExit) as error:
            _LOG.warning("%s", error)

    def _copies(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Copies of what this process holds, and what to call before they are read."""
        copies: dict[str, Tensor] = {}
        device: torch.device | None = None
        for path, tensor in tensors.items():
            held, kept = local(tensor), self._buffers.get(path)
            if kept is None or kept.shape != held.shape or kept.dtype != held.dtype:
                kept = torch.empty(held.shape, dtype=held.dtype, pin_memory=held.is_cuda)
            copies[path] = kept.copy_(held, non_blocking=True)
            device = held.device if held.is_cuda else device
        self._buffers = copies
        if device is None:
            return copies, lambda: None
        # Later kernels of the stream wait for the copies; this thread waits for neither.
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return copies, event.synchronize
