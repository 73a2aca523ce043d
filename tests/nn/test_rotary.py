"""Rotary positions: relative, orthogonal, reversible."""

from functools import partial
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import gaussian

from danlu.nn import (
    grid_coordinates,
    rotary_angles,
    rotary_angles_nd,
    rotate,
    text_image_coordinates,
    text_image_grid,
    yarn_frequencies,
    yarn_magnitude,
)
from danlu.nn.rotary import SCHEMES, Scheme

random = partial(gaussian, seed=1)


@given(st.integers(0, 5000), st.sampled_from([2, 6, 14]))
def test_inner_products_depend_on_the_difference_of_positions_only(shift: int, dim: int) -> None:
    q, k = random(7, dim), random(7, dim)
    here = rotary_angles(torch.arange(7, dtype=torch.float64), dim)
    there = rotary_angles(torch.arange(shift, shift + 7, dtype=torch.float64), dim)
    expected = rotate(q, *here) @ rotate(k, *here).T
    torch.testing.assert_close(rotate(q, *there) @ rotate(k, *there).T, expected, rtol=0, atol=1e-11)


def test_each_pair_is_turned_by_position_times_its_frequency() -> None:
    x = random(3, 10)
    cos, sin = rotary_angles(torch.tensor([0.0, 2.5, -7.0], dtype=torch.float64), 10, base=100.0)
    y = rotate(x, cos, sin)
    for row, position in enumerate([0.0, 2.5, -7.0]):
        for pair in range(5):
            angle = torch.tensor(position * 100.0 ** (-2 * pair / 10), dtype=torch.float64)
            turn = torch.polar(torch.ones_like(angle), angle)
            expected = torch.complex(x[row, pair], x[row, pair + 5]) * turn
            torch.testing.assert_close(torch.complex(y[row, pair], y[row, pair + 5]), expected, rtol=0, atol=1e-13)


def test_coordinates_before_the_rotated_ones_are_left_alone() -> None:
    x = random(3, 5, 11)
    cos, sin = rotary_angles(torch.arange(5), 4)
    y = rotate(x, cos.double(), sin.double())
    assert torch.equal(y[..., :7], x[..., :7])
    torch.testing.assert_close(y[..., 7:], rotate(x[..., 7:], cos.double(), sin.double()), rtol=0, atol=0)


def test_rotation_by_no_coordinates_is_the_identity() -> None:
    x = random(3, 4)
    assert rotate(x, *rotary_angles(torch.arange(3), 0)) is x


def test_gradient_of_the_rotation_passes_a_numerical_check_twice() -> None:
    cos, sin = rotary_angles(torch.arange(3, dtype=torch.float64), 4)
    x = random(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda t: rotate(t, cos, sin), x)


def test_angles_far_out_are_as_exact_as_near_the_origin() -> None:
    cos, _ = rotary_angles(torch.tensor([1_000_003]), 2)
    assert cos[0, 0].item() == pytest.approx(torch.tensor(1_000_003.0, dtype=torch.float64).cos().item(), abs=1e-7)


@pytest.mark.parametrize("dim", [3, -2])
def test_odd_and_negative_sizes_are_rejected_by_name(dim: int) -> None:
    with pytest.raises(ValueError, match="dim"):
        rotary_angles(torch.arange(3), dim)


def test_tables_wider_than_the_vectors_are_rejected() -> None:
    with pytest.raises(ValueError, match="6 coordinates"):
        rotate(random(3, 4), *rotary_angles(torch.arange(3), 6))


SIZES = [(h, w) for h in range(1, 20) for w in range(1, 20)]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dim", [2, 6, 12, 22])
def test_equal_coordinates_give_the_tables_of_one_dimension_bit_for_bit(axes: int, dim: int) -> None:
    n = torch.cat((torch.arange(29, dtype=torch.float64), torch.tensor([1e6 + 3, 2.5])))
    expected = rotary_angles(n, dim)
    tables = rotary_angles_nd(n[:, None].expand(-1, axes), dim)
    assert all(torch.equal(a, b) for a, b in zip(tables, expected))


