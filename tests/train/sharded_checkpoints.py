"""Checks of checkpoints by several processes, for ``test_checkpoint_sharded.py``: ``python THIS_FILE FOLDER``.

Each check is a function of its folder and runs in a world of two or four processes, as its name ends; what it raises
goes into ``FOLDER/NAME.RANK``. All are forks of one process that has imported everything.
"""

import errno
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from danlu.train import checkpoint, resume, train
from danlu.train.checkpoint import layout, writing
from danlu.train.parallel import ParallelConfig
from danlu.train.together import agree, everyone, first

SHAPES = {"matrix": (13, 5), "few rows": (3, 7), "one": (1,), "vector": (11,), "scalar": (), "tall": (7, 2)}
RUNS = {"copies": None, "sharded": 1}  # runs that go on with other numbers of processes, and their replicas
PLAIN = torch.arange(5.0, dtype=torch.float32)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float32) for name, shape in SHAPES.items()}


def shared(seed: int = 0, *, replicas: int = 1) -> dict[str, Tensor]:
    """The same, divided among the processes; scalars are whole on each."""
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas))
    return {
        name: distribute_tensor(value, mesh, [Replicate(), Shard(0) if value.dim() else Replicate()])
        for name, value in tensors(seed).items()
    }


def put(folder: Path, step: int, held: dict[str, Tensor], **options: Any) -> Path:
    state = {"weights": held, "plain": PLAIN + dist.get_rank(), "step": step}
    return checkpoint.save(folder / "checkpoints", step, state, **{"config": {}, "keep": 9, **options})


def same(held: dict[str, Tensor], seed: int = 0) -> None:
    for name, value in tensors(seed).items():
        whole = held[name].full_tensor() if hasattr(held[name], "full_tensor") else held[name]
        assert torch.equal(whole, value), name


def check_what_other_numbers_of_processes_wrote_is_read_2(folder: Path) -> None:
    into = {"weights": {name: torch.zeros_like(value) for name, value in shared().items()}}
    for path in checkpoint.checkpoints(folder.parent / "alone" / "checkpoints"):
        state = checkpoint.load(path, into=into).state
        same(state["weights"])
        same(into["weights"])
    put(folder.parent / "by two", 2, shared())


def check_what_other_numbers_of_processes_wrote_is_read_4(folder: Path) -> None:
    for replicas in (1, 2):
        into = {"weights": {name: torch.zeros_like(value) for name, value in shared(replicas=replicas).items()}}
        for writers in ("alone", "by two"):
            (path,) = checkpoint.checkpoints(folder.parent / writers / "checkpoints")
            checkpoint.load(path, into=into)
            same(into["weights"])
        put(folder.parent / "by four", replicas, shared(replicas=replicas))


def check_each_process_reads_only_its_shard_4(folder: Path) -> None:
    path = put(folder, 1, shared())
    into = {"weights": {name: torch.zeros_like(value) for name, value in shared().items()}}
    read: list[int] = []
    copy = Tensor.copy_
    Tensor.copy_ = lambda self, other, *a: read.append(other.numel()) or copy(self, other, *a)  # type: ignore[method-assign]
    try:
        checkpoint.load(path, parts=["weights"], into=into)
    finally:
        Tensor.copy_ = copy  # type: ignore[method-assign]
    assert sum(read) == sum(value.to_local().numel() for value in into["weights"].values()), read


def check_every_process_writes_and_replicas_are_written_once_4(folder: Path) -> None:
    path = put(folder, 1, shared(replicas=2))
    sizes = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
    assert len(sizes) == 4, sizes
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in path.glob("*.safetensors"))
    elements = sum(value.numel() for value in tensors().values()) + 5
    assert sum(sizes.values()) - headers == 4 * elements
    assert torch.equal(checkpoint.load(path).state["plain"], PLAIN)  # the first process's


def check_a_full_disk_on_one_process_ends_all_and_leaves_the_checkpoint_before_2(folder: Path) -> None:
    put(folder, 1, shared())
    real = writing.save_file

    def full(*words: Any, **more: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*words, **more)

    writing.save_file = full
    try:
        with told("no space left on the disk to save .*step-00000002; the checkpoint step-00000001 is intact"):
            put(folder, 2, shared())
    finally:
        writing.save_file = real
    first(lambda: alone_in(folder, ["step-00000001"]))


def check_a_checkpoint_without_the_files_of_one_process_is_named_2(folder: Path) -> None:
    put(folder, 1, shared(1))
    path = put(folder, 2, shared(2))
    first(lambda: next(path.glob("shard-00002-*")).unlink())
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.step == 1
    first(lambda: next(found.path.glob("shard-00001-*")).unlink())
    with told("no checkpoint of .*; .*shard-00001-.* is missing, one of those that 2 processes wrote"):
        checkpoint.newest(folder)


def check_the_processes_share_the_work_of_checking_4(folder: Path) -> None:
    path = put(folder, 1, shared())
    hashed: list[str] = []
    real = layout.checksum
    layout.checksum = lambda file: hashed.append(file.name) or real(file)  # type: ignore[func-returns-value]
    try:
        found = checkpoint.newest(folder)
    finally:
        layout.checksum = real
    assert found is not None
    assert found.path == path
    total = everyone(lambda: hashed)
    assert sorted(name for part in total for name in part) == sorted({*found.described["files"], "state.json"})
    assert max(map(len, total)) == 2


