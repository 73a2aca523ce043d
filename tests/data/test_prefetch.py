"""The next batch made by a thread: the same batches, the same positions, the same errors."""

import gc
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data import ExampleLoader, ImagesConfig, TextConfig
from danlu.data.loader import Loader
from danlu.data.position import Positioned


def loaders(**options):
    tokens = np.arange(1, 1009, dtype=np.uint16)
    pair = [Loader(tokens, end=0, length=13, batch=6, seed=3, **options) for _ in range(2)]
    pair[1].prefetch = True
    return pair


@given(jumps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=4))
def test_batches_and_positions_are_those_without_a_thread(jumps):
    plain, ahead = loaders(rank=1, world=2)
    for taken, to in [*jumps, (3, 0)]:
        for _ in range(taken):
            assert torch.equal(next(plain)["tokens"], next(ahead)["tokens"])
            assert plain.state_dict() == ahead.state_dict()
        for loader in (plain, ahead):
            loader.load_state_dict({**loader.state_dict(), "position": 6 * to})


class Slow(Positioned):
    """Makes batches when it is let, and fails at the third."""

    def __init__(self):
        super().__init__(2, rank=0, world=1, identity={})
        self.made, self.prefetch, self.let = [], True, threading.Semaphore(1)

    def batch_at(self, numbers):
        assert self.let.acquire(timeout=20)
        self.made.append((numbers.start, threading.current_thread().name))
        if numbers.start == 4:
            raise ValueError("shard 2 is damaged")
        return {"x": torch.tensor(numbers)}


def test_the_next_batch_is_made_while_this_one_is_used_and_an_error_comes_with_its_batch():
    loader = Slow()
    assert next(loader)["x"].tolist() == [0, 1]
    assert loader.position == 2
    loader.let.release()
    while len(loader.made) < 2:  # nobody has asked for it yet
        threading.Event().wait(0.01)
    assert loader.position == 2
    loader.let.release()
    assert next(loader)["x"].tolist() == [2, 3]
    assert loader.position == 4
    with pytest.raises(ValueError, match="shard 2 is damaged"):
        next(loader)
    assert [start for start, _ in loader.made] == [0, 2, 4]
    assert {name for _, name in loader.made} == {"danlu-data_0"}


def test_the_thread_ends_with_the_loader():
    before = threading.active_count()
    _, ahead = loaders()
    next(ahead)
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("danlu-data")][-1:]
    assert threading.active_count() == before + 1
    del ahead
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_data_are_prefetched_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path))
    (tmp_path / "a.txt").write_text("some text and more of it " * 50)
    text = TextConfig(path=(str(tmp_path / "a.txt"),), vocab_size=257, length=8)
    for config in (text, ImagesConfig(source="digits8", batch=4)):
        assert config.open(prefetch=True).train.prefetch
        assert not config.open().train.prefetch


def test_examples_are_the_same_with_a_thread():
    examples = {"x": torch.arange(101)}
    plain, ahead = (ExampleLoader(examples, batch=7, seed=2) for _ in range(2))
    ahead.prefetch = True
    for _ in range(40):
        assert torch.equal(next(plain)["x"], next(ahead)["x"])
