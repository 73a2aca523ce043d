"""A state that was saved as files keep it, without strides, meets the same weights again."""

import copy
import pickle

import pytest
import torch
from torch import nn

from danlu.optim import AdamWConfig, AmosConfig, LionConfig, MuonConfig, TigerConfig
from danlu.train.checkpoint import pack, plain_groups, unpack

CONFIGS = [AdamWConfig(), MuonConfig(dtype="float32"), LionConfig(), TigerConfig(), AmosConfig()]
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3)).to(memory_format=torch.channels_last)


def train(network, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        network(IMAGES).square().mean().backward()
        optimizer.step()


def contiguous(state):
    kept = {
        key: {slot: held.clone(memory_format=torch.contiguous_format) for slot, held in slots.items()}
        for key, slots in state["state"].items()
    }
    return {"state": kept, "param_groups": copy.deepcopy(state["param_groups"])}


def packed(state):
    return unpack(*pack(plain_groups(copy.deepcopy(state))))


@pytest.mark.parametrize("kept", [contiguous, packed])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_resumed_network_of_channels_last_is_bit_equal_to_the_uninterrupted_one(config, kept):
    network = convolutions()
    assert not network[0].weight.is_contiguous()
    optimizer = config.build(network)
    train(network, optimizer)
    resumed = copy.deepcopy(network)
    other = config.build(resumed)
    other.load_state_dict(kept(optimizer.state_dict()))
    train(network, optimizer)
    train(resumed, other)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), resumed.parameters(), strict=True))


def test_the_kernel_that_sees_no_strides_is_the_one_tested():
    optimizer = AdamWConfig().build(convolutions())
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_adamw_is_adamw_and_loads_as_it_does(copied):
    network = convolutions()
    optimizer = AdamWConfig().build(network)
    train(network, optimizer)
    twin_network, twin = copied((network, optimizer))
    assert type(twin).__name__ == "AdamW"
    assert isinstance(twin, torch.optim.AdamW)
    twin.load_state_dict(contiguous(twin.state_dict()))
    train(network, optimizer)
    train(twin_network, twin)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin_network.parameters(), strict=True))
