import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.shuffle import keys, permute


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permute_visits_every_index_exactly_once(size, seed):
    out = permute(np.arange(size), size, keys(seed))
    assert np.array_equal(np.sort(out), np.arange(size))


@given(size=st.integers(1, 10**12), seed=st.integers(0, 100), data=st.data())
def test_permute_of_one_index_does_not_depend_on_the_others(size, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(index, size, keys(seed))
    assert [int(permute(index[i : i + 1], size, keys(seed))[0]) for i in range(len(index))] == together.tolist()
    assert together.min() >= 0
    assert together.max() < size


def test_keys_are_the_same_on_every_machine_and_release():
    assert hex(keys("windows", 0, 0)[0]) == "0x2935a51c2e925a1d"


@pytest.mark.parametrize("size", [7, 64, 101])
def test_permute_spreads_each_index_evenly_over_all_places(size):
    draws = 200 * size
    counts = np.zeros((size, size))
    for seed in range(draws // size):
        counts[np.arange(size), permute(np.arange(size), size, keys(seed))] += 1
    # Pearson's statistic of each row has size - 1 degrees of freedom: mean size - 1, variance about 2 (size - 1).
    expected = draws / size / size
    statistic = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert abs(statistic.mean() - (size - 1)) < 5 * np.sqrt(2 * (size - 1) / size)


def test_neighbours_do_not_stay_neighbours():
    size = 10007
    out = permute(np.arange(size), size, keys(5))
    # In a random permutation the number of steps by exactly one is Poisson with mean 1.
    assert (np.diff(out) == 1).sum() < 8