def test_the_frequencies_of_an_image_are_those_of_one_dimension_dealt_out_in_turn() -> None:
    cos, sin = rotary_angles_nd(torch.tensor([[5.0, 0.0], [0.0, 5.0]], dtype=torch.float64), 12)
    one_cos, one_sin = rotary_angles(torch.tensor(5.0, dtype=torch.float64), 12)
    even = torch.arange(12) % 6 % 2 == 0
    for table, still, one in [(cos, 1.0, one_cos), (sin, 0.0, one_sin)]:
        assert torch.equal(table[0], torch.where(even, one, torch.tensor(still, dtype=torch.float64)))
        assert torch.equal(table[1], torch.where(even, torch.tensor(still, dtype=torch.float64), one))


def test_the_halves_are_two_rotations_in_one_dimension_and_symmetric() -> None:
    at = torch.tensor([[3.0, 8.0]], dtype=torch.float64)
    rows, columns = (rotary_angles(at[:, axis], 10)[0][:, :5] for axis in range(2))
    cos, _ = rotary_angles_nd(at, 20, layout="halves")
    torch.testing.assert_close(cos, torch.cat((rows, columns, rows, columns), dim=-1), rtol=0, atol=1e-15)
    swapped, _ = rotary_angles_nd(at.flip(-1), 20, layout="halves")
    assert torch.equal(swapped, cos.view(1, 4, 5)[:, [1, 0, 3, 2]].view(1, 20))
    # The symmetric frequencies are not those of text: on the diagonal it is another rotation.
    diagonal, _ = rotary_angles_nd(torch.tensor([[3.0, 3.0]], dtype=torch.float64), 20, layout="halves")
    assert (diagonal - rotary_angles(torch.tensor([3.0], dtype=torch.float64), 20)[0]).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
def test_scores_in_the_plane_depend_on_differences_and_norms_are_kept(layout: Literal["interleaved", "halves"]) -> None:
    q, k = random(2, 23, 20)
    at = 40 * torch.rand(23, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scores = []
    for shift in [(0.0, 0.0), (100.0, 50.0)]:
        tables = rotary_angles_nd(at + torch.tensor(shift, dtype=torch.float64), 20, layout=layout)
        turned = rotate(q, *tables)
        torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), rtol=1e-14, atol=0)
        scores.append(turned @ rotate(k, *tables).T)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-12)


POINTS: dict[Scheme, list[tuple[float, float]]] = {
    "tie": [(7, 6), (7, 9), (7, 12), (11, 6), (11, 9), (11, 12), (15, 15), (16, 16)],
    "tie-wh": [(x, y) for x in (16 / 3, 23 / 3) for y in (4.75, 6.5, 8.25)] + [(10, 10), (11, 11)],
    "tv": [(6, 5.5), (6, 6.5), (6, 7.5), (7, 5.5), (7, 6.5), (7, 7.5), (10, 10), (11, 11)],
    "unscaled": [(4, 4), (4, 5), (4, 6), (5, 4), (5, 5), (5, 6), (7, 7), (8, 8)],
    "flat": [(n, n) for n in range(4, 12)],
}


