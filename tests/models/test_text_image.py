"""Words and patches in one decoder."""

import pytest
import torch
from torch import Tensor

from danlu.models import TextImage, TextImageConfig
from danlu.nn import GQAConfig, MLAConfig, text_image_grid
from danlu.nn.rotary import SCHEMES

ATTENTION = {
    "gqa": GQAConfig(num_heads=4, num_kv_heads=2),
    "mla": MLAConfig(num_heads=2, kv_rank=7, nope_dim=4, rope_dim=6, value_dim=5),
}


def build(kind: str = "gqa", **changes: object) -> TextImage:
    torch.manual_seed(2)
    config = TextImageConfig(
        vocab_size=13, dim=24, layers=2, hidden=16, patch_values=9, attention=ATTENTION[kind], **changes
    )  # type: ignore[arg-type]
    return TextImage(config).double()


def sequence() -> tuple[Tensor, Tensor, Tensor]:
    grid = torch.stack([text_image_grid([2, (2, 3), 3]), text_image_grid([1, (3, 2), 1, (1, 2), 1])])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 13, grid.shape[:2], generator=generator)
    return tokens, torch.rand(2, 11, 9, dtype=torch.float64, generator=generator), grid


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ATTENTION)
def test_reading_piece_by_piece_over_a_cache_equals_reading_at_once(kind: str, scheme: str) -> None:
    model, (tokens, patches, grid) = build(kind, scheme=scheme), sequence()
    full = model.read(tokens, patches, grid)
    cache = model.new_cache(2, 11)
    spans = [(0, 4), (4, 5), (5, 10), (10, 11)]
    parts = [model.read(tokens[:, a:b], patches[:, a:b], grid[:, :b], cache=cache) for a, b in spans]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_alone_is_read_as_by_the_plain_transformer_bit_for_bit(scheme: str) -> None:
    model, tokens = build(scheme=scheme), sequence()[0]
    grid = text_image_grid([11]).expand(2, -1, -1)
    assert torch.equal(model.read(tokens, torch.zeros(2, 11, 9), grid), model.hidden(tokens))


def test_a_position_sees_its_word_or_its_patch_and_never_the_other() -> None:
    model, (tokens, patches, grid) = build(), sequence()
    here = model.read(tokens, patches, grid)
    is_patch = grid[..., 0] > 0
    other = torch.where(is_patch, 12 - tokens, tokens)
    assert torch.equal(model.read(other, patches + ~is_patch[..., None], grid), here)
    assert (model.read(tokens, patches + is_patch[..., None], grid) - here).abs().max() > 1e-3


def test_schemes_are_different_models_of_the_same_weights() -> None:
    tokens, patches, grid = sequence()
    found = [build(scheme=scheme).read(tokens, patches, grid) for scheme in SCHEMES]
    for index, first in enumerate(found):
        for second in found[index + 1 :]:
            assert (first - second).abs().max() > 1e-3


def test_impossible_sizes_and_shapes_are_rejected_by_name() -> None:
    tokens, patches, grid = sequence()
    with pytest.raises(ValueError, match=r"patches must be \(2, 11, 9\)"):
        build().read(tokens, patches[..., :8], grid)
    with pytest.raises(ValueError, match="grid"):
        build().read(tokens, patches, grid[:, :10])
    with pytest.raises(ValueError, match="scheme"):
        build(scheme="tied")
    with pytest.raises(ValueError, match="patch_values"):
        TextImage(TextImageConfig(patch_values=0))
