"""Weights in bfloat16: what an update that is smaller than their resolution does to them."""

import math
import warnings

import pytest
import torch
from tensors import gaussian
from torch import nn

from danlu._draws import mixed32
from danlu.optim import AdamWConfig, Amos, AmosConfig, Lion, LionConfig, Muon, MuonConfig, Tiger, TigerConfig
from danlu.optim import state_bytes as bytes_of
from danlu.optim.adamw import RoundedAdamW
from danlu.optim.rounding import _keys, _noise, stream

MAKE = {
    "Lion": lambda p, **o: Lion(p, lr=1e-5, weight_decay=0.1, **o),
    "Tiger": lambda p, **o: Tiger(p, lr=1e-4, **o),
    "Amos": lambda p, **o: Amos(p, lr=1e-3, momentum=0.9, **o),
    "Muon": lambda p, **o: Muon(p, lr=3e-5, dtype=torch.float32, **o),
    "AdamW": lambda p, **o: RoundedAdamW(p, lr=1e-5, **{"rounding": "nearest", **o}),
}
CONFIGS = [LionConfig, TigerConfig, AmosConfig, MuonConfig, AdamWConfig]
every = pytest.mark.parametrize("name", MAKE)


def weight(*shape, seed=0, dtype=torch.bfloat16):
    return nn.Parameter((0.1 * gaussian(*shape, seed=seed, dtype=torch.float32)).to(torch.bfloat16).to(dtype))


def gradient(parameter, seed):
    return gaussian(*parameter.shape, seed=seed, dtype=torch.float32).to(parameter.dtype)


