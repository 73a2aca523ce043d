import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from tensors import gaussian

from danlu.evaluation import copied_share, frechet_distance, kernel_distance, nearest_distances, precision_recall


def test_the_frechet_distance_is_that_of_the_fitted_normals():
    x = gaussian(50, 7, seed=0) @ gaussian(7, 7, seed=1)
    y = gaussian(41, 7, seed=2) @ gaussian(7, 7, seed=3) + 0.5
    left, right = (np.cov(v.numpy(), rowvar=False) for v in (x, y))
    cross = sqrtm(left @ right).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(left + right - 2 * cross)
    assert abs(frechet_distance(x, y) - float(expected)) < 1e-8 * float(expected)


def test_the_frechet_distance_is_symmetric_ignores_rotation_and_is_zero_to_itself():
    # Fewer vectors than components: both covariances are singular.
    x, y = gaussian(11, 13, seed=0), 2 * gaussian(17, 13, seed=1)
    q, _ = torch.linalg.qr(gaussian(13, 13, seed=2))
    distance = frechet_distance(x, y)
    assert abs(frechet_distance(y, x) - distance) < 1e-6
    assert abs(frechet_distance(x @ q + 3, y @ q + 3) - distance) < 1e-6
    # Roots of singular values at the rounding level 1e-16 * 10 are 3e-8 each, of 13 components.
    assert abs(frechet_distance(x, x)) < 1e-6
    shifted = frechet_distance(x, x + torch.arange(13.0))
    assert abs(shifted - float((torch.arange(13.0) ** 2).sum())) < 1e-6


def test_the_kernel_distance_is_its_double_sum_over_different_pairs():
    x, y = gaussian(5, 3, seed=0), gaussian(4, 3, seed=1)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    among_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    among_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert abs(kernel_distance(x, y) - (among_x + among_y - 2 * between)) < 1e-12


def test_the_kernel_distance_of_two_samples_of_one_distribution_is_zero_on_average_also_for_few():
    found = torch.tensor(
        [kernel_distance(gaussian(9, 4, seed=2 * s), gaussian(6, 4, seed=2 * s + 1)) for s in range(300)]
    )
    error = found.std() / 300**0.5
    assert found.mean().abs() < 4 * error
    moved = torch.tensor(
        [kernel_distance(gaussian(9, 4, seed=2 * s) + 1, gaussian(6, 4, seed=2 * s + 1)) for s in range(50)]
    )
    assert moved.mean() > 20 * error


def test_precision_and_recall_tell_bad_examples_from_missing_kinds():
    left, right = gaussian(60, 2, seed=0), gaussian(60, 2, seed=1) + 20
    real = torch.cat((left, right))
    assert precision_recall(real, real) == (1.0, 1.0)
    missing = precision_recall(gaussian(80, 2, seed=2), real)
    assert missing[0] > 0.9
    assert 0.4 < missing[1] <= 0.5
    bad = precision_recall(torch.cat((real[::2] + 1e-9, gaussian(60, 2, seed=3) + 200)), real)
    assert bad[0] == 0.5
    assert bad[1] > 0.9


def test_nearest_distances_are_those_of_all_pairs_in_any_portion():
    points, members = gaussian(1030, 3, seed=0), gaussian(17, 3, seed=1)
    pairs = (points[:, None] - members[None]).norm(dim=-1)
    assert torch.allclose(nearest_distances(points, members), pairs.amin(1), rtol=0, atol=1e-7)


def test_a_generator_that_repeats_its_training_set_is_found_out():
    train, held_out = gaussian(400, 5, seed=0), gaussian(400, 5, seed=1)
    assert copied_share(train[:100] + 1e-4, train, held_out) == 1.0
    # A share p of 400 draws against a threshold of 400 held-out ones: both fluctuate by sqrt(p / 400).
    assert copied_share(gaussian(400, 5, seed=2), train, held_out, quantile=0.1) < 0.1 + 5 * (2 * 0.1 / 400) ** 0.5


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, precision_recall])
def test_vectors_that_do_not_fit_are_rejected(function):
    x = gaussian(9, 3, seed=0)
    with pytest.raises(ValueError, match=r"must be vectors \(at least 2, 3\), got shape \(9, 4\)"):
        function(x, gaussian(9, 4, seed=0))
    with pytest.raises(ValueError, match="got shape"):
        function(x[:1], x)
    with pytest.raises(ValueError, match="not finite"):
        function(x, x / 0)
    with pytest.raises(ValueError, match="neighbours must be an integer from 1 to 8"):
        precision_recall(x, x, neighbours=9)
