import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from danlu.linalg.lowrank import landmark_attention, segment_means

D = torch.float64


@pytest.fixture
def qkv(generator):
    return torch.randn(3, 2, 37, 8, dtype=D, generator=generator).unbind()


def test_as_many_landmarks_as_positions_is_exact_attention(qkv):
    exact = scaled_dot_product_attention(*qkv)
    for inverse in ("svd", "chebyshev"):
        ours = landmark_attention(*qkv, landmarks=37, inverse=inverse, condition=1e5)
        assert torch.allclose(ours, exact, atol=1e-6)


def test_the_formula_on_one_head(qkv):
    q, k, v = (x[0, :36] for x in qkv)
    q_mean, k_mean = q.view(9, 4, 8).mean(1), k.view(9, 4, 8).mean(1)

    def scores(a, b):
        return torch.softmax(a @ b.mT / math.sqrt(8), -1)

    expected = scores(q, k_mean) @ torch.linalg.pinv(scores(q_mean, k_mean)) @ scores(q_mean, k) @ v
    assert torch.allclose(landmark_attention(q, k, v, landmarks=9, inverse="svd"), expected, atol=1e-10)
    assert torch.allclose(landmark_attention(q, k, v, landmarks=9, condition=1e5), expected, atol=1e-6)


def test_constant_segments_are_attended_exactly(generator):
    """Where queries and keys do not vary inside a segment, the attention matrix has the rank of the segments."""
    q, k = torch.randn(2, 7, 8, dtype=D, generator=generator).repeat_interleave(5, -2).unbind()
    v = torch.randn(35, 8, dtype=D, generator=generator)
    ours = landmark_attention(q, k, v, landmarks=7, inverse="svd")
    assert torch.allclose(ours, scaled_dot_product_attention(q[None], k[None], v[None])[0], atol=1e-9)


def test_six_published_steps_are_far_from_the_pseudo_inverse_where_the_default_is_not(generator):
    q, k, v = torch.randn(3, 256, 16, dtype=D, generator=generator).unbind()
    exact = landmark_attention(q, k, v, landmarks=64, inverse="svd")

    def off(**options):
        return float((landmark_attention(q, k, v, landmarks=64, **options) - exact).norm() / exact.norm())

    assert off(inverse="nystromformer", steps=6) > 0.1
    assert off(inverse="chebyshev", condition=1e6) < 1e-3


@pytest.mark.parametrize("length", [7, 12, 64, 65])
def test_segments_cover_every_position_once_and_differ_by_at_most_one(length):
    x = torch.eye(length, dtype=D)
    means = segment_means(x, 7)
    sizes = (means > 0).sum(-1)
    assert int(sizes.sum()) == length
    assert int(sizes.max() - sizes.min()) <= 1
    assert torch.allclose(means.sum(-1), torch.ones(7, dtype=D))


def test_queries_and_keys_may_differ_in_length_and_width_of_values(qkv):
    q, k, _ = qkv
    v = torch.randn(2, 37, 3, dtype=D)
    assert landmark_attention(q[:, :11], k, v, landmarks=5).shape == (2, 11, 3)


def test_gradients_are_right(generator):
    q, k, v = (torch.randn(6, 3, dtype=D, generator=generator, requires_grad=True) for _ in range(3))
    for inverse in ("chebyshev", "nystromformer", "svd"):
        assert torch.autograd.gradcheck(
            lambda *x, inverse=inverse: landmark_attention(*x, landmarks=3, inverse=inverse, condition=50.0), (q, k, v)
        )


def test_bad_input_is_named(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match="landmarks must be an integer from 1 to 37, got 38"):
        landmark_attention(q, k, v, landmarks=38)
    with pytest.raises(ValueError, match="k must have q's width 8"):
        landmark_attention(q, k[..., :5], v, landmarks=2)
    with pytest.raises(ValueError, match="v must have k's length 37"):
        landmark_attention(q, k, v[:, :5], landmarks=2)
    with pytest.raises(TypeError, match="v must have q's dtype"):
        landmark_attention(q, k, v.float(), landmarks=2)
    with pytest.raises(ValueError, match="inverse must be one of"):
        landmark_attention(q, k, v, landmarks=2, inverse="newton")
    with pytest.raises(ValueError, match="k must be finite"):
        landmark_attention(q, k * math.inf, v, landmarks=2)


def test_it_is_linear_in_the_values_whatever_their_width(qkv, generator):
    q, k, v = qkv
    each = landmark_attention(q, k, torch.eye(37, dtype=D).expand(2, 37, 37), landmarks=5, inverse="svd")
    for width in (1, 3, 8, 11):
        v = torch.randn(2, 37, width, dtype=D, generator=generator)
        assert torch.allclose(landmark_attention(q, k, v, landmarks=5, inverse="svd"), each @ v, atol=1e-10)