def run(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        for index, parameter in enumerate(params):
            parameter.grad = gradient(parameter, 10 * step + index)
        optimizer.step()


def test_what_a_hundred_steps_of_lion_at_1e_5_do():
    moved = {}
    for rounding in ("nearest", "stochastic", "compensated"):
        parameter = nn.Parameter(torch.full((64, 64), 0.1, dtype=torch.bfloat16))
        start, optimizer = parameter.detach().float(), Lion([parameter], lr=1e-5, rounding=rounding)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        moved[rounding] = float((start - parameter.detach().float()).mean())
    assert moved["nearest"] == 0.0
    # A random walk of rounding: each of 100 steps has at most half a spacing (2^-12 at 0.1) as its deviation.
    assert abs(moved["stochastic"] - 1e-3) < 6 * 100**0.5 * 2**-12 / 2 / 64
    assert abs(moved["compensated"] - 1e-3) < 2**-13


@every
def test_the_mean_of_stochastic_rounding_is_the_float32_update(name):
    with_seeds = 400
    parameter = weight(16, 24)
    wide = nn.Parameter(parameter.detach().float())
    total = torch.zeros_like(wide)
    for seed in range(with_seeds):
        one = nn.Parameter(parameter.detach().clone())
        run(MAKE[name]([one], rounding="stochastic", rounding_seed=seed), [one], 1)
        total += one.detach().float()
    reference = MAKE[name]([parameter], rounding="compensated")
    run(reference, [parameter], 1)
    rest = reference.state[parameter]["rounding_rest"].to(torch.int32)
    exact = ((parameter.detach().view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)
    # Two neighbours of distance d: a mean of n draws deviates by at most d / 2 / sqrt(n), here six times that.
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    assert ((total / with_seeds - exact).abs() <= 6 * spacing / 2 / math.sqrt(with_seeds)).all()
    assert (exact != wide).float().mean() > 0.9


def test_the_noise_is_even_and_that_of_neighbours_steps_and_seeds_has_nothing_in_common():
    index = torch.arange(1 << 16, dtype=torch.int32)
    keys = [(stream("Lion", seed, place), torch.tensor(t)) for seed in (0, 1) for place in (0, 1) for t in (1, 2, 1000)]
    streams = [(_noise(index, *_keys(*key)) & 0xFFFF).double() / 2**16 - 0.5 for key in keys]
    streams += [streams[0].roll(1), streams[0].roll(64)]
    table = torch.stack(streams)
    bound = 6 / math.sqrt(index.numel())  # of means and products in units of their deviations
    assert (table.mean(1).abs() * 12**0.5 < bound).all()
    assert ((table @ table.mT / index.numel() * 12 - torch.eye(len(streams))).abs() < bound).all()


@every
def test_compensated_weights_follow_float32_ones_bit_by_bit(name):
    parameter = weight(16, 24)
    wide = nn.Parameter(parameter.detach().float())
    optimizer, reference = MAKE[name]([parameter], rounding="compensated"), MAKE[name]([wide], rounding="compensated")
    slots = reference.slots(parameter, reference.param_groups[0])
    for step in range(30):
        parameter.grad = gradient(parameter, step)
        optimizer.step()
        with torch.no_grad():
            args = ([tensor] for tensor in slots.values())
            reference.update(reference.param_groups[0], [wide], [gradient(parameter, step)], *args)
    rest = optimizer.state[parameter]["rounding_rest"].to(torch.int32)
    kept = ((parameter.detach().view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)
    assert torch.equal(kept, wide.detach())
    assert ((parameter.detach().float() - kept).abs() <= 2.0**-8 * kept.abs()).all()


@every
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_a_resumed_run_is_bit_exact(name, rounding, tmp_path):
    params = [weight(6, 8), weight(8, 4, seed=1), weight(4, 4, seed=2, dtype=torch.float32)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, first = (MAKE[name](each, rounding=rounding, rounding_seed=7) for each in (params, twins))
    run(optimizer, params, 6)
    run(first, twins, 3)
    torch.save(first.state_dict(), tmp_path / "state")
    again = [nn.Parameter(p.detach().clone()) for p in twins]
    second = MAKE[name](again)
    second.load_state_dict(torch.load(tmp_path / "state"))
    run(second, again, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(params, again))
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert bytes_of(optimizer) == held


@every
def test_wider_weights_are_left_as_they_are(name):
    results = []
    for rounding in ("nearest", "stochastic", "compensated"):
        parameter = weight(6, 8, dtype=torch.float32)
        run(MAKE[name]([parameter], rounding=rounding), [parameter], 3)
        results.append(parameter.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every
def test_a_state_of_before_there_was_a_choice_begins_without_a_rest(name):
    parameter = weight(6, 8)
    optimizer = MAKE[name]([parameter], rounding="compensated")
    run(optimizer, [parameter], 2)
    saved = optimizer.state_dict()
    saved["state"][0].pop("rounding_rest")
    for option in ("rounding", "rounding_seed"):
        saved["param_groups"][0].pop(option)
    optimizer.load_state_dict(saved)
    assert not optimizer.state[parameter]["rounding_rest"].any()
    run(optimizer, [parameter], 1)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_what_is_not_finite_stays_so_and_a_weight_set_to_zero_stays_near_it(rounding):
    values = [float("nan"), float("inf"), -float("inf"), 0.1, -0.1, 3.3e38]
    parameter = nn.Parameter(torch.tensor([values], dtype=torch.bfloat16))
    optimizer = Lion([parameter], lr=1e-5, rounding=rounding)
    for _ in range(5):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(parameter.isfinite()[0], torch.tensor([False, False, False, True, True, True]))
    parameter.data.zero_()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (parameter.abs() < 1e-4).all()


def test_every_part_of_a_large_or_strided_parameter_has_noise_of_its_own():
    flat = nn.Parameter(torch.full((700, 600), 0.1, dtype=torch.bfloat16))
    strided = nn.Parameter(torch.full((600, 700), 0.1, dtype=torch.bfloat16).mT)
    for parameter in (flat, strided):
        optimizer = Lion([parameter], lr=1e-5, rounding="stochastic")
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(flat, strided)
    up = (flat.detach() != flat.detach().max()).float()
    assert abs(float((up[:350] * up[350:]).mean() - up.mean() ** 2)) < 0.01


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_every_configuration_takes_it_and_a_compiled_step_is_one_graph(config, rounding):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).bfloat16()
    plain = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).bfloat16()
    plain.load_state_dict(network.state_dict())
    options = {"dtype": "float32"} if config is MuonConfig else {}
    optimizer, eager = (config(lr=1e-5, rounding=rounding, **options).build(each) for each in (network, plain))
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, backend=keep)
    for _ in range(3):
        for each, step in ((network, compiled), (plain, eager.step)):
            each.zero_grad()
            each(torch.arange(6)).float().square().sum().backward()
            step()
    assert len(graphs) == 1
    torch.testing.assert_close(list(network.parameters()), list(plain.parameters()))


class TestTheWarning:
    """Lost updates are named once, and nothing else is."""

    def caught(self, parameter, optimizer, steps=6, grads=None):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for step in range(steps):
                parameter.grad = gradient(parameter, step) if grads is None else grads.clone()
                optimizer.step()
        return [str(w.message) for w in found if "resolution" in str(w.message)]

    @every
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_comes_once(self, name, dtype):
        parameter = nn.Parameter(torch.full((16, 24), 0.9).to(dtype))
        optimizer = MAKE[name]([parameter])
        for group in optimizer.param_groups:
            group["lr"] *= 0.01
        assert len(self.caught(parameter, optimizer)) == 1

    @pytest.mark.filterwarnings("ignore:a step of Muon")
    def test_torchs_adamw_of_a_configuration_says_it_too(self):
        for config in (AdamWConfig(lr=1e-6), MuonConfig(lr=1e-6)):
            network = nn.Sequential(nn.Embedding(300, 4), nn.Linear(4, 8)).bfloat16()
            optimizer = config.build(network)
            network(torch.arange(300)).float().square().sum().backward()
            with pytest.warns(UserWarning, match="AdamW changed .* below the resolution"):
                optimizer.step()

    def test_it_does_not_come_without_cause(self):
        assert not self.caught(weight(8, 8, dtype=torch.float32), Lion([weight(8, 8, dtype=torch.float32)], lr=1e-9))
        for options, grads in (({"lr": 0.01}, None), ({"lr": 0.0}, None), ({"lr": 1e-6}, torch.zeros(8, 8))):
            parameter = weight(8, 8)
            grads = None if grads is None else grads.bfloat16()
            assert not self.caught(parameter, Lion([parameter], **options), grads=grads)
        parameter = weight(8, 8)
        assert not self.caught(parameter, Lion([parameter], lr=1e-6, rounding="stochastic"))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_that_is_large_enough_is_the_float32_step_rounded(name, dtype):
    results = []
    for kept in (dtype, torch.float32):
        parameter = nn.Parameter(torch.full((16, 24), 0.5, dtype=kept))
        optimizer = MAKE[name]([parameter])
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        parameter.grad = gaussian(16, 24, dtype=torch.float32).to(torch.bfloat16).to(kept)
        optimizer.step()
        results.append(parameter.detach().float())
    # A few roundings to 2^-9 of what is at most 1.
    torch.testing.assert_close(*results, rtol=0, atol=4 * 2**-9)
    assert (results[0] != 0.5).float().mean() > 0.4


def test_what_cannot_be_rounded_so_is_named():
    half = nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"parameter w of group 0 is torch.float16; rounding='compensated' is for bf"):
        Lion([("w", half)], rounding="compensated")
    with pytest.raises(ValueError, match="did you mean 'stochastic'"):
        LionConfig(rounding="stocastic")
    with pytest.raises(ValueError, match="rounding_seed must be"):
        AdamWConfig(rounding_seed=-1)


def test_no_two_of_two_million_numbers_are_mixed_to_one():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31, (2**21,), generator=generator).unique().to(torch.int32)
    assert mixed32(numbers).unique().numel() == numbers.numel()