@pytest.mark.parametrize("scheme", POINTS)
def test_three_words_an_image_of_two_rows_and_three_columns_and_two_words(scheme: Scheme) -> None:
    text = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    found = text_image_coordinates([3, (2, 3), 2], scheme, start=1)
    expected = torch.tensor(text + POINTS[scheme], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("scheme", ["tie", "tie-wh", "tv"])
def test_the_gap_before_an_image_equals_the_gap_behind_it_for_every_size(scheme: Scheme) -> None:
    for h, w in SIZES:
        at = text_image_coordinates([1, (h, w), 1], scheme)
        torch.testing.assert_close(at[1] - at[0], at[-1] - at[-2], rtol=0, atol=1e-12)
        length = (w + 1) * (h + 1) if scheme == "tie" else w * h + 1
        assert at[-1].tolist() == pytest.approx([length, length], abs=1e-12)
        assert len({tuple(p) for p in at.tolist()}) == h * w + 2


def test_without_scaling_the_gaps_differ_unless_the_image_is_square() -> None:
    for h, w in SIZES:
        at = text_image_coordinates([1, (h, w), 1], "unscaled")
        assert torch.equal(at[1] - at[0], at[-1] - at[-2]) == (h == w)


def test_rows_and_columns_change_places_with_the_image_turned_over() -> None:
    for scheme in ("tie", "tie-wh", "tv"):
        at = text_image_coordinates([2, (3, 5), 1], scheme)[2:-1].view(3, 5, 2)
        over = text_image_coordinates([2, (5, 3), 1], scheme)[2:-1].view(5, 3, 2)
        torch.testing.assert_close(over, at.transpose(0, 1).flip(-1), rtol=1e-15, atol=0)


def test_a_square_image_has_steps_of_its_side_plus_one() -> None:
    at = text_image_coordinates([1, (4, 4), 1], "tie")[1:-1].view(4, 4, 2)
    assert (at[1:, :, 0] - at[:-1, :, 0]).unique().tolist() == [5.0]
    assert (at[:, 1:, 1] - at[:, :-1, 1]).unique().tolist() == [5.0]


def test_tie_takes_the_uniform_solution_where_a_smaller_integer_one_exists() -> None:
    # h = 5, w = 3: (s, t) = (4, 6) as implemented; (2, 3) would give equal gaps as well.
    at = text_image_coordinates([1, (5, 3), 1], "tie")
    assert (at[1] - at[0]).tolist() == [4.0, 6.0]


def test_flattening_puts_a_neighbour_below_a_whole_row_away_and_the_plane_does_not() -> None:
    flat = text_image_coordinates([(4, 7)], "flat").view(4, 7, 2)
    assert (flat[1, 2] - flat[0, 2]).tolist() == [7.0, 7.0]
    plane = text_image_coordinates([(4, 7)], "unscaled").view(4, 7, 2)
    assert (plane[1, 2] - plane[0, 2]).tolist() == [1.0, 0.0]


def test_patches_of_rope_tv_are_as_far_apart_in_images_of_every_size() -> None:
    for h, w in SIZES:
        at = text_image_coordinates([2, (h, w)], "tv")[2:].view(h, w, 2)
        assert ((at[1:, :, 0] - at[:-1, :, 0]) == 1).all()
        assert ((at[:, 1:, 1] - at[:, :-1, 1]) == 1).all()


@pytest.mark.parametrize(("h", "w", "t"), [(2, 3, 5), (7, 1, 2), (3, 3, 3)])
def test_a_video_is_as_long_as_its_patches_in_rope_tv_and_symmetric(h: int, w: int, t: int) -> None:
    at = text_image_coordinates([4, (t, h, w), 2], "tv", start=1)
    patches = h * w * t
    assert at[-2:, 0].tolist() == [4 + patches + 1, 4 + patches + 2]
    expected = [4 + (patches - size) / 2 + 1 for size in (t, h, w)]
    assert at[4].tolist() == expected
    torch.testing.assert_close(at[4] - at[3], at[-2] - at[-3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_images_and_text_mix_in_any_order_and_text_alone_is_counted(scheme: Scheme) -> None:
    assert text_image_coordinates([3, 4], scheme).tolist() == [[n, n] for n in range(7)]
    assert text_image_coordinates([], scheme).shape == (0, 2)
    whole = text_image_coordinates([2, (2, 3), (1, 4), 3], scheme)
    behind = text_image_coordinates([2, (2, 3)], scheme)
    torch.testing.assert_close(whole[:8], behind, rtol=0, atol=0)
    after = text_image_coordinates([2, (2, 3), 1], scheme)[-1, 0].item()
    rest = text_image_coordinates([(1, 4), 3], scheme, start=after)
    torch.testing.assert_close(whole[8:], rest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segments", [[(0, 3)], [(2, -1)], [-1], [(2, 3), (1, 2, 3)], [()]])
def test_empty_images_and_negative_spans_are_rejected_by_name(segments: list[int | tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="segments"):
        text_image_grid(segments)


def test_impossible_sizes_layouts_schemes_and_shapes_are_rejected_by_name() -> None:
    at = torch.zeros(3, 2)
    for dim in (5, -2):
        with pytest.raises(ValueError, match="dim"):
            rotary_angles_nd(at, dim)
    with pytest.raises(ValueError, match="dim must be a multiple of 4"):
        rotary_angles_nd(at, 6, layout="halves")
    with pytest.raises(ValueError, match=r"layout.*did you mean 'halves'"):
        rotary_angles_nd(at, 8, layout="halve")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coordinates"):
        rotary_angles_nd(torch.tensor(1.0), 8)
    with pytest.raises(ValueError, match="scheme"):
        text_image_coordinates([1], "ties")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid"):
        grid_coordinates(torch.zeros(3, 3))


@pytest.mark.parametrize("rows", [3, 1500])
@pytest.mark.parametrize("grad", [False, True])
def test_with_and_without_gradients_a_few_tokens_and_many_turn_alike(rows: int, grad: bool) -> None:
    x = random(rows, 4, 13)
    cos, sin = rotary_angles(torch.arange(rows, dtype=torch.float64), 10)
    with torch.set_grad_enabled(grad):
        y = rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2))
    pairs = torch.complex(x[..., 3:8], x[..., 8:]) * torch.complex(cos[:, None, :5], sin[:, None, :5])
    torch.testing.assert_close(y, torch.cat((x[..., :3], pairs.real, pairs.imag), -1), rtol=0, atol=1e-13)


def test_yarn_has_the_constants_of_deepseek() -> None:
    found = yarn_frequencies(64, 40.0)
    plain = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    listed = {10: 0.0562341, 11: 0.0390069, 15: 0.00833451, 16: 0.0055, 22: 1.778279e-4, 23: 3.333804e-5}
    for pair, value in listed.items():
        assert found[pair].item() == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(found[:11], plain[:11], rtol=1e-15, atol=0)
    torch.testing.assert_close(found[23:], plain[23:] / 40, rtol=1e-15, atol=0)
    assert yarn_magnitude(40.0, 0.707) == pytest.approx(1.260804, abs=5e-7)
    assert yarn_magnitude(40.0, 0.707) ** 2 == pytest.approx(1.589626, abs=5e-7)
    assert yarn_magnitude(40.0) ** 2 == pytest.approx(1.8738542, abs=5e-8)


def test_yarn_with_factor_one_is_the_plain_rotation() -> None:
    assert yarn_magnitude(1.0, 0.7) == 1
    plain = 500000.0 ** (-torch.arange(0, 48, 2, dtype=torch.float64) / 48)
    torch.testing.assert_close(yarn_frequencies(48, 1.0, base=500000.0), plain, rtol=1e-15, atol=0)
    cos, sin = rotary_angles(torch.arange(9), 48, base=500000.0)
    angles = torch.arange(9)[:, None] * yarn_frequencies(48, 1.0, base=500000.0)
    torch.testing.assert_close(angles.cos().float(), cos[:, :24], rtol=0, atol=1e-6)
    torch.testing.assert_close(angles.sin().float(), sin[:, :24], rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [2.0, 40.0])
@pytest.mark.parametrize(
    ("dim", "base", "length"), [(64, 10000.0, 4096), (128, 500000.0, 8192), (32, 1e6, 256), (128, 100.0, 4096)]
)
def test_yarn_is_that_of_transformers(factor: float, dim: int, base: float, length: int) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": length,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    config = transformers.LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=int(factor * length),
        rope_parameters=scaling,
    )
    frequencies, magnitude = utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    torch.testing.assert_close(yarn_frequencies(dim, factor, base=base, original_length=length).float(), frequencies)
    assert magnitude == pytest.approx(yarn_magnitude(factor), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dim": 7}, "dim must be even"), ({"factor": 0.5}, "factor"), ({"beta_fast": 0.5}, "beta_fast")],
)
def test_yarn_names_what_is_out_of_range(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yarn_frequencies(**({"dim": 8, "factor": 2.0} | changes))  # type: ignore[arg-type]
