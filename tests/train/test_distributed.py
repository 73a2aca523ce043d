"""Two processes train what one trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from danlu.train import checkpoint, resume, train
from danlu.train.distributed import World, barrier, broadcast, gather, init_distributed, sum_over_ranks, world


def two_processes(words: list[str], cache: Path, *, second: list[str]) -> list[int]:
    """Run ``toy.py`` twice as ``torchrun`` would; ``second`` are further words for the second process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(toy.__file__), *words, *(second if rank else [])],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "DANLU_CACHE": str(cache)},
        )
        for rank in range(2)
    ]
    try:
        return [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("double")
def test_two_processes_interrupted_and_resumed_by_one_train_what_one_trains(tmp_path: Path, cache: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train(toy.plain_config(steps=6, accumulate=2), alone, quiet=True) == 0
    words = ["train", str(together), "--plain", "--steps", "6", "--accumulate", "2"]
    # Only one process is asked to stop, in its fifth micro-batch: both finish that step, and no other.
    assert two_processes(words, cache, second=["--interrupt-at", "7"]) == [143, 143]
    newest = toy.newest(together)
    saved = checkpoint.load(newest)
    stopped = saved.step
    assert stopped in (4, 5)
    assert len(saved.state["rng"]) == 2
    assert resume(together, quiet=True) == 0
    for one, two in zip(records(alone), records(together), strict=True):
        assert one.keys() == two.keys()
        for key in ("step", "items", "lr"):
            assert one[key] == two[key]
        for key in {"loss", "grad_norm", "val_loss"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-10)
    final = [checkpoint.load(run / "checkpoints" / "step-00000006").state["objective"] for run in (alone, together)]
    for name, value in final[0].items():
        if name != "model.calls":  # one process was called twice as often
            torch.testing.assert_close(value, final[1][name], rtol=1e-10, atol=1e-12)


def test_a_process_alone_is_a_world_of_one() -> None:
    with init_distributed("cpu") as place:
        assert place == World(0, 1, 0) == world()
        assert place.main
        values = torch.ones(2)
        assert sum_over_ranks(values) is values
        assert gather({"a": 1}) == [{"a": 1}]
        assert broadcast("x") == "x"
        barrier()
