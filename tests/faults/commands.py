"""Runs command lines on two processes each: ``python commands.py FOLDER CASES``, CASES being JSON.

A case is ``{name: {"words": [...], "hang": step or null}}``. All processes are forks of one that has imported
everything. What each of them printed goes into ``FOLDER/NAME.RANK``; exit codes and seconds into ``FOLDER/ended.json``.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import toy

import danlu.recipes
import danlu.report
import danlu.train.run
from danlu.cli import main as danlu

CONTEXT = multiprocessing.get_context("fork")


def child(rank: int, port: str, folder: Path, name: str, case: dict[str, Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(DANLU_TIMEOUT="6", DANLU_MARK=str(Path(__file__)))
    with (folder / f"{name}.{rank}").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        torch.set_num_threads(1)
        if rank == 1 and case.get("hang"):
            toy.SIGNALS[case["hang"]] = signal.SIGSTOP
        code = danlu(case["words"])
        sys.stdout.flush()
        os._exit(code)


def main(folder: Path, cases: dict[str, Any]) -> int:
    ended = {}
    for name, case in cases.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        began = time.monotonic()
        processes = [CONTEXT.Process(target=child, args=(rank, port, folder, name, case)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            if not (case.get("hang") and process is processes[1]):
                process.join(60)
        seconds = time.monotonic() - began
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        ended[name] = {"codes": codes, "seconds": seconds}
        (folder / "ended.json").write_text(json.dumps(ended))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
