"""Masked autoencoding: which patches count, the targets, and that it learns."""

import pytest
import torch

from danlu.models import MAE, MAEConfig
from danlu.objectives import MaskedImage, MaskedImageConfig, evaluate, kept_tokens

SIZES = {"image_size": 12, "patch": 4, "dim": 16, "layers": 1, "num_heads": 2, "decoder_dim": 8, "decoder_num_heads": 1}


def build(**options) -> MaskedImage:
    torch.manual_seed(0)
    return MaskedImage(MAE(MAEConfig(**SIZES)), MaskedImageConfig(**options))


def draw(rows: int = 5) -> dict[str, torch.Tensor]:
    return {"images": torch.randn(rows, 1, 12, 12, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_the_mean_square_over_hidden_patches_summed_over_images(normalise):
    objective, batch = build(mask=0.6, normalise=normalise), draw()
    torch.nn.init.normal_(objective.model.last.weight)
    torch.manual_seed(3)
    loss = objective(batch)
    torch.manual_seed(3)
    visible = kept_tokens(5, 9, 0.6)
    patches = objective.model.patches(batch["images"])
    if normalise:
        patches = (patches - patches.mean(-1, keepdim=True)) / (
            patches.var(-1, correction=0, keepdim=True) + 1e-6
        ).sqrt()
    found = objective.model(batch["images"], visible)
    expected = 0.0
    for row in range(5):
        hidden = [token for token in range(9) if token not in visible[row]]
        assert len(hidden) == 5
        expected += (found[row, hidden] - patches[row, hidden]).square().mean()
    torch.testing.assert_close(loss, expected)
    assert objective.denominator(batch).item() == 5


def test_predicting_zero_costs_one_per_image_where_no_patch_is_blank():
    """The network begins with predictions of zero."""
    objective, batch = build(), draw()
    assert objective(batch).item() / 5 == pytest.approx(1.0, abs=1e-4)
    batch["images"][:, :, :, :] = 0.3
    assert objective(batch).item() == pytest.approx(0.0, abs=1e-6)


def test_evaluation_hides_the_same_patches_every_time():
    objective, batch = build(), draw()
    torch.nn.init.normal_(objective.model.last.weight)
    assert evaluate(objective, [batch]) == evaluate(objective, [batch])
    assert not torch.equal(objective(batch), objective(batch))


def test_an_image_in_one_colour_is_completed():
    """Without normalisation a hidden patch of an image in one colour is known from any visible one."""
    objective = build(normalise=False)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        batch = {"images": torch.randn(16, 1, 1, 1, generator=generator).expand(16, 1, 12, 12)}
        (objective(batch) / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate(objective, [batch])["val_loss"] < 0.5  # 1 by predicting the mean


@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_hiding_nothing_and_hiding_all_are_rejected(mask):
    with pytest.raises(ValueError, match="mask must be in"):
        MaskedImageConfig(mask=mask)


def test_a_share_that_hides_no_patch_of_so_few_is_rejected():
    with pytest.raises(ValueError, match="mask must hide some of an image's 9 patches"):
        build(mask=0.01)(draw())
