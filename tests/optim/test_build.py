"""One optimizer from a configuration: every parameter once, each under its rule."""

import pytest
import torch
from torch import nn

from danlu.optim import (
    ROLES,
    AdamWConfig,
    AmosConfig,
    CombinedOptimizer,
    LionConfig,
    Muon,
    MuonConfig,
    TigerConfig,
    build_optimizers,
    describe,
)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def test_muon_takes_the_linear_maps_and_adamw_the_rest_each_parameter_once():
    network = model()
    optimizer = MuonConfig(lr=0.02).build(network)
    assert isinstance(optimizer, CombinedOptimizer)
    muon, adamw = optimizer.rules
    assert isinstance(muon, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert {g["role"] for g in muon.param_groups} == {"matrix"}
    assert {g["role"] for g in adamw.param_groups} == {"embedding", "gain", "bias"}
    held = [id(p) for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters())


def test_both_share_rate_and_decay_unless_told_otherwise():
    shared = MuonConfig(lr=0.02, weight_decay=0.3).build(model())
    decaying = [g for g in shared.param_groups if g["role"] not in ("gain", "bias")]
    assert {(g["lr"], g["weight_decay"]) for g in decaying} == {(0.02, 0.3)}
    apart = MuonConfig(lr=0.02, adamw_lr=0.5).build(model())
    assert {g["lr"] for g in apart.param_groups if g["role"] != "matrix"} == {0.5}


@pytest.mark.parametrize(
    "config",
    [
        MuonConfig(lr=0.01, adamw_lr=0.02, embedding_lr=0.3),
        AdamWConfig(lr=0.02, embedding_lr=0.3),
        LionConfig(lr=0.02, embedding_lr=0.3),
    ],
)
def test_embeddings_take_their_own_rate_where_one_is_given(config):
    rates = {group["role"]: group["lr"] for group in config.build(model()).param_groups}
    assert rates.pop("embedding") == 0.3
    rates.pop("matrix")
    assert set(rates.values()) == {0.02}


@pytest.mark.parametrize("config", [MuonConfig(no_decay=("gain", "bias")), AdamWConfig(no_decay=("gain", "bias"))])
def test_roles_without_decay_have_none(config):
    decays = {g["role"]: g["weight_decay"] for g in config.build(model()).param_groups}
    assert decays["gain"] == decays["bias"] == 0
    assert decays["embedding"] == decays["matrix"] == 0.1


def test_adamw_is_torchs_fused_adamw():
    optimizer = AdamWConfig(lr=0.1).build(model())
    assert optimizer.defaults["fused"]


def test_adamw_is_right_for_a_parameter_whose_memory_has_gaps():
    network = nn.Linear(6, 4)
    whole = nn.Linear(6, 4)
    whole.load_state_dict(network.state_dict())
    network.weight = nn.Parameter(torch.cat([network.weight, network.weight], 1).detach()[:, :6])
    for each in (network, whole):
        optimizer = AdamWConfig(lr=0.1).build(each)
        for _ in range(2):
            each(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(network.weight, whole.weight)


@pytest.mark.parametrize("config", [LionConfig(lr=1e-2), TigerConfig(lr=3e-2), AmosConfig(lr=0.03, embedding_eta=1.0)])
def test_one_optimizer_takes_every_parameter_with_its_role(config):
    network = model()
    optimizer = config.build(network)
    assert type(config).__name__ == f"{type(optimizer).__name__}Config"
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in network.parameters()}
    roles = {g["role"]: g for g in optimizer.param_groups}
    assert set(roles) == {"matrix", "embedding", "gain", "bias"}
    if isinstance(config, AmosConfig):
        assert roles["embedding"]["eta"] == 1.0
        assert roles["matrix"]["eta"] is None
    if isinstance(config, LionConfig):
        assert {role: g["weight_decay"] for role, g in roles.items()}["gain"] == 0
    tokens, targets = torch.arange(11), torch.arange(11) % 3
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(tokens), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (LionConfig, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in"),
        (LionConfig, {"embedding_lr": -1.0}, "embedding_lr must be in"),
        (LionConfig, {"momentum_dtype": "float16"}, "momentum_dtype must be one of"),
        (LionConfig, {"no_decay": ("gains",)}, "did you mean 'gain'"),
        (TigerConfig, {"beta": 1.0}, "beta must be in"),
        (AmosConfig, {"clip": -1.0}, "clip must be in"),
        (AmosConfig, {"embedding_eta": 0.0}, "embedding_eta must be in"),
    ],
)
def test_configs_name_what_is_out_of_range(kind, options, says):
    with pytest.raises(ValueError, match=says):
        kind(**options)


