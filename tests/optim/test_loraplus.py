"""LoRA+: which parameter is in which group at which rate, what keeps the ratio, and PEFT's modules."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from danlu.nn import LoRAConfig, apply_lora
from danlu.optim import (
    Constant,
    Cosine,
    InverseTime,
    WarmupStableDecay,
    balanced_ratio,
    check_partition,
    loraplus_groups,
    schedule,
    watch_ratio,
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(13, 8)
        self.first = nn.Linear(8, 20)
        self.norm = nn.LayerNorm(20)
        self.second = nn.Linear(20, 3)

    def forward(self, tokens):
        return self.second(self.norm(self.first(self.table(tokens)).tanh()))


def adapted(**options):
    torch.manual_seed(0)
    model = apply_lora(Small(), LoRAConfig(**{"rank": 2, "exclude": (), **options}))
    model.norm.requires_grad_(True)
    model.second.base.bias.requires_grad_(True)
    return model


def by_role(groups):
    return {group["role"]: group for group in groups}


def test_every_parameter_is_in_the_group_and_at_the_rate_of_its_side():
    model = adapted()
    groups = by_role(loraplus_groups(model, 1e-3, 16, weight_decay=0.1))
    assert groups["lora_A"]["param_names"] == ["first.lora_A", "second.lora_A"]
    assert groups["lora_B"]["param_names"] == ["first.lora_B", "second.lora_B"]
    assert groups["vector"]["param_names"] == ["norm.weight", "norm.bias", "second.base.bias"]
    assert groups["embedding"]["param_names"] == ["table.lora_embedding_A", "table.lora_embedding_B"]
    rates = {role: (group["lr"], group["weight_decay"]) for role, group in groups.items()}
    assert rates == {
        "lora_A": (1e-3, 0.1),
        "lora_B": (16e-3, 0.1),
        "vector": (16e-3, 0.0),
        "embedding": (pytest.approx(1e-6, rel=1e-14), 0.1),
    }
    check_partition(list(groups.values()), model)


def test_another_trained_matrix_goes_with_the_input_side():
    model = adapted()
    model.head = nn.Linear(3, 5)
    groups = by_role(loraplus_groups(model, 1e-3))
    assert "head.weight" in groups["lora_A"]["param_names"]
    assert "head.bias" in groups["vector"]["param_names"]


def test_frozen_parameters_are_left_out():
    model = adapted()
    model.first.lora_A.requires_grad_(False)
    assert "first.lora_A" not in [n for g in loraplus_groups(model, 1e-3) for n in g["param_names"]]


def test_the_automatic_ratio_is_the_balance_of_each_layer_and_never_below_one():
    model = adapted()
    groups = [group for group in loraplus_groups(model, 1e-3, "auto") if group["role"] == "lora_B"]
    found = {group["param_names"][0]: group["lr_factor"] for group in groups}
    assert found["second.lora_B"] == pytest.approx(20 / 3 * (3 / 2) ** 0.5)
    assert found["first.lora_B"] == pytest.approx(max(1, 8 / 20 * (20 / 2) ** 0.5))
    wide = apply_lora(nn.Sequential(nn.Linear(3, 300)), LoRAConfig(rank=3))
    assert balanced_ratio(3, 300, 3) < 1
    assert by_role(loraplus_groups(wide, 1e-3, "auto"))["lora_B"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("n", "m", "rank", "expected"),
    [(256, 256, 8, 5.66), (768, 768, 8, 9.80), (4096, 4096, 64, 8.00), (4096, 1024, 8, 45.25), (1024, 4096, 8, 5.66)],
)
def test_the_balance_agrees_with_the_table_of_the_derivation(n, m, rank, expected):
    assert balanced_ratio(n, m, rank) == pytest.approx(expected, abs=0.005)


def trained(model, groups, steps=10):
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(13, (16,), generator=generator)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_ratio_one_is_adamw_bit_for_bit():
    first = adapted()
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    plain = trained(first, [p for p in first.parameters() if p.requires_grad])
    one = trained(second, loraplus_groups(second, 1e-2, 1, embedding_lr=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(plain, one))
    sixteen = trained(third, loraplus_groups(third, 1e-2, 16, embedding_lr=1e-2))
    assert not all(torch.equal(a, b) for a, b in zip(plain, sixteen))


SCHEDULES = [
    Constant(warmup=5),
    WarmupStableDecay(warmup=5, decay=0.5, floor=0.1),
    Cosine(warmup=5, floor=0.1),
    InverseTime(half_life=7.0, squared=True),
]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: type(config).__name__)
def test_every_schedule_of_danlu_keeps_the_ratio_without_a_warning(config):
    optimizer = torch.optim.AdamW(loraplus_groups(adapted(), 1e-3, 16))
    watch_ratio(optimizer)
    scheduler = schedule(optimizer, config, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            optimizer.step()
            scheduler.step()
            rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
            assert rates["lora_B"] == pytest.approx(16 * rates["lora_A"], rel=1e-12)


def test_a_factor_of_zero_breaks_nothing():
    optimizer = torch.optim.AdamW(loraplus_groups(adapted(), 1e-3, embedding_lr=0.0))
    watch_ratio(optimizer)
    scheduler = LambdaLR(optimizer, lambda step: float(step > 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
        optimizer.step()


def cosine_to_one_rate(optimizer):
    return CosineAnnealingLR(optimizer, 10, eta_min=1e-4).step


def plateau(optimizer):
    scheduler = ReduceLROnPlateau(optimizer, factor=1e-3, patience=0, min_lr=1e-4)
    return lambda: scheduler.step(1.0)


@pytest.mark.parametrize("make", [cosine_to_one_rate, plateau])
def test_a_schedule_with_one_absolute_floor_is_warned_of_once(make):
    optimizer = torch.optim.AdamW(loraplus_groups(adapted(), 1e-3))
    handle = watch_ratio(optimizer)
    advance = make(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            optimizer.step()
            advance()
    assert [str(w.message)[:50] for w in caught] == ["the learning rates no longer keep the ratio of LoR"]
    handle.remove()


def test_a_state_dict_brings_the_factors_back():
    optimizer = torch.optim.AdamW(loraplus_groups(adapted(), 1e-3))
    restored = torch.optim.AdamW(loraplus_groups(adapted(), 5e-3, 4))
    restored.load_state_dict(optimizer.state_dict())
    assert [g["lr_factor"] for g in restored.param_groups] == [g["lr_factor"] for g in optimizer.param_groups]
    watch_ratio(restored)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0.5}, ValueError, "ratio"),
        ({"ratio": "atuo"}, ValueError, "did you mean 'auto'"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"embedding_lr": -1.0}, ValueError, "embedding_lr"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"model": [nn.Linear(3, 3)]}, TypeError, "model"),
        ({"model": nn.Linear(3, 3)}, ValueError, "apply adapters first"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        loraplus_groups(**{"model": adapted(), "lr": 1e-3, **options})


def test_an_optimizer_of_other_groups_is_refused():
    with pytest.raises(ValueError, match="lr_factor"):
        watch_ratio(torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1))


def test_pefts_modules_are_sorted_and_its_adapted_embedding_is_found():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["table", "first", "second"], lora_bias=False)
    model = peft.get_peft_model(Small(), config)
    groups = by_role(loraplus_groups(model, 1e-3, "auto"))
    assert len(groups["lora_A"]["params"]) == 2
    assert len(groups["embedding"]["params"]) == 2
    check_partition(loraplus_groups(model, 1e-3, 16), model)
    found = loraplus_groups(model, 1e-3, "auto")
    assert max(g["lr_factor"] for g in found if g["role"] == "lora_B") == pytest.approx(20 / 3 * (3 / 2) ** 0.5)


def test_the_magnitudes_of_a_convolution_are_a_vector():
    convolution = nn.Module()
    convolution.lora_A = nn.ModuleDict({"default": nn.Conv2d(3, 1, 3, bias=False)})
    convolution.lora_B = nn.ModuleDict({"default": nn.Conv2d(1, 5, 1, bias=False)})
    convolution.lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(torch.ones(1, 5, 1, 1))})
    names = {group["role"]: group["param_names"] for group in loraplus_groups(convolution, 1e-3)}
    assert names == {
        "lora_A": ["lora_A.default.weight"],
        "lora_B": ["lora_B.default.weight"],
        "vector": ["lora_magnitude_vector.default"],
    }
