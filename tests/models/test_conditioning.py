"""What image networks are told beside the image."""

import pytest
import torch

from danlu.models.conditioning import Condition, time_features

T = torch.tensor([0.0, 0.3, 0.71, 1.0], dtype=torch.float64)
FREQUENCIES = 32.0 ** (torch.arange(32, dtype=torch.float64) / 31)


def derivative(smooth):
    return torch.func.jvp(lambda t: time_features(t, smooth=smooth), (T,), (torch.ones_like(T),))[1]


@pytest.mark.parametrize("smooth", [False, True])
def test_time_features_have_a_mean_square_of_one_at_every_time(smooth):
    square = time_features(T, smooth=smooth).square().mean(-1)
    torch.testing.assert_close(square, torch.ones_like(T), rtol=1e-12, atol=0)


def test_every_frequency_of_smooth_features_has_the_same_derivative():
    cosines, sines = derivative(True).chunk(2, dim=-1)
    speed = (cosines.square() + sines.square()).sqrt()
    torch.testing.assert_close(speed, speed[:1, :1].expand_as(speed), rtol=1e-12, atol=0)


def test_the_derivatives_of_plain_features_are_larger_by_the_mean_squares_of_frequency_and_period():
    ratio = derivative(False).square().mean() / derivative(True).square().mean()
    expected = FREQUENCIES.square().mean() * FREQUENCIES.reciprocal().square().mean()
    torch.testing.assert_close(ratio, expected, rtol=1e-12, atol=0)


def test_a_network_of_two_times_embeds_both_smoothly_and_one_of_one_time_as_usual():
    two = Condition(7, num_classes=0, two_times=True)
    assert two.time.smooth
    assert two.span.smooth
    assert not Condition(7, num_classes=0, two_times=False).time.smooth
