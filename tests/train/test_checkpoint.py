import errno
import hashlib
import json
import math
import pickle
import signal
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

from danlu.train import checkpoint
from danlu.train.checkpoint import CheckpointError, writing

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
STATE = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def put(folder: Path, step: int, value: float = 0.0, keep: int = 3) -> Path:
    return checkpoint.save(folder, step, {"w": torch.full((5,), value)}, config={"a": 1}, keep=keep)


@given(STATE)
def test_plain_state_survives_packing_and_json(state: Any) -> None:
    tensors, tree = checkpoint.pack(state)
    assert not tensors
    assert same(checkpoint.unpack(tensors, json.loads(json.dumps(tree, allow_nan=False))), state)


def test_state_with_tensors_survives_the_disk(tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "half": [torch.randn(3, 5).bfloat16(), torch.empty(0), torch.empty(2, 0)],
        "optimizer": {0: {"step": torch.tensor(1.0), "none": None}, 7: (1, 2.5, math.inf)},
        "strided": torch.randn(5, 7).t(),
        "bytes": torch.get_rng_state(),
        "truth": torch.tensor([True, False]),
        "integers": torch.tensor([2**40, -1]),
        "names with / and . inside": {"a/b.c": torch.ones(2)},
    }
    path = checkpoint.save(tmp_path, 12, state, config={"lr": 0.1}, keep=1)
    back = checkpoint.load(path)
    assert path.name == "step-00000012"
    assert (back.step, back.config) == (12, {"lr": 0.1})
    assert same(back.state, state)


def test_two_tensors_that_share_memory_are_both_kept(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    state = OrderedDict([("embedding", shared), ("head", shared), ("row", shared[1]), ("scalar", shared[0, 0])])
    path = checkpoint.save(tmp_path, 1, state, config={}, keep=1)
    assert same(checkpoint.load(path).state, dict(state))
    assert same(checkpoint.load(path, parts=["head"]).state, {"head": shared})


def test_only_the_parts_asked_for_are_read(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": torch.ones(2), "b": {"c": torch.ones(3)}}, config={}, keep=1)
    assert same(checkpoint.load(path, parts=("b", "absent")).state, {"b": {"c": torch.ones(3)}})


def test_state_that_is_neither_tensor_nor_plain_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state 'a/b' must hold tensors and plain values, got set"):
        checkpoint.save(tmp_path / "c", 1, {"a": {"b": {1}}}, config={}, keep=1)
    assert not (tmp_path / "c").exists()


def test_nothing_is_pickled_or_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle was used")

    path = put(tmp_path, 1)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert checkpoint.load(path).step == 1
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors", ""}


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        put(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000015", "step-00000020"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "gone", "no state", "bad state", "other format"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "checkpoints", 1)
    newest = put(tmp_path / "checkpoints", 2)
    tensors = next(newest.glob("*.safetensors"))
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "gone":
        tensors.unlink()
    elif damage == "no state":
        (newest / "state.json").unlink()
    elif damage == "bad state":
        (newest / "state.json").write_text("{")
    else:
        (newest / "state.json").write_text('{"format": 0}')
    assert toy.newest(tmp_path).name == "step-00000001"
    saved = checkpoint.load_latest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert any("step-00000002" in said and "the checkpoint before it" in said for said in caplog.messages)
    with pytest.raises(CheckpointError, match=r"is no complete checkpoint|has format 0, and 1, 2, 3 are read"):
        checkpoint.load(newest)


def test_every_flipped_bit_is_found_and_the_checkpoint_before_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "checkpoints", 1, 1.0)
    newest = put(tmp_path / "checkpoints", 2, 2.0)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for at in torch.randint(len(whole), (40,)).tolist():
            flipped = bytearray(whole)
            flipped[at] ^= 1 << (at % 8)
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                checkpoint.load(newest)
            saved = checkpoint.load_latest(tmp_path)
            assert saved is not None
            assert saved.step == saved.state["w"][0] == 1
        file.write_bytes(whole)
    saved = checkpoint.load_latest(tmp_path)
    assert saved is not None
    assert saved.step == 2
    assert any("step-00000002 is damaged" in said and "the checkpoint before it" in said for said in caplog.messages)


def test_files_of_another_checkpoint_are_not_taken_for_its_own(tmp_path: Path) -> None:
    older, newest = put(tmp_path, 1, 1.0), put(tmp_path, 2, 2.0)
    tensors = next(older.glob("*.safetensors"))
    whole = (newest / tensors.name).read_bytes()
    (newest / tensors.name).write_bytes(tensors.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{tensors.name} is not what SHA256SUMS says"):
        checkpoint.load(newest)
    (newest / tensors.name).write_bytes(whole)
    assert checkpoint.load(newest).step == 2
    for file in older.iterdir():
        (newest / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"state.json is of step 1"):
        checkpoint.load(newest)


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = put(tmp_path, 1)
    lines = (path / "SHA256SUMS").read_text().splitlines()
    assert {line[66:] for line in lines} == {p.name for p in path.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((path / line[66:]).read_bytes()).hexdigest() == line[:64] for line in lines)


def test_a_checkpoint_of_the_release_without_checksums_is_read(tmp_path: Path) -> None:
    path = put(tmp_path, 3, 5.0)
    (path / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        checkpoint.load(path)
    state = path / "state.json"
    state.write_text(state.read_text().replace('"format": 3', '"format": 1'))
    assert checkpoint.load(path).state["w"][0] == 5


def test_checkpoints_that_are_all_damaged_are_an_error_and_none_at_all_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path) is None
    path = put(tmp_path / "checkpoints", 1)
    (path / "SHA256SUMS").write_text("")
    with pytest.raises(CheckpointError, match=rf"no checkpoint of {tmp_path} can be read"):
        checkpoint.load_latest(tmp_path)


def test_a_step_saved_again_replaces_the_first_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    put(folder, 4, 1.0, keep=1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_tensors", fail)
        with pytest.raises(
            CheckpointError, match=r"could not be written .*Input/output error.*step-00000004 is intact"
        ):
            put(folder, 4, 2.0, keep=1)
    assert float(checkpoint.load(toy.newest(tmp_path)).state["w"][0]) == 1.0
    put(folder, 4, 3.0, keep=1)
    assert float(checkpoint.load(toy.newest(tmp_path)).state["w"][0]) == 3.0
    assert len(list(folder.iterdir())) == 1


def test_a_full_disk_says_so_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    # A limit on the size of files stands in for the end of the disk: writing fails in the middle, in the real writer.
    resource = pytest.importorskip("resource")
    put(tmp_path / "checkpoints", 1)
    big = {"w": torch.zeros(200_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(CheckpointError, match=r"no space left on the disk to save .*step-00000001 is intact") as e:
            checkpoint.save(tmp_path / "checkpoints", 2, big, config={}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(e.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoint.load(toy.newest(tmp_path)).step == 1


def test_leftovers_of_an_interrupted_save_are_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.123.tmp").mkdir(parents=True)
    (tmp_path / ".step-00000002.123.tmp-old").mkdir()
    put(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.checkpoints(tmp_path / "nowhere") == []