def check_a_flipped_bit_in_any_file_is_seen_by_all_2(folder: Path) -> None:
    put(folder, 1, shared(1))
    path = put(folder, 2, shared(2))
    for name in first(lambda: sorted(file.name for file in path.iterdir())):
        flip(path / name)
        found = checkpoint.newest(folder)
        assert found is not None
        assert found.step == 1, name
        flip(path / name)
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.step == 2


def check_a_save_in_the_background_that_fails_on_one_process_ends_all_at_the_same_step_2(folder: Path) -> None:
    real = writing._write_tensors

    def full(*words: Any, **more: Any) -> None:
        real(*words, **more)
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    writing._write_tensors = full
    loop = {"steps": 1_000, "checkpoint_every": 3, "eval_every": None, "async_save": True}
    try:
        with told("no space left on the disk to save .*step-00000003; no earlier checkpoint exists"):
            train(toy.plain_config(**loop), folder / "run", quiet=True)
    finally:
        writing._write_tensors = real
    # On the first process, which has cleared up by then.
    assert first(lambda: 3 <= len((folder / "run" / "metrics.jsonl").read_text().splitlines()) < 500)
    assert first(lambda: not list((folder / "run" / "checkpoints").iterdir()))


def check_options_that_differ_are_named_before_anything_is_written_2(folder: Path) -> None:
    config = toy.plain_config(seed=dist.get_rank())
    with told("do not agree on option train.seed: process 0 has 0, process 1 1"):
        train(config, folder / "run", quiet=True)
    assert first(lambda: not (folder / "run").exists())


def goes_on(folder: Path, *, at: int) -> None:
    """Go on with the run until this step is done."""
    for run in RUNS:
        toy.SIGNALS[at] = signal.SIGTERM
        assert resume(folder.parent / run, quiet=True) == 143


def check_a_run_goes_on_with_another_number_of_processes_2(folder: Path) -> None:
    goes_on(folder, at=5)


def check_a_run_goes_on_with_another_number_of_processes_4(folder: Path) -> None:
    goes_on(folder, at=9)


def check_what_the_processes_do_not_agree_on_is_named_2(folder: Path) -> None:
    agree({"step": "3", "data": "abc"})
    with told("do not agree on data: process 0 has abc0, process 1 abc1"):
        agree({"step": "3", "data": f"abc{dist.get_rank()}"})


def check_a_process_that_has_gone_ends_the_others_within_seconds_4(folder: Path) -> None:
    if dist.get_rank() == 3:
        raise SystemExit(0)
    began = time.monotonic()
    with pytest.raises(OSError, match="another process has ended"):
        put(folder, 1, {})
    assert time.monotonic() - began < 30
    raise SystemExit(0)  # the group is of no more use


def flip(path: Path) -> None:
    """Change a bit of a file, or change it back, on one process for all."""

    def change() -> None:
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 4]) + whole[1:])

    first(change)


def alone_in(folder: Path, names: list[str]) -> None:
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names


@contextmanager
def told(pattern: str) -> Iterator[None]:
    """The first process raises what is wrong, the others leave without a word."""
    if dist.get_rank() == 0:
        with pytest.raises((OSError, ValueError), match=pattern):
            yield
    else:
        with pytest.raises(SystemExit, match="2"):
            yield


def worlds() -> dict[str, Callable[[Path], None]]:
    return {name: check for name, check in globals().items() if name.startswith("check_")}


def work(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{size}"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    for name, check in worlds().items():
        if name.endswith(str(size)):
            (folder / f"{name}.{rank}").write_text("not finished")
            try:
                check(folder / name)
                outcome = ""
            except SystemExit:
                (folder / f"{name}.{rank}").write_text("")
                return
            except Exception:
                outcome = traceback.format_exc()
            (folder / f"{name}.{rank}").write_text(outcome)
            dist.barrier()
    dist.destroy_process_group()


def alone(context: Any, do: Callable[[Path], None], folder: Path) -> None:
    """Run something in a process of its own: it starts threads, and one that has some is not to be forked."""
    process = context.Process(target=do, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0


def begin(folder: Path) -> None:
    torch.set_num_threads(1)
    loop: dict[str, Any] = {"steps": 13, "ema": 0.9, "keep": 9, "keep_best": "val_loss", "async_save": True}
    assert train(toy.plain_config(**loop), folder / "undisturbed", quiet=True) == 0
    for run, replicas in RUNS.items():
        toy.SIGNALS[2] = signal.SIGTERM
        config = toy.plain_config(parallel=ParallelConfig(replicas=replicas), **loop)
        assert train(config, folder / run, quiet=True) == 143


def end(folder: Path) -> None:
    torch.set_num_threads(1)
    for run in RUNS:
        assert resume(folder / run, quiet=True) == 0


def main(folder: Path) -> int:
    torch.set_default_dtype(torch.float64)
    state = {"weights": tensors(), "plain": PLAIN, "step": 1}
    checkpoint.save(folder / "alone" / "checkpoints", 1, state, config={}, keep=1)
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else methods[0])
    alone(context, begin, folder)
    for size in (2, 4):
        workers = [context.Process(target=work, args=(rank, size, folder), daemon=True) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    alone(context, end, folder)
    for path in checkpoint.checkpoints(folder / "by four" / "checkpoints"):
        same(checkpoint.load(path).state["weights"])
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
