"""Rank of attention: closed forms, the source's table, and collapse with depth."""

import math

import pytest
import torch
from tensors import gaussian
from torch import Tensor

from danlu.analysis import (
    attention_matrix,
    effective_rank,
    numerical_rank,
    rank_collapse,
    token_spread,
    triangular_logdet,
)


def lower(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_rows_are_weights_and_masked_entries_are_zero(kind: str) -> None:
    a = attention_matrix(gaussian(2, 13, 5), gaussian(2, 13, 5, seed=1), mask=lower(13), kind=kind)
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 13, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (a >= 0).all()
    assert (a.triu(1) == 0).all()
    assert (a.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_log_determinant_of_uniform_causal_attention_is_minus_the_log_of_a_factorial() -> None:
    zeros = torch.zeros(64, 3, dtype=torch.float64)
    found = triangular_logdet(attention_matrix(zeros, zeros, mask=lower(64))).item()
    assert found == pytest.approx(-math.lgamma(65), rel=1e-12)
    assert found == pytest.approx(-205.168199, abs=5e-7)


def test_log_determinant_equals_that_of_a_factorisation_where_one_works() -> None:
    a = attention_matrix(gaussian(3, 11, 4), gaussian(3, 11, 4, seed=1), mask=lower(11))
    torch.testing.assert_close(triangular_logdet(a), torch.linalg.slogdet(a).logabsdet, rtol=1e-12, atol=0)
    torch.testing.assert_close(triangular_logdet(a.mT), triangular_logdet(a), rtol=0, atol=0)
    with pytest.raises(ValueError, match="triangular"):
        triangular_logdet(gaussian(3, 3))


@pytest.mark.parametrize("d", [3, 16, 64])
def test_linear_attention_has_the_rank_of_its_head_and_full_rank_when_causal(d: int) -> None:
    q, k = gaussian(128, d), gaussian(128, d, seed=1)
    full = attention_matrix(q, k, kind="linear")
    s = torch.linalg.svdvals(full)
    assert s[d] / s[0] < 1e-12
    assert numerical_rank(full) == d
    assert numerical_rank(attention_matrix(q, k, kind="linear", mask=lower(128))) == 128


@pytest.mark.parametrize(("d", "both", "causal"), [(64, 301, 216), (4, 39, 127)])
def test_the_effective_ranks_that_the_table_lists_are_draws_like_others(d: int, both: float, causal: float) -> None:
    # The table is one draw of 512 tokens. Of five others the interval that holds a sixth in 99 of 100 cases is
    # mean +- t sd sqrt(1 + 1/5), with t = 4.604 at four degrees of freedom.
    for mask, listed in [(None, both), (lower(512), causal)]:
        draws = [attention_matrix(*gaussian(2, 512, d, seed=seed), mask=mask) for seed in range(5)]
        found = torch.stack([effective_rank(draw) for draw in draws])
        assert abs(found.mean().item() - listed) <= 4.604 * math.sqrt(1.2) * found.std().item()


def test_uniform_attention_has_rank_one_unless_it_is_causal() -> None:
    zeros = torch.zeros(64, 3, dtype=torch.float64)
    full, causal = attention_matrix(zeros, zeros), attention_matrix(zeros, zeros, mask=lower(64))
    assert (numerical_rank(full).item(), numerical_rank(causal).item()) == (1, 64)
    assert effective_rank(full).item() == pytest.approx(1, abs=1e-6)
    assert effective_rank(causal).item() == pytest.approx(21, abs=0.5)


def test_effective_rank_counts_equal_singular_values_and_ignores_scale() -> None:
    a = torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    assert effective_rank(a).item() == pytest.approx(3, rel=1e-12)
    torch.testing.assert_close(effective_rank(7 * gaussian(6, 6)), effective_rank(gaussian(6, 6)))


@pytest.mark.parametrize("seed", range(5))
def test_three_layers_without_skips_forget_everything_unless_they_are_causal(seed: int) -> None:
    both = rank_collapse(128, 64, 3, generator=torch.Generator().manual_seed(seed))
    causal = rank_collapse(128, 64, 3, mask=lower(128), generator=torch.Generator().manual_seed(seed))
    assert both[2] < 1e-6
    assert causal[2] > 0.3
    assert both[0] > 0.5


def test_residual_is_nothing_for_equal_tokens_and_everything_around_zero() -> None:
    assert token_spread(torch.ones(5, 3)).item() == 0
    assert token_spread(torch.tensor([[1.0], [-1.0]])).item() == 1


def test_impossible_arguments_raise_an_error_that_names_them() -> None:
    with pytest.raises(ValueError, match="kind"):
        attention_matrix(gaussian(3, 2), gaussian(3, 2), kind="cosine")
    with pytest.raises(ValueError, match="tolerance"):
        numerical_rank(gaussian(3, 3), tolerance=-1.0)
    with pytest.raises(ValueError, match="layers"):
        rank_collapse(3, 2, 0)
