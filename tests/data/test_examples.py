import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.examples import ExampleLoader


@given(n=st.integers(1, 50), share=st.integers(1, 5), world=st.integers(1, 3), seed=st.integers(0, 9))
def test_each_epoch_visits_every_example_exactly_once_over_all_ranks(n, share, world, seed):
    options = {"batch": share * world, "seed": seed, "world": world}
    ranks = [ExampleLoader({"x": torch.arange(n)}, **options, rank=r) for r in range(world)]
    steps = -(-3 * n // (share * world))
    seen = torch.cat([next(loader)["x"] for _ in range(steps) for loader in ranks])
    for epoch in range(3):
        assert seen[epoch * n : (epoch + 1) * n].sort().values.tolist() == list(range(n))


@given(n=st.integers(1, 50), batch=st.integers(1, 9), steps=st.integers(0, 20))
def test_examples_go_on_from_a_saved_position_as_if_undisturbed(n, batch, steps):
    walked, jumped = (ExampleLoader({"x": torch.arange(n)}, batch=batch, seed=2) for _ in range(2))
    for _ in range(steps):
        next(walked)
    jumped.load_state_dict(walked.state_dict())
    assert torch.equal(next(walked)["x"], next(jumped)["x"])


def test_what_prepares_a_batch_is_given_a_key_of_its_own_for_every_example_of_the_stream():
    numbers = {}
    for seed in (0, 1):
        for rank in (0, 1):

            def note(batch, keys, place=(seed, rank)):
                numbers.setdefault(place, []).append(keys.tolist())
                return batch

            loader = ExampleLoader({"x": torch.arange(5)}, batch=4, seed=seed, rank=rank, world=2, prepare=note)
            for _ in range(6):
                next(loader)
            loader.load_state_dict(loader.state_dict() | {"position": 8})
            next(loader)
            assert numbers[seed, rank][-1] == numbers[seed, rank][2]
    drawn = {
        seed: sorted(key for rank in (0, 1) for keys in numbers[seed, rank][:-1] for key in keys) for seed in (0, 1)
    }
    # Of both processes together they are numbers that follow one another, whoever has which.
    for keys in drawn.values():
        assert keys == list(range(keys[0], keys[0] + 24))
    assert not set(drawn[0]) & set(drawn[1])


def test_bad_examples_and_foreign_states_are_rejected():
    with pytest.raises(ValueError, match="same first dimension"):
        ExampleLoader({"x": torch.arange(3), "y": torch.arange(4)}, batch=1)
    with pytest.raises(ValueError, match="at least 1"):
        ExampleLoader({"x": torch.arange(0)}, batch=1)
    loader = ExampleLoader({"x": torch.arange(3)}, batch=1)
    with pytest.raises(ValueError, match="cannot resume: seed"):
        loader.load_state_dict(loader.state_dict() | {"seed": 4})
