"""The bytes of an optimizer's state, told before the first step, are those that it holds after it."""

import pytest
import torch
from torch import nn

from danlu.optim import (
    AdamWConfig,
    Amos,
    AmosConfig,
    Lion,
    LionConfig,
    Muon,
    MuonConfig,
    Tiger,
    TigerConfig,
    state_bytes,
)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 24), nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 16)).to(dtype)


def held(optimizer):
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


def check(network, optimizer):
    told = state_bytes(optimizer)
    assert not held(optimizer) or isinstance(optimizer, torch.optim.Adagrad)
    network(torch.arange(16)).square().sum().backward()
    optimizer.step()
    assert told == held(optimizer) == state_bytes(optimizer)


CONFIGS = [
    MuonConfig(),
    MuonConfig(momentum_dtype="bfloat16"),
    AdamWConfig(),
    LionConfig(momentum_dtype="bfloat16"),
    TigerConfig(),
    AmosConfig(),
    AmosConfig(momentum=None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_of_every_configuration(config, dtype):
    network = model(dtype)
    check(network, config.build(network))


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, amsgrad=True),
        lambda params: torch.optim.Adam(params, fused=True),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adafactor,
        torch.optim.NAdam,
    ],
)
def test_of_torchs_own(make):
    network = model()
    check(network, make(network.parameters()))


def test_a_sign_momentum_is_one_number_a_parameter_and_amos_without_momentum_three_vectors():
    weight = nn.Parameter(torch.zeros(153, 256))
    assert state_bytes(Tiger([weight])) == state_bytes(Lion([weight])) == state_bytes(Muon([weight])) == 156_672
    assert state_bytes(Muon([weight], momentum_dtype=torch.bfloat16)) == 78_336
    assert state_bytes(Amos([weight])) == 2 * 4 * 153 + 4
    assert state_bytes(Amos([weight], momentum=0.9)) == 156_672 + 2 * 4 * 153 + 4


def test_frozen_parameters_and_those_on_the_meta_device_and_the_optimizer_stays_as_it_was():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(network.parameters())
    assert state_bytes(optimizer) == 2 * 4 * (72 + 36) + 4 * 4
    network[0].requires_grad_(False)
    assert state_bytes(optimizer) == 2 * 4 * 36 + 2 * 4
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_declared_role_decides_what_is_kept():
    weight = nn.Parameter(torch.zeros(6, 4))
    weight.danlu_role = "gain"
    assert state_bytes(Amos([weight])) == 4 + 2 * 4


def test_what_is_no_optimizer_is_rejected():
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got list"):
        state_bytes([])


def test_an_optimizer_that_makes_its_state_from_a_closure_says_that_it_cannot_tell():
    with pytest.raises(TypeError, match="LBFGS does not tell its state before a step"):
        state_bytes(torch.optim.LBFGS([nn.Parameter(torch.zeros(3))]))
