"""Random numbers that are functions of keys: their distributions, their independence, and that nothing else counts."""

import pytest
import torch
from scipy import stats

from danlu import _draws
from danlu._draws import bernoulli, derived, fresh, integers, mixed64, normal, start, uniform

BASE = start("train", 3)


def rows(count, first=0):
    return BASE + first + torch.arange(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_follow_their_distributions_to_the_tails(dtype):
    u = uniform(rows(1009), "u", 997, dtype=dtype).double().flatten()
    z = normal(rows(1009), "z", 997, dtype=dtype).double().flatten()
    assert stats.kstest(u.numpy()[:200_000], "uniform").pvalue > 1e-3
    assert stats.kstest(z.numpy()[:200_000], "norm").pvalue > 1e-3
    n = len(z)
    # Moments 1 to 4 within four standard errors: their variances are 1, 2, 15 and 96.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - mean) < 4 * (variance / n) ** 0.5
    for limit in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(limit) * n
        assert abs(int((z.abs() > limit).sum()) - expected) < 4 * expected**0.5 + 1
    assert 0 <= u.min() < 1e-5 < 1 - 1e-5 < u.max() < 1


def test_the_largest_bits_give_the_largest_numbers():
    # What reaches the tails are single bit patterns: the length of a pair is the root of -2 log of 31 bits.
    z = normal(rows(1), "z", 40_000_001)
    assert z.abs().max() > 5
    # log_ndtr keeps its digits where 1 - cdf has none: the largest of n numbers is where n of them are expected.
    assert abs(torch.special.log_ndtr(-z.abs().max().double()).item() + torch.tensor(8e7).log().item()) < 8
    assert torch.isfinite(z).all()


@pytest.mark.parametrize("high", [2, 7, 50_257])
def test_integers_are_equally_likely(high):
    counts = torch.bincount(integers(rows(499), "n", high, 2003).flatten(), minlength=high)
    assert len(counts) == high
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_a_share_of_booleans_is_true():
    found = bernoulli(rows(100_003), "b", 0.3).double()
    assert abs(found.mean().item() - 0.3) < 4 * (0.21 / 100_003) ** 0.5


def test_neighbouring_rows_places_and_names_have_nothing_in_common():
    z = normal(rows(307), "one", 509).double()
    others = {
        "rows": (z[:-1], z[1:]),
        "places": (z[:, :-1], z[:, 1:]),
        "cosine and sine": (z[:, :254], z[:, 255:]),
        "names": (z, normal(rows(307), "two", 509).double()),
        "seeds": (z, normal(start("train", 4) + torch.arange(307), "one", 509).double()),
        "derived": (z, normal(derived(rows(307), "again"), "one", 509).double()),
    }
    for name, (one, other) in others.items():
        for power in (1, 2):  # squares: numbers may be uncorrelated and depend on each other
            a, b = one.pow(power), other.pow(power)
            a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
            assert abs((a * b).mean().item()) < 4.5 / a.numel() ** 0.5, (name, power)


def test_pairs_of_neighbours_fill_the_square_evenly():
    u = uniform(rows(401), "u", 601)
    for one, other in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        cells = ((one * 32).long() * 32 + (other * 32).long()).flatten()
        assert stats.chisquare(torch.bincount(cells, minlength=1024).numpy()).pvalue > 1e-4


def test_every_bit_of_a_key_flips_half_of_the_bits_drawn():
    keys = mixed64(torch.arange(5000))
    base = integers(keys, "bits", 2**31, 2)
    for bit in range(64):
        flipped = integers(keys ^ (1 << bit if bit < 63 else -(2**63)), "bits", 2**31, 2)
        changed = base ^ flipped
        shares = torch.stack([(changed >> place & 1).double().mean() for place in range(31)])
        assert (shares - 0.5).abs().max() < 0.025  # 5 standard errors of 10,000


@pytest.mark.parametrize("draw", [uniform, normal, lambda *args: integers(*args[:2], 1000, *args[2:])])
def test_a_row_draws_the_same_alone_in_any_batch_and_in_any_order(draw, monkeypatch):
    whole = draw(rows(11), "x", 5, 7)
    assert whole.shape == (11, 5, 7)
    for some in ([3], [7, 2], list(range(5, 11))):
        torch.testing.assert_close(draw(rows(11)[some], "x", 5, 7), whole[some], rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(_draws, "_IN_CACHE", 16)  # in blocks of parts of a row, and of several rows
    torch.testing.assert_close(draw(rows(11), "x", 5, 7), whole, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(_draws, "_IN_CACHE", 100)
    torch.testing.assert_close(draw(rows(11), "x", 5, 7), whole, rtol=1e-6, atol=1e-7)
    assert draw(rows(0), "x", 5).shape == (0, 5)
    assert draw(rows(3), "x").shape == (3,)


def test_fresh_keys_are_torchs_generators():
    torch.manual_seed(5)
    first = fresh(3)
    torch.manual_seed(5)
    assert torch.equal(fresh(3), first)
    assert not torch.equal(fresh(3), first)
    assert first.min() >= 0
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(fresh(3, generator=generator), first)


def test_the_numbers_of_a_run_stay_what_they_are():
    # A checkpoint of today goes on with them in years: they are part of the format.
    keys = torch.tensor([0, 1, -1, 2**62])
    assert start("train", 0) == 2511546505520460936
    assert derived(keys, "noise").tolist() == [
        -8547624913693733933,
        6493733809452420672,
        2904534269841314385,
        4404505234642201199,
    ]
    assert integers(keys, "other", 2**31, 2).tolist() == [
        [988858218, 1050537913],
        [1877921480, 2064990357],
        [936490176, 890689687],
        [152119395, 787211277],
    ]
    assert (uniform(keys, "times") * 2**24).long().tolist() == [5674616, 7887328, 16246639, 4145337]
    expected = torch.tensor(
        [
            [1.4183856, 1.0597231, 0.3528185],
            [-0.4620936, 0.2059493, -0.1283253],
            [1.1487117, -0.739114, 1.2199599],
            [-0.4043968, 0.8149504, -0.1076586],
        ]
    )
    torch.testing.assert_close(normal(keys, "noise", 3), expected, rtol=2e-6, atol=1e-6)
    wide = torch.tensor(
        [
            [-0.1779470072288143, 0.6396292649375063, 0.8739900855774879],
            [0.3091965479575013, 0.4720343676584914, -0.1268545807035971],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(normal(keys[:2], "noise", 3, dtype=torch.float64), wide, rtol=1e-12, atol=1e-12)


def test_a_compiled_draw_is_the_plain_one():
    def both(keys):
        return uniform(keys, "u", 5), normal(keys, "z", 3, 5)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    for one, other in zip(compiled(rows(7)), both(rows(7)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
