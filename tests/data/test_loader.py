import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.loader import IGNORE, Loader, assemble, validation_batches

END = 0


def ring(n, rng=None, ends=0.1):
    """A stream whose tokens tell their place, with end tokens here and there and at the end."""
    tokens = np.arange(1, n + 1, dtype=np.uint32)
    if rng is not None:
        tokens[rng.random(n) < ends] = END
    tokens[-1] = END
    return tokens


sizes = st.tuples(st.integers(2, 400), st.integers(1, 40)).filter(lambda s: s[1] < s[0])


@given(size=sizes, batch=st.integers(1, 7), seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_each_epoch_visits_every_window_exactly_once(size, batch, seed, epochs):
    n, length = size
    loader = Loader(ring(n), end=END, length=length, batch=batch, seed=seed)
    starts = loader.starts(0, epochs * loader.windows).reshape(epochs, -1)
    for row in starts:
        covered = np.concatenate([(s + np.arange(length)) % n for s in row])
        assert len(covered) == len(np.unique(covered)) == n // length * length


@given(size=sizes, batch=st.integers(1, 7), seed=st.integers(0, 9), steps=st.integers(0, 30))
def test_a_loader_set_to_a_position_goes_on_as_one_that_got_there(size, batch, seed, steps):
    n, length = size
    walked, jumped = (Loader(ring(n), end=END, length=length, batch=batch, seed=seed) for _ in range(2))
    for _ in range(steps):
        next(walked)
    jumped.load_state_dict(walked.state_dict())
    for _ in range(3):
        one, other = next(walked), next(jumped)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


@given(size=sizes, share=st.integers(1, 4), world=st.integers(1, 4), seed=st.integers(0, 9))
def test_ranks_partition_the_batch_of_one_process(size, share, world, seed):
    n, length = size
    options = {"end": END, "length": length, "batch": share * world, "seed": seed}
    alone = Loader(ring(n), **options)
    together = [Loader(ring(n), **options, rank=rank, world=world) for rank in range(world)]
    for _ in range(4):
        rows = torch.cat([next(loader)["tokens"] for loader in together])
        assert torch.equal(rows, next(alone)["tokens"])


def test_a_run_of_one_process_resumes_on_two():
    alone = Loader(ring(500), end=END, length=13, batch=4, seed=3, sha256="a")
    for _ in range(5):
        next(alone)
    pair = [Loader(ring(500), end=END, length=13, batch=4, seed=3, sha256="a", rank=r, world=2) for r in range(2)]
    for loader in pair:
        loader.load_state_dict(alone.state_dict())
    assert torch.equal(torch.cat([next(loader)["tokens"] for loader in pair]), next(alone)["tokens"])


@given(size=sizes, seed=st.integers(0, 99))
def test_a_batch_is_the_text_shifted_with_documents_numbered_at_their_opening(size, seed):
    n, length = size
    tokens = ring(n, np.random.default_rng(seed))
    loader = Loader(tokens, end=END, length=length, batch=3, seed=seed)
    starts = loader.starts(0, 3)
    batch = next(loader)
    for row, start in enumerate(starts):
        text = [int(tokens[(start + i) % n]) for i in range(length + 1)]
        assert batch["tokens"][row].tolist() == text[:-1]
        assert batch["targets"][row].tolist() == text[1:]
        documents, number = [], 0
        for place, token in enumerate(text[:-1]):
            number += token == END and place > 0
            documents.append(number)
        if "documents" in batch:
            assert batch["documents"][row].tolist() == documents
        else:
            assert number == 0
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert batch["tokens"].is_contiguous()
    assert batch["targets"].is_contiguous()


def test_a_batch_without_a_boundary_has_no_documents():
    assert "documents" not in assemble(np.array([[0, 3, 4, 5], [6, 7, 8, 0]]), END)
    with_boundary = assemble(np.array([[1, 3, 0, 5], [6, 7, 8, 0]]), END)
    assert with_boundary["documents"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert with_boundary["documents"].dtype == torch.int32


def test_epochs_differ_in_order_and_in_the_borders_of_their_windows():
    loader = Loader(ring(1009), end=END, length=10, batch=4)
    first, second = loader.starts(0, 100), loader.starts(100, 100)
    assert not np.array_equal(first, second)
    assert set((first % 10).tolist()) != set((second % 10).tolist())


def test_the_seed_selects_the_order_and_nothing_else_does():
    orders = [Loader(ring(1009), end=END, length=10, batch=4, seed=s).starts(0, 100).tolist() for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    state = torch.random.get_rng_state()
    next(Loader(ring(1009), end=END, length=10, batch=4))
    assert torch.equal(state, torch.random.get_rng_state())


def test_positions_across_blocks_and_epochs_are_the_same_in_any_portions():
    loader = Loader(ring(3001), end=END, length=3, batch=5)
    whole = loader.starts(0, 9000)
    other = Loader(ring(3001), end=END, length=3, batch=5)
    assert np.array_equal(np.concatenate([other.starts(p, 500) for p in range(0, 9000, 500)]), whole)


@given(n=st.integers(1, 300), length=st.integers(1, 40), batch=st.integers(1, 6), world=st.integers(1, 3))
def test_validation_makes_every_token_a_target_exactly_once_in_order(n, length, batch, world):
    tokens = ring(n)
    options = {"end": END, "length": length, "batch": batch * world, "world": world}
    ranks = [list(validation_batches(tokens, **options, rank=rank)) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1
    # Of n processes each has every n-th window.
    both = [torch.stack([torch.cat([b[name] for b in r]) for r in ranks], 1) for name in ("targets", "tokens")]
    targets, inputs = (rows.flatten(0, 1) for rows in both)
    valid = targets != IGNORE
    assert targets[valid].tolist() == tokens.tolist()
    assert inputs[valid].tolist() == [END, *tokens[:-1].tolist()]
    assert targets.shape[1] == length
    assert len(targets) % (batch * world) == 0


def test_validation_limited_to_some_batches_spreads_them_over_the_stream():
    tokens = ring(10_000)
    seen = torch.cat([b["targets"][:, 0] for b in validation_batches(tokens, end=END, length=10, batch=5, batches=4)])
    assert seen.tolist() == [1 + 500 * i for i in range(20)]
    everything = list(validation_batches(tokens, end=END, length=10, batch=5, batches=10_000))
    assert len(everything) == 200


def test_padding_in_validation_opens_no_document():
    tokens = np.array([5, 6, 7, 8, 9], dtype=np.uint16)
    (batch,) = validation_batches(tokens, end=END, length=16, batch=1)
    assert "documents" not in batch


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 2}, "seed"), ({"length": 8}, "length"), ({"batch": 2}, "batch"), ({"sha256": "b"}, "sha256")],
)
def test_a_state_of_another_run_is_rejected_by_name(change, name):
    options = {"end": END, "length": 7, "batch": 4, "seed": 1, "sha256": "a"}
    state = Loader(ring(100), **options).state_dict()
    with pytest.raises(ValueError, match=f"cannot resume: {name}"):
        Loader(ring(100), **(options | change)).load_state_dict(state)


@pytest.mark.parametrize("position", [-1, None, "4", True])
def test_a_state_with_an_impossible_position_is_rejected(position):
    loader = Loader(ring(100), end=END, length=7, batch=4)
    with pytest.raises((ValueError, TypeError), match="position"):
        loader.load_state_dict(loader.state_dict() | {"position": position})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch": 3, "world": 2}, "batch"),
        ({"batch": 0}, "batch"),
        ({"rank": 1}, "rank"),
        ({"length": 100}, "length"),
        ({"length": 0}, "length"),
    ],
)
def test_impossible_sizes_are_rejected_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        Loader(ring(100), **({"end": END, "length": 7, "batch": 4} | options))
