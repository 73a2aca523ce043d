"""The cost model on plain numbers, and the sizes it gets from a configuration."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from danlu import recipes
from danlu.models import TransformerConfig
from danlu.nn import GQAConfig, MoEConfig
from danlu.train.costs import Pass, Sizes, candidates, estimate
from danlu.train.device import Policy
from danlu.train.devices import DEVICES, Device, device_of
from danlu.train.sizes import sizes_of

DEVICE = Device(name="a device", flops=1e3, memory=1e3, bandwidth=1e2, link=10.0, network=5.0, together=4, share=0.5)
SIZES = Sizes(
    weights=120.0,
    experts=0.0,
    block=20.0,
    outside=40.0,
    state=240.0,
    copies=1,
    ratio=0.5,
    batch=7.0,
    accumulate=1,
    alone={"none": Pass(held=310.0, moved=0.0, calls=0), "blocks": Pass(held=170.0, moved=0.0, calls=0)},
    cut={"none": Pass(held=190.0, moved=0.0, calls=0), "blocks": Pass(held=50.0, moved=0.0, calls=0)},
    operations=5e3,
    muon=0.0,
    routed=0.0,
    num_experts=0,
    items=11.0,
)
POLICY = Policy(
    device=torch.device("cpu"), dtype=torch.bfloat16, matmul_precision="highest", threads=1, gflops={}, name=""
)


def test_one_process_holds_everything_and_sends_nothing() -> None:
    way = estimate(SIZES, DEVICE)
    assert way.memory == 120 + 240 + 120 + 7 + 310  # weights, state, average, batch, pass with its gradients
    assert way.sent == 0
    assert way.compute_seconds == pytest.approx(5e3 / (0.5 * 1e3))
    assert way.optimizer_seconds == pytest.approx((3 * 120 + 2 * 240) / 1e2)
    assert way.mfu == pytest.approx(5e3 / way.seconds / 1e3)
    assert way.items_per_second == pytest.approx(11 / way.seconds)


def test_shards_hold_their_part_and_gather_blocks_in_half_the_bytes() -> None:
    way = estimate(SIZES, DEVICE, shards=4)
    part = (120 + 240 + 120) / 4
    assert way.gathered == 3 * 10 + 40 * 0.5 + 20
    assert way.memory == part + 7 + 190 + 40 * 0.5 + 10  # when the loss turns round
    small = replace(SIZES, cut={"none": Pass(held=3.0, moved=0.0, calls=0)})
    assert estimate(small, DEVICE, shards=4).memory == part + 7 + 120 / 4 + way.gathered  # at the end
    again = estimate(SIZES, DEVICE, shards=4, recompute="blocks")
    assert again.memory == part + 7 + 50 + 120 / 4 + way.gathered
    assert estimate(SIZES, DEVICE, replicas=2).memory == 120 + 240 + 120 + 7 + 310 + 120  # copies are gathered too
    assert way.sent == pytest.approx(3 / 4 * 120 * (0.5 + 0.5 + 1))


def test_replicas_add_up_gradients_once_around_the_ring() -> None:
    assert estimate(SIZES, DEVICE, replicas=4).sent == pytest.approx(2 * 3 / 4 * 120)
    both = estimate(SIZES, DEVICE, replicas=2, shards=2)
    assert both.sent == pytest.approx(1 / 2 * 120 * 2 + 2 * 1 / 2 * 60)


def test_sending_that_takes_longer_than_computing_sets_the_time_and_the_network_is_slower() -> None:
    near = estimate(SIZES, replace(DEVICE, flops=1e9), replicas=4)
    far = estimate(SIZES, replace(DEVICE, flops=1e9), replicas=8)
    assert near.seconds - near.optimizer_seconds == pytest.approx(180 / 10)
    assert far.seconds - far.optimizer_seconds == pytest.approx(2 * 7 / 8 * 120 / 5)


def test_shared_experts_stay_at_home_and_their_tokens_travel() -> None:
    sizes = replace(SIZES, experts=80.0, routed=13.0, num_experts=6)
    way = estimate(sizes, DEVICE, shards=2, experts=2)
    assert way.weights == 40 / 2 + 80 / 2
    assert way.sent == pytest.approx(1 / 2 * 40 * 2 + 4 * 1 / 2 * 13)


def test_recomputing_a_forward_pass_takes_a_third_more_operations() -> None:
    plain, again = (estimate(SIZES, DEVICE, recompute=way) for way in ("none", "blocks"))
    assert again.compute_seconds == pytest.approx(4 / 3 * plain.compute_seconds)
    assert again.mfu < plain.mfu  # the operations that are not the model's own count for nothing
    assert plain.memory - again.memory == 310 - 170


def test_the_fastest_way_that_fits_comes_first_and_then_the_smallest_that_does_not() -> None:
    found = candidates(SIZES, replace(DEVICE, memory=420.0), 4)
    fitting = [way.fits for way in found]
    assert fitting == sorted(fitting, reverse=True)
    assert {True, False} == set(fitting)
    assert [w.seconds for w in found if w.fits] == sorted(w.seconds for w in found if w.fits)
    assert [w.memory for w in found if not w.fits] == sorted(w.memory for w in found if not w.fits)
    assert {(w.replicas, w.shards) for w in found} == {(1, 4), (2, 2), (4, 1)}
    assert {w.experts for w in found} == {1}


def test_experts_are_only_shared_by_processes_that_divide_them() -> None:
    found = candidates(replace(SIZES, experts=30.0, num_experts=6), DEVICE, 12)
    assert {way.experts for way in found} == {1, 2, 3, 6}


def test_a_device_of_ones_own_is_a_json_file_and_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    own = {"name": "mine", "flops": 3.0, "memory": 5.0, "bandwidth": 7.0, "link": 11.0, "network": 13.0}
    file.write_text(json.dumps(own))
    assert device_of(str(file)).memory == 5
    file.write_text(json.dumps({**own, "colour": "red"}))
    with pytest.raises(ValueError, match="must be a JSON object with"):
        device_of(str(file))
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        device_of("h10")
    assert all(device.source for device in DEVICES.values())


def test_the_sizes_of_a_configuration_are_those_of_its_parts() -> None:
    config = recipes.load("lm-dense")
    model = TransformerConfig(
        dim=32,
        layers=3,
        hidden=40,
        attention=GQAConfig(num_heads=2),
        experts=MoEConfig(num_experts=5, top_k=2, hidden=24, num_shared_experts=0),
    )
    config = replace(config, model=model, data=replace(config.data, vocab_size=257, length=61, batch=14))
    found = sizes_of(config, POLICY, processes=2, kind="cuda")
    sizes = found.sizes
    assert sizes.weights == 4 * found.parameters
    assert sizes.experts == 2 * 4 * 5 * 3 * 24 * 32
    assert sizes.outside == 4 * (2 * 257 * 32 + 32)
    assert sizes.items == 14 * 61
    assert sizes.routed == 2 * 2 * 7 * 61 * 2 * 32  # two layers, two bytes, rows, tokens, choices, size
    assert sizes.alone["blocks"].held < 0.7 * sizes.alone["none"].held
    assert sizes.cut["none"].held < sizes.alone["none"].held
    with pytest.raises(ValueError, match="divisible by the 3 processes, got 14"):
        sizes_of(config, POLICY, processes=3, kind="cuda")