def test_a_model_of_linear_maps_alone_needs_no_adamw():
    assert type(MuonConfig().build(nn.Linear(3, 5, bias=False))) is Muon


def test_both_rules_lower_the_loss():
    network, tokens, targets = model(), torch.arange(11), torch.arange(11) % 3
    optimizer = MuonConfig(lr=0.05, weight_decay=0.0).build(network)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(tokens), targets)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.05 * losses[0]


def test_options_of_the_config_reach_muon():
    config = MuonConfig(momentum=0.9, nesterov=False, scale="rms", method="jordan", steps=5, dtype="bfloat16")
    muon = config.build(nn.Linear(3, 5, bias=False))
    assert (muon.defaults["momentum"], muon.defaults["nesterov"], muon.defaults["scale"]) == (0.9, False, "rms")
    assert (muon.composition.name, muon.dtype) == ("jordan", torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MuonConfig(lr=-1.0), "lr must be in"),
        (lambda: MuonConfig(steps=0), "steps must be"),
        (lambda: MuonConfig(dtype="float16"), "dtype must be one of"),
        (lambda: MuonConfig(betas=(0.9, 1.0)), r"betas\[1\] must be in"),
        (lambda: MuonConfig(no_decay=("gains",)), "did you mean 'gain'"),
        (lambda: AdamWConfig(eps=0.0), "eps must be in"),
        (lambda: AdamWConfig(betas=(0.9,)), "betas must be two numbers"),
    ],
)
def test_bad_values_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_the_list_of_earlier_releases_is_the_one_optimizer_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"use config.build\(model\)"):
        (optimizer,) = build_optimizers(model(), MuonConfig(lr=0.02))
    assert isinstance(optimizer, CombinedOptimizer)


def test_what_cannot_build_is_rejected_by_the_alias():
    with pytest.raises(TypeError, match=r"config must have a method build\(model\), .*got str"):
        build_optimizers(model(), "muon")


@pytest.mark.parametrize("config", [MuonConfig(), AdamWConfig(), LionConfig(), TigerConfig()])
def test_gains_and_biases_decay_under_no_configuration_and_the_table_says_so(config):
    groups = config.build(model()).param_groups
    for group in groups:
        assert (group["weight_decay"] == 0.0) == (group["role"] in ("gain", "bias"))
    rows = [line.split() for line in describe(groups).splitlines()[2:-1]]
    assert {row[0]: row[-1] == "none" for row in rows if row[0] in ROLES} == {
        group["role"]: group["role"] in ("gain", "bias") for group in groups
    }


def test_the_extra_decay_of_amos_leaves_gains_and_biases_alone():
    for group in AmosConfig(extra_l2=0.1).build(model()).param_groups:
        assert group["extra_l2"] == (0.0 if group["role"] in ("gain", "bias") else 0.1)


@pytest.mark.parametrize("config", [LionConfig(), TigerConfig(), AmosConfig(), MuonConfig()])
def test_a_compiled_step_of_several_groups_is_one_graph(config):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = model()
    optimizer = config.build(network)
    compiled = torch.compile(optimizer.step, backend=keep)
    for _ in range(3):
        network(torch.arange(6)).square().sum().backward()
        compiled()
    assert len(graphs) == 1
