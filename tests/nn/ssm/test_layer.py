"""The state-space layer behind attention's call: packed documents, caches, dtypes."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensors import gaussian
from torch import Tensor

from danlu.nn import SSM, SSMConfig, causal_mask
from danlu.nn.ssm import RTFConfig, S4Config, S4DConfig
from danlu.protocols import Context

DIM = 29
KINDS: dict[str, Callable[[], SSM]] = {
    "s4d": lambda: SSM(DIM, SSMConfig(kernel=S4DConfig(state=10), channels=31)),
    "s4": lambda: SSM(DIM, SSMConfig(kernel=S4Config(state=8), channels=13)),
    "rtf": lambda: SSM(DIM, SSMConfig(kernel=RTFConfig(state=7, length=37))),
    "s4d inverse": lambda: SSM(DIM, SSMConfig(kernel=S4DConfig(state=6, init="inv"))),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


random = partial(gaussian, seed=4)


def build(kind: str) -> SSM:
    torch.manual_seed(3)
    layer = KINDS[kind]().double()
    if kind == "rtf":
        torch.nn.init.uniform_(layer.space.a, -0.1, 0.1)  # away from the shift register that it starts as
    return layer


@every_kind
@pytest.mark.parametrize("chunks", [[23], [1] * 23, [11, 1, 11]])
def test_decoding_from_the_state_equals_the_convolution(kind: str, chunks: list[int]) -> None:
    layer, x = build(kind), random(2, 23, DIM)
    cache = layer.new_cache(2, 23, dtype=torch.float64, device=torch.device("cpu"))
    parts = [layer(part, Context(cache=cache)) for part in x.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-12, atol=1e-12)
    assert cache.length == 23


@every_kind
def test_a_token_never_sees_what_follows(kind: str) -> None:
    layer, x = build(kind), random(2, 11, DIM)
    changed = x.clone()
    changed[:, 7:] = 5.0
    a, b = layer(x), layer(changed)
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-12)
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-3


@every_kind
def test_packed_documents_equal_each_document_alone(kind: str) -> None:
    layer, x = build(kind), random(2, 13, DIM)
    documents = torch.tensor([[4] * 5 + [9] * 7 + [6], [2] * 13])
    packed = layer(x, Context(documents=documents))
    alone = torch.cat((layer(x[:1, :5]), layer(x[:1, 5:12]), layer(x[:1, 12:])), 1)
    torch.testing.assert_close(packed, torch.cat((alone, layer(x[1:]))), rtol=1e-12, atol=1e-12)


@every_kind
def test_gradients_stay_within_a_document(kind: str) -> None:
    layer, x = build(kind), random(1, 13, DIM).requires_grad_()
    layer(x, Context(documents=torch.tensor([[0] * 5 + [1] * 8])))[:, 5:].sum().backward()
    assert x.grad is not None
    assert x.grad[:, :5].abs().max() == 0
    assert (x.grad[:, 5:].abs() > 0).all()


@every_kind
def test_what_a_state_cannot_follow_is_rejected(kind: str) -> None:
    layer, x = build(kind), random(2, 7, DIM)
    window = causal_mask(7, 7) & ~causal_mask(7, 7).tril(-3)
    with pytest.raises(ValueError, match="mask must be None"):
        layer(x, Context(mask=window[None, None]))
    cache = layer.new_cache(2, 7, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot be combined with a cache"):
        layer(x, Context(documents=torch.zeros(2, 7, dtype=torch.int64), cache=cache))


@every_kind
def test_a_nan_in_one_sequence_leaves_the_others_alone(kind: str) -> None:
    layer, x = build(kind), random(3, 7, DIM)
    clean = layer(x)
    x[1, 3] = math.nan
    dirty = layer(x)
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    assert dirty[1].isnan().any()


@every_kind
def test_bfloat16_is_close_to_float64_forward_and_decoding(kind: str) -> None:
    layer, x = build(kind), random(2, 37, DIM)
    exact = layer(x)
    layer = layer.float()
    low = layer(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).norm() / exact.norm() < 0.02
    cache = layer.new_cache(2, 37, dtype=torch.bfloat16, device=torch.device("cpu"))
    decoded = layer(x.bfloat16(), Context(cache=cache))
    assert cache.state.real.dtype == torch.float32
    assert (decoded.double() - exact).norm() / exact.norm() < 0.02


@every_kind
def test_the_state_keeps_its_size(kind: str) -> None:
    layer = build(kind)
    cache = layer.new_cache(3, 5, dtype=torch.float64, device=torch.device("cpu"))
    assert cache.elements() == layer.channels * layer.space.state
    layer(random(3, 29, DIM), Context(cache=cache))
    assert cache.elements() == layer.channels * layer.space.state


@every_kind
def test_state_dict_round_trip_is_exact(kind: str) -> None:
    layer, x = build(kind), random(1, 5, DIM)
    other = KINDS[kind]().double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@every_kind
def test_a_layer_made_on_the_meta_device_is_whole_after_its_parameters_are_drawn(kind: str) -> None:
    with torch.device("meta"):
        layer = KINDS[kind]()
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer(torch.randn(1, 17, DIM)).isfinite().all()


@every_kind
def test_second_derivatives_are_those_of_differences(kind: str) -> None:
    layer, x = build(kind), random(1, 4, DIM)[:, :, :DIM]

    def energy(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    x.requires_grad_()
    direction = random(1, 4, DIM)
    (grad,) = torch.autograd.grad(energy(x), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * direction).sum(), x)
    step = 1e-5
    sides = []
    for sign in (1, -1):
        moved = (x.detach() + sign * step * direction).requires_grad_()
        sides.append(torch.autograd.grad(energy(moved), moved)[0])
    torch.testing.assert_close(second, (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@every_kind
def test_output_has_the_inputs_size_within_a_factor_of_a_few_at_the_start(kind: str) -> None:
    torch.manual_seed(0)
    kernels = {"s4d": S4DConfig(), "s4": S4Config(), "rtf": RTFConfig(), "s4d inverse": S4DConfig(init="inv")}
    layer = SSM(64, SSMConfig(kernel=kernels[kind]))
    y = layer(torch.randn(4, 257, 64))
    assert 0.1 < y.square().mean().sqrt().item() < 3


@pytest.mark.parametrize("kernel", [S4DConfig(state=4), S4Config(state=4), RTFConfig(state=4, length=16)])
def test_the_training_forward_compiles_as_one_graph(kernel: S4DConfig | S4Config | RTFConfig) -> None:
    torch.manual_seed(0)
    layer = SSM(12, SSMConfig(kernel=kernel))
    x = torch.randn(2, 16, 12)
    # One kind is enough for the compiler of backward passes, which is slow.
    backend = "aot_eager" if isinstance(kernel, S4DConfig) else "eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_impossible_sizes_are_rejected_by_name() -> None:
    for config, message in [
        (SSMConfig(channels=0), "channels"),
        (SSMConfig(kernel=S4DConfig(state=5)), "state must be even"),
        (SSMConfig(kernel=S4Config(state=5)), "state must be even"),
        (SSMConfig(kernel=S4Config(dt_max=-1.0)), "dt_max"),
        (SSMConfig(kernel=RTFConfig(state=8, length=8)), "length must be an integer of at least 9"),
        (SSMConfig(kernel=S4DConfig(state=0)), "state"),
        (SSMConfig(kernel=S4DConfig(dt_min=0.2)), "dt_min must be at most"),
        (SSMConfig(kernel=S4DConfig(dt_max=math.inf)), "dt_max"),
        (SSMConfig(kernel=S4DConfig(init="line")), "did you mean 'lin'"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(ValueError, match=message):
            SSM(DIM, config)


@every_kind
def test_two_runs_of_one_number_are_two_documents(kind: str) -> None:
    layer, x = build(kind), random(2, 7, DIM)
    found = layer(x, Context(documents=torch.tensor([[1] * 7, [4, 4, 4, 9, 9, 4, 4]])))
    expected = layer(x, Context(documents=torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 2, 2]])))
    assert torch.equal(found, expected)


@every_kind
@pytest.mark.parametrize(("batch", "time"), [(0, 5), (2, 0), (0, 0)])
def test_of_nothing_it_makes_nothing(kind: str, batch: int, time: int) -> None:
    layer = build(kind)
    x = random(batch, time, DIM).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    cache = layer.new_cache(batch, 7, dtype=torch.float64, device=torch.device("cpu"))
    with torch.no_grad():
        assert layer(x, Context(cache=cache)).shape == x.shape
    assert cache.length == time


@every_kind
def test_the_layer_is_its_formula_summed_token_by_token(kind: str) -> None:
    layer, x = build(kind), random(2, 11, DIM)
    torch.nn.init.normal_(layer.skip)
    u, gate = (x @ layer.project.weight.T).chunk(2, -1)
    K = layer.space.kernel(11)
    mixed = torch.stack([sum(K[:, t - s] * u[:, s] for s in range(t + 1)) for t in range(11)], 1)  # type: ignore[misc]
    expected = ((mixed + layer.skip * u) * gate * gate.sigmoid()) @ layer.out.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


def test_operations_are_two_transforms_of_twice_the_length_and_a_product() -> None:
    layer = SSM(DIM, SSMConfig(kernel=S4DConfig(state=10), channels=31))
    # 2 * 512 - 1 is transformed at length 1024, 5/2 n log2 n each, and three operations a number.
    assert layer.flops_per_token(512) == 31 * (2 * 2.5 * 1024 * 10 + 3 * 1024) / 512
    assert layer.flops_per_token(1) == 31 * (2 * 2.5 * 2 + 3 * 2)
