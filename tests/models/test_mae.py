"""The masked autoencoder: hidden patches are not read, places are kept, and its sizes are checked."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from danlu.models import MAE, MAEConfig
from danlu.nn.attention import full
from danlu.objectives import kept_tokens

CONFIG = MAEConfig(
    channels=3,
    image_size=20,
    patch=4,
    dim=24,
    layers=3,
    num_heads=3,
    decoder_dim=16,
    decoder_layers=2,
    decoder_num_heads=2,
)


def build(**options) -> MAE:
    torch.manual_seed(0)
    mae = MAE(replace(CONFIG, **options))
    nn.init.normal_(mae.last.weight)
    return mae.double()


def images(rows: int = 2, height: int = 20, width: int = 20) -> torch.Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def visible(rows: int = 2, tokens: int = 25, rate: float = 0.7) -> torch.Tensor:
    return kept_tokens(rows, tokens, rate, generator=torch.Generator().manual_seed(2))


def test_patches_are_cut_row_by_row():
    x = images()
    patches = build().patches(x)
    assert patches.shape == (2, 25, 48)
    assert torch.equal(patches[:, 7], x[:, :, 4:8, 8:12].permute(0, 2, 3, 1).flatten(1))


def test_reading_visible_patches_is_masking_the_columns_of_hidden_ones(monkeypatch):
    mae, x, seen = build(), images(), visible()
    short = mae.encode(x, seen)
    columns = torch.zeros(2, 25, dtype=torch.bool).scatter(1, seen, True)[:, None, None, :]
    monkeypatch.setattr(full, "attend", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=columns))
    rows = seen[..., None].expand(-1, -1, 24)
    assert (mae.encode(x).gather(1, rows) - short).abs().max() < 1e-10
    monkeypatch.undo()
    assert (mae.encode(x).gather(1, rows) - short).abs().max() > 0.01


def test_all_patches_in_any_order_are_the_whole_image():
    mae, x = build(), images()
    order = torch.stack([torch.randperm(25, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    rows = order[..., None].expand(-1, -1, 24)
    torch.testing.assert_close(mae.encode(x, order), mae.encode(x).gather(1, rows), rtol=0, atol=1e-12)


def test_a_prediction_depends_on_visible_pixels_and_its_place_alone():
    mae, seen = build(), visible()
    x = images().requires_grad_()
    predicted = mae(x, seen)
    assert predicted.shape == (2, 25, 48)
    (grad,) = torch.autograd.grad(predicted.square().sum(), x)
    felt = mae.patches(grad).abs().sum(-1) > 0
    assert torch.equal(felt, torch.zeros(2, 25, dtype=torch.bool).scatter(1, seen, True))
    hidden = [token for token in range(25) if token not in seen[0]]
    assert (predicted[0, hidden[0]] - predicted[0, hidden[1]]).abs().max() > 0.01


def test_an_oblong_image_of_another_size_is_encoded():
    assert build().encode(images(2, 12, 28)).shape == (2, 21, 24)


def test_half_precision_activations_leave_the_weights_and_the_result_alone():
    mae, x, seen = build().float(), images().float(), visible()
    exact = mae(x, seen)
    mae.compute_dtype = torch.bfloat16
    rough = mae(x, seen)
    assert rough.dtype == torch.float32
    assert mae.first.weight.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_the_work_of_the_encoder_is_what_its_products_take():
    with torch.device("meta"):
        mae = MAE(MAEConfig(dim=768, layers=2, num_heads=12))
    for n in (32, 128):
        assert mae.encoder_flops(n) == 2 * (24 * n * 768**2 + 4 * n**2 * 768)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "patch must divide image_size = 20"),
        ({"dim": 20}, r"dim must be a multiple of 4 \* num_heads"),
        ({"decoder_dim": 12}, r"decoder_dim must be a multiple of 4 \* decoder_num_heads"),
        ({"layers": 0}, "layers must be an integer"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        MAE(replace(CONFIG, **options))


def test_images_and_patches_that_do_not_fit_are_rejected():
    mae = build()
    with pytest.raises(ValueError, match="images must be"):
        mae.encode(images()[:, :1])
    with pytest.raises(ValueError, match="visible must be int64"):
        mae(images(), visible(3))
