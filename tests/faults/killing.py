"""Kills training processes at drawn instants and resumes them: ``python killing.py FOLDER INSTANTS SEED``.

All are forks of one process that has imported everything, so that an instant costs a fraction of a second. An instant
is drawn in one of three ways: a time (a real SIGKILL from outside, also within native code), the n-th call of a Python
function of the whole run, or the n-th one within a save, from its first line to the removal of old checkpoints. What
was found goes into ``FOLDER/outcomes.json``: for every instant how it was chosen, the step that the run went on from,
and what differs from the run that nobody disturbed (nothing, that is).
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import toy

from danlu.train import checkpoint, train
from danlu.train.checkpoint import saving

CONTEXT = multiprocessing.get_context("fork")
KINDS = ("time", "call", "save")
Word = tuple[str, float]


class Count:
    """Counts calls of Python functions, all or those within saves, and kills this process at the one that was drawn."""

    def __init__(self, kind: str, at: float) -> None:
        self.kind, self.at, self.count = kind, at, 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self) -> "Count":
        if self.kind == "save":
            real = saving.write

            def write(*words: Any, **more: Any) -> Path:
                sys.setprofile(self)
                try:
                    return real(*words, **more)
                finally:
                    sys.setprofile(None)

            saving.write = write
        elif self.kind == "call":
            sys.setprofile(self)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)


def config() -> Any:
    return toy.run_config(ema=0.9, keep=2)


def begin(run: Path, kind: str = "", at: float = 0.0) -> None:
    """Train a new run, under a count if it is asked for, which is left beside the folder."""
    with Count(kind, at) as count:
        assert train(config(), run, quiet=True) == 0
    if kind:
        run.with_suffix(f".{kind}.{os.environ.get('RANK', 0)}").write_text(str(count.count))


def go_on(run: Path, kind: str = "", at: float = 0.0) -> None:
    """Start or continue: the same line as before the kill."""
    with Count(kind, at):
        assert train(config(), run, quiet=True, restartable=True) == 0


def compare(run: Path, undisturbed: Path) -> None:
    """Hold losses and all that the last checkpoint has to those of the other run, bit for bit."""
    assert records(run) == records(undisturbed), "the losses differ"
    assert state(run) == state(undisturbed), "the states differ"
    assert not list((run / "checkpoints").glob(".*")), "something is left of a save"


def records(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [sorted((k, v) for k, v in line.items() if k not in ("time", "items_per_second", "mfu")) for line in lines]


def state(run: Path) -> dict[str, Any]:
    tensors, tree = checkpoint.pack({**checkpoint.load(toy.newest(run)).state, "seconds": 0})
    return {"tree": json.dumps(tree), **{name: tensor.numpy().tobytes() for name, tensor in tensors.items()}}


def start(processes: int, do: Callable[..., None], run: Path, words: Word = ("", 0.0), victim: int = 0) -> list[Any]:
    """Start ``do(run, *words)`` on so many processes, of which only the victim gets ``words``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)} if processes > 1 else {}
        place |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "DANLU_TIMEOUT": "20"} if processes > 1 else {}
        mine = words if rank == victim else ("", 0.0)
        started.append(CONTEXT.Process(target=_child, args=(place, run, do, mine), daemon=True))
        started[-1].start()
    return started


def _child(place: dict[str, str], run: Path, do: Callable[..., None], words: Word) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    sys.stderr = (run.parent / f"{run.name}.said.{place.get('RANK', 0)}").open("a")
    try:
        do(run, *words)
    except (Exception, SystemExit) as error:
        text = "".join(traceback.format_exception(error)[-12:])
        (run.parent / f"{run.name}.wrong.{place.get('RANK', 0)}").write_text(text)
        os._exit(3)
    os._exit(0)


def wait(processes: list[Any], seconds: float = 120.0) -> list[int | None]:
    """Wait for all; those that are still there are killed, and their code is None."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    late = [process.pid for process in processes if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    return [None if process.pid in late else process.exitcode for process in processes]


class Study:
    """Instants for one number of processes."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder / f"of {processes}", processes
        self.folder.mkdir()
        self.undisturbed = self.folder / "undisturbed"
        self.most: dict[str, float] = {}
        self.late = 0
        for kind in ("", *KINDS[1:]):
            run = self.folder / f"counted-{kind}" if kind else self.undisturbed
            began = time.monotonic()
            assert wait(start(processes, begin, run, (kind, 0.0))) == [0] * processes
            self.most[kind or "time"] = (
                float(run.with_suffix(f".{kind}.0").read_text()) if kind else time.monotonic() - began
            )

    def instant(self, number: int, generator: random.Random, name: int) -> dict[str, Any]:
        """Kill a run at a drawn instant, go on with it, and compare."""
        kind, victim = KINDS[number % len(KINDS)], generator.randrange(self.processes)
        at = generator.uniform(0.0, self.most[kind])
        at = at if kind == "time" else float(int(at) + 1)
        run = self.folder / f"run{name}-{self.late}"
        processes = start(self.processes, begin, run, ("" if kind == "time" else kind, at), victim)
        if kind == "time":
            time.sleep(at)
            if processes[victim].is_alive():
                os.kill(processes[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        codes = wait(processes, 50.0)
        found = {"kind": kind, "at": at, "processes": self.processes, "victim": victim, "codes": codes}
        found |= {"killed": codes[victim] == -signal.SIGKILL, "others ended in": time.monotonic() - began}
        names = [path.name for path in checkpoint.checkpoints(run / "checkpoints")]
        lines = len(records_whole(run))
        found |= {"from": int(names[-1][5:13]) if names else 0, "logged": lines}
        found["in a save"] = bool(list((run / "checkpoints").glob(".*")))
        for path in run.parent.glob(f"{run.name}.wrong.*"):
            path.unlink()
        codes = wait(start(self.processes, go_on, run))
        wrong = [path.read_text() for path in run.parent.glob(f"{run.name}.wrong.*")] if any(codes) else []
        if not wrong and not any(codes):
            found["differs"] = difference(run, self.undisturbed)
        else:
            found["differs"] = f"resume ended with {codes}: {' '.join(wrong)}"
        return found


def records_whole(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def difference(run: Path, undisturbed: Path) -> str:
    try:
        compare(run, undisturbed)
    except AssertionError as error:
        return str(error)
    return ""


def main(folder: Path, instants: int, seed: int) -> int:
    generator = random.Random(seed)
    torch.set_num_threads(1)
    outcomes = []
    for processes in (1, 2):
        study = Study(folder, processes)
        # Two processes cost more: a quarter of the instants is theirs.
        for number in range(instants // 4 if processes == 2 else instants - instants // 4):
            # An instant after the end of the run is drawn again.
            while not (found := study.instant(number, generator, len(outcomes)))["killed"]:
                study.late += 1
            outcomes.append({**found, "drawn too late": study.late})
            (folder / "outcomes.json").write_text(json.dumps(outcomes, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
