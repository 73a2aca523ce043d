"""What the memories recall: the figures of the derivation, the optimum, and the correction of the Fourier window."""

import math

import pytest
import torch
from torch import Tensor

from danlu.nn.ssm import legendre, reconstruct

T = torch.arange(1000, dtype=torch.float64) / 1000
SONG = (4 * math.pi * T).sin() + 0.5 * (10 * math.pi * T + 1).cos() + 0.3 * T
LONG = torch.arange(4000, dtype=torch.float64) / 1000
WAVES = (2.6 * math.pi * LONG).sin() + 0.4 * (4.2 * math.pi * LONG).cos()


def rmse(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("exact", {8: 0.3195, 16: 0.0913, 32: 1.5e-5}),
        ("bilinear", {32: 0.00055}),
        ("bilinear-post", {32: 0.00396}),
    ],
)
def test_the_growing_windows_recall(method: str, expected: dict[int, float]) -> None:
    found = {d: rmse(reconstruct(SONG, d, method=method), SONG) for d in expected}  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=0.02)


def test_the_exact_recursion_recalls_as_well_as_any_polynomial_can() -> None:
    basis = legendre(16, 2 * (T + 0.0005) - 1)
    best = basis @ torch.linalg.lstsq(basis, SONG[:, None]).solution
    assert rmse(reconstruct(SONG, 16), SONG) == pytest.approx(rmse(best[:, 0], SONG), rel=1e-3)


def test_the_moving_windows_recall_gains_digits_with_the_order() -> None:
    found = [rmse(reconstruct(WAVES, d, memory="legt", window=1000), WAVES[-1000:]) for d in (4, 8, 16)]
    assert found == pytest.approx([0.654, 0.0661, 3.6e-6], rel=0.02)


def test_the_printed_fourier_window_never_learns_the_past_and_the_corrected_one_does() -> None:
    """Kexue.fm 10114 takes the series' value at its jump for u(T - w): the error stays at .341 of .80 whatever N."""

    def recall(midpoint: bool) -> list[float]:
        options = {"memory": "fourier-window", "window": 1000, "midpoint": midpoint}
        return [rmse(reconstruct(WAVES, N, **options), WAVES[-1000:]) for N in (2, 8, 32)]  # type: ignore[arg-type]

    assert recall(True) == pytest.approx([0.381, 0.347, 0.341], rel=0.02)
    assert recall(False) == pytest.approx([0.271, 0.118, 0.055], rel=0.02)


def test_the_fourier_historys_recall() -> None:
    found = [rmse(reconstruct(SONG, N, memory="fourier-history"), SONG) for N in (2, 4, 8, 16)]
    assert found == pytest.approx([0.435, 0.419, 0.132, 0.083], rel=0.02)


def test_impossible_requests_are_rejected_by_name() -> None:
    for options, message in [
        ({"order": 0}, "order"),
        ({"order": 3, "memory": "lgt"}, "did you mean 'legt'"),
        ({"order": 3, "window": 10}, "window must be None"),
        ({"order": 3, "memory": "legt", "window": 2000}, "window"),
        ({"order": 3, "memory": "legt", "method": "bilinear-post"}, "method"),
        ({"order": 3, "method": "forward"}, "method"),
        ({"order": 3, "midpoint": True}, "midpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            reconstruct(SONG, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="signal must be real"):
        reconstruct(SONG[None], 3)
