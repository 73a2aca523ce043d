"""What every network of images promises: shapes, classes, times, derivatives in both modes, and its cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from danlu.models import DiT, DiTConfig, UNet, UNetConfig
from danlu.optim import AdamWConfig, MuonConfig

from .image_networks import SIZES, build

NAMES = list(SIZES)


def inputs(batch=5, channels=3, size=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator, dtype=dtype)
    t = torch.rand(batch, generator=generator, dtype=dtype)
    return x, t


@pytest.mark.parametrize("name", NAMES)
def test_the_output_has_the_shape_of_the_images_also_at_other_and_oblong_sizes(name):
    network = build(name)
    for height, width in ((12, 12), (8, 20)):
        x, t = torch.randn(3, 3, height, width), torch.rand(3)
        assert network(x, t).shape == x.shape


@pytest.mark.parametrize("network", [UNet(UNetConfig()), DiT(DiTConfig())], ids=["unet", "dit"])
def test_before_training_the_output_is_zero(network):
    x, t = inputs(channels=1, size=28)
    assert not network(x, t).any()


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_do_not_touch_one_another(name):
    network = build(name, num_classes=4, two_times=True).double()
    x, t = inputs(dtype=torch.float64)
    classes, r = torch.tensor([0, 4, 1, 3, 2]), t * 0.3
    together = network(x, t, classes, r)
    alone = [network(x[i : i + 1], t[i : i + 1], classes[i : i + 1], r[i : i + 1]) for i in range(len(x))]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_class_is_the_last_number_and_every_class_is_told_apart(name):
    network = build(name, num_classes=3)
    x, t = inputs()
    assert network.num_classes == 3
    none = torch.full((len(x),), 3)
    assert torch.equal(network(x, t), network(x, t, none))
    outputs = [network(x, t, torch.full((len(x),), c)) for c in range(4)]
    assert min((a - b).abs().amax() for i, a in enumerate(outputs) for b in outputs[:i]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_time_and_second_time_both_matter_and_without_the_second_r_is_t(name):
    network = build(name, two_times=True)
    x, t = inputs()
    assert torch.equal(network(x, t), network(x, t, r_b=t))
    assert (network(x, t) - network(x, t, r_b=t / 2)).abs().amax() > 1e-3
    assert (network(x, t) - network(x, t / 2)).abs().amax() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_mode_derivative_is_that_of_differences(name):
    # Central differences in float64: error e^2 f''' / 6 + eps |f| / e, about 1e-9 at e = 1e-5 for frequencies of 32.
    network = build(name, num_classes=3, two_times=True).double()
    x, t = inputs(dtype=torch.float64)
    v, r, e = torch.randn_like(x), t * 0.25, 1e-5
    classes = torch.tensor([0, 1, 2, 3, 0])

    def u(x, t, r):
        return network(x, t, classes, r)

    tangents = (v, torch.ones_like(t), torch.zeros_like(r))
    with torch.no_grad():
        value, slope = torch.func.jvp(u, (x, t, r), tangents)
        assert torch.allclose(value, u(x, t, r), rtol=0, atol=1e-12)
        difference = (u(x + e * v, t + e, r) - u(x - e * v, t - e, r)) / (2 * e)
    assert (slope - difference).norm() < 1e-6 * slope.norm()
    # With gradients recorded the derivative is the same and can itself be differentiated.
    _, recorded = torch.func.jvp(u, (x, t, r), tangents)
    assert torch.allclose(recorded, slope, rtol=0, atol=1e-10)
    gradient = torch.autograd.grad(recorded.square().sum(), network.first.weight)[0]
    assert gradient.abs().amax() > 0


@pytest.mark.parametrize("name", NAMES)
def test_without_the_positions_of_its_pixels_the_network_would_give_another_image(name):
    network = build(name)
    x, t = inputs()
    shift = SIZES[name]["patch"]
    moved = network(x.roll(shift, dims=-1), t)
    assert (moved - network(x, t).roll(shift, dims=-1)).abs().amax() > 1e-3


def test_dit_sees_relative_positions_only():
    # Attention alone decides what a token learns of its place: tokens of a periodic image that differ by a whole
    # period have the same content, so a shift of all rows and columns by a constant must change nothing.
    network = build("dit").double()
    x, t = inputs(size=12, dtype=torch.float64)
    plain = network(x, t)
    original = network.rope

    def shifted(rows, columns, *, device, dtype):
        cos, sin = original(rows + 5, columns + 7, device=device, dtype=dtype)
        keep = [table.view(rows + 5, columns + 7, -1)[5:, 7:].flatten(0, 1) for table in (cos, sin)]
        return keep[0], keep[1]

    network.rope = shifted
    assert torch.allclose(network(x, t), plain, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts(name):
    network = build(name, num_classes=3, two_times=True)
    x, t = torch.randn(2, 3, 12, 12), torch.rand(2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, t)
    counted = counter.get_total_flops() / len(x)
    # torch's counter does not know the CPU's attention kernel: its two products of T x T x width are added here.
    width, tokens = (24, 9) if name == "dit" else (12, 9)
    layers = {"dit": 2, "unet": 1, "flat unet": 0}[name]
    kernels = [op for ops in counter.get_flop_counts().values() for op in ops if "dot_product" in str(op)]
    expected = counted if kernels else counted + layers * 2 * 2 * tokens**2 * width
    assert network.flops == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [MuonConfig(), AdamWConfig()], ids=["muon", "adamw"])
def test_every_parameter_has_a_role_and_learns(name, config):
    network = build(name, num_classes=3, two_times=True)
    optimizer = config.build(network)
    roles = {parameter: group["role"] for group in optimizer.param_groups for parameter in group["params"]}
    assert set(roles) == set(network.parameters())
    assert roles[network.last.weight] == "head"
    assert roles[network.condition.classes] == "embedding"
    x, t = inputs()
    network(x, t, torch.tensor([0, 1, 2, 3, 0]), t / 2).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().amax() > 0 for p in network.parameters())
    before = [p.detach().clone() for p in network.parameters()]
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_activations_keep_float32_weights_and_a_float32_result(name):
    network = build(name)
    x, t = inputs()
    exact = network(x, t)
    network.compute_dtype = torch.bfloat16
    rounded = network(x, t)
    assert rounded.dtype == torch.float32
    # Rounding to 8 bits at every one of some ten layers: a relative error of a few times 2^-8.
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 10 * 2**-8


def test_dropout_acts_at_the_last_level_in_training_only():
    network = build("unet", dropout=0.5)
    x, t = inputs()
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))
    assert [block.dropout for blocks in network.down for block in blocks] == [0.0]
    assert [block.dropout for block in network.middle] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (UNetConfig(image_size=30), r"image_size that 4 divides, got 30"),
        (UNetConfig(widths=(8,)), r"one entry a level"),
        (UNetConfig(num_heads=3), r"num_heads must divide the width 128, got 3"),
        (UNetConfig(dropout=1.0), r"dropout must be in \[0, 1\)"),
        (UNetConfig(num_classes=-1), r"num_classes must be an integer of at least 0"),
        (DiTConfig(patch=3), r"patch must divide image_size = 28, got 3"),
        (DiTConfig(dim=40), r"dim must be a multiple of 4 \* num_heads"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        (UNet if isinstance(config, UNetConfig) else DiT)(config)


@pytest.mark.parametrize("name", NAMES)
def test_images_classes_and_times_that_the_network_was_not_made_for_are_rejected(name):
    network = build(name)
    x, t = inputs()
    with pytest.raises(ValueError, match=r"images must be \(batch, 3, height, width\)"):
        network(x[:, :1], t)
    with pytest.raises(ValueError, match="no classes"):
        network(x, t, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="two_times=True"):
        network(x, t, r_b=t)
    if SIZES[name]["patch"] > 1:
        with pytest.raises(ValueError, match="must be multiples of 4, got 12 x 10"):
            network(torch.randn(1, 3, 12, 10), t[:1])
