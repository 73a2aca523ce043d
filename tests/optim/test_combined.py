"""Several rules are one optimizer to everything in torch that takes one."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from danlu.optim import (
    AdamWConfig,
    CombinedOptimizer,
    Lion,
    Muon,
    MuonConfig,
    build_optimizers,
    clip_grad_norm_,
    merged_state_dicts,
    param_groups,
)

CONFIG = MuonConfig(lr=0.02, adamw_lr=0.01, embedding_lr=0.05, momentum_dtype="bfloat16")
TOKENS, TARGETS = torch.arange(11), torch.arange(11) % 3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def loss_of(network):
    return nn.functional.cross_entropy(network(TOKENS), TARGETS)


def train(network, optimizer, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def apart(network, config=CONFIG):
    """Return Muon and AdamW as two optimizers, as they were stepped by hand."""
    groups = param_groups(network)
    muon = Muon([group for group in groups if group["role"] == "matrix"], **config.muon_options())
    options = {"lr": config.adamw_lr, "embedding_lr": config.embedding_lr, "no_decay": config.no_decay}
    return [muon, AdamWConfig(**options).of_groups([group for group in groups if group["role"] != "matrix"])]


def train_apart(network, optimizers, steps=3):
    for _ in range(steps):
        network.zero_grad()
        loss_of(network).backward()
        for optimizer in optimizers:
            optimizer.step()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_one_step_is_the_step_of_each_rule():
    together, by_hand = model(), model()
    train(together, CONFIG.build(together))
    train_apart(by_hand, apart(by_hand))
    assert same(together, by_hand)


def test_it_is_an_optimizer_whose_groups_are_the_rules_own():
    optimizer = CONFIG.build(model())
    assert isinstance(optimizer, torch.optim.Optimizer)
    held = [group for rule in optimizer.rules for group in rule.param_groups]
    assert all(mine is theirs for mine, theirs in zip(optimizer.param_groups, held, strict=True))


def test_a_scheduler_reaches_every_rule_also_after_loading():
    network = model()
    optimizer = CONFIG.build(network)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = LambdaLR(optimizer, lambda count: 0.5**count)
    train(network, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.rules[0].param_groups] == [0.01]
    assert [group["lr"] for group in optimizer.rules[1].param_groups] == [0.025, 0.005, 0.005]


@pytest.mark.parametrize(
    ("kind", "options"), [(OneCycleLR, {"total_steps": 6}), (CyclicLR, {"base_lr": 0.01, "step_size_up": 3})]
)
def test_torchs_cycles_of_the_rate_reach_every_rule_and_those_of_the_momentum_are_refused(kind, options):
    network = model()
    optimizer = CONFIG.build(network)
    schedule = kind(optimizer, max_lr=0.1, cycle_momentum=False, **options)
    train(network, optimizer, 1)
    before = optimizer.param_groups[0]["lr"]
    schedule.step()
    rates = {group["lr"] for rule in optimizer.rules for group in rule.param_groups}
    assert rates == set(schedule.get_last_lr())
    assert before not in rates
    with pytest.raises(ValueError, match="cycle_momentum"):
        kind(optimizer, max_lr=0.1, **options)


@pytest.mark.parametrize("use", [lambda optimizer: optimizer.step(), lambda optimizer: optimizer.state_dict()])
@pytest.mark.parametrize("removed", [0, -1])
def test_a_group_that_was_removed_is_neither_updated_nor_saved(removed, use):
    network = model()
    optimizer = CONFIG.build(network)
    train(network, optimizer, 1)
    gone = optimizer.param_groups[removed]["params"]
    before = [parameter.detach().clone() for parameter in gone]
    del optimizer.param_groups[removed]
    use(optimizer)
    assert sum(len(rule.param_groups) for rule in optimizer.rules) == len(optimizer.param_groups) == 3
    train(network, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, gone, strict=True))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(optimizer.state_dict()["param_groups"]) == 3


def test_groups_that_were_assigned_in_another_order_are_saved_in_that_order():
    optimizer = CONFIG.build(model())
    optimizer.param_groups = optimizer.param_groups[::-1]
    roles = [group["role"] for group in optimizer.state_dict()["param_groups"]]
    assert roles == ["bias", "gain", "embedding", "matrix"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert [group["role"] for group in optimizer.param_groups] == roles


def test_a_state_that_was_assigned_is_the_one_the_rules_use():
    network = model()
    optimizer = CONFIG.build(network)
    train(network, optimizer)
    fresh_network = copy.deepcopy(network)
    fresh = CONFIG.build(fresh_network)
    optimizer.state = defaultdict(dict)
    assert train(network, optimizer) == train(fresh_network, fresh)
    assert same(network, fresh_network)
    assert len(optimizer.state) == len(list(network.parameters()))


@pytest.mark.parametrize(
    "use",
    [
        lambda optimizer: optimizer.step(),
        lambda optimizer: optimizer.state_dict(),
        lambda optimizer: optimizer.load_state_dict({"state": {}, "param_groups": []}),
        copy.deepcopy,
    ],
)
def test_groups_and_states_that_only_one_side_was_given_are_errors(use):
    optimizer = CONFIG.build(model())
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"parameter 1\.weight of group 0 has no rule; accepted in param_groups are"):
        use(optimizer)
    optimizer = CONFIG.build(model())
    optimizer.rules[1].add_param_group({"params": [("late", nn.Parameter(torch.zeros(2)))]})
    with pytest.raises(ValueError, match="a rule was given groups or a state by itself"):
        use(optimizer)
    optimizer = CONFIG.build(model())
    optimizer.rules[1].state = defaultdict(dict)
    with pytest.raises(ValueError, match="a rule was given groups or a state by itself"):
        use(optimizer)


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_run_that_is_saved_and_resumed_is_bit_identical_to_one_that_is_not():
    network = model()
    optimizer = CONFIG.build(network)
    train(network, optimizer)
    saved = saved_and_loaded({"model": network.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = model()
    other = CONFIG.build(resumed)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.state[resumed[1].weight]["momentum_buffer"].dtype == torch.bfloat16
    assert train(network, optimizer) == train(resumed, other)
    assert same(network, resumed)


def test_its_state_dict_numbers_the_parameters_as_torch_does():
    network = model()
    optimizer = CONFIG.build(network)
    train(network, optimizer, 1)
    state = optimizer.state_dict()
    count = len(list(network.parameters()))
    assert [key for group in state["param_groups"] for key in group["params"]] == list(range(count))
    assert sorted(state["state"]) == list(range(count))


def test_the_states_of_two_optimizers_stepped_apart_are_resumed_by_one():
    by_hand = model()
    optimizers = apart(by_hand)
    train_apart(by_hand, optimizers)
    old = saved_and_loaded([optimizer.state_dict() for optimizer in optimizers])
    network = model()
    network.load_state_dict(by_hand.state_dict())
    optimizer = CONFIG.build(network)
    optimizer.load_state_dict(merged_state_dicts(old))
    train(network, optimizer)
    train_apart(by_hand, optimizers)
    assert same(network, by_hand)


def test_the_state_of_one_optimizer_stays_as_it_is_when_merged():
    network = nn.Linear(3, 2)
    optimizer = AdamWConfig().build(network)
    state = optimizer.state_dict()
    assert merged_state_dicts([state]) == {"state": state["state"], "param_groups": state["param_groups"]}


def test_distributed_checkpoints_hold_it_by_the_names_of_the_parameters():
    network, fresh = model(), model()
    optimizer = CONFIG.build(network)
    train(network, optimizer)
    state = get_optimizer_state_dict(network, optimizer)
    assert set(state["state"]) == {name for name, _ in network.named_parameters()}
    fresh.load_state_dict(network.state_dict())
    other = CONFIG.build(fresh)
    set_optimizer_state_dict(fresh, other, copy.deepcopy(state))
    assert train(network, optimizer) == train(fresh, other)
    assert same(network, fresh)


def test_an_added_group_goes_to_the_rule_of_its_role():
    network = model()
    optimizer = CONFIG.build(network)
    matrix, kernel, gain = (
        nn.Parameter(torch.ones(3, 2)),
        nn.Parameter(torch.ones(2, 1, 3, 3)),
        nn.Parameter(torch.ones(3)),
    )
    optimizer.add_param_group({"params": [("m", matrix)], "role": "matrix", "lr": 0.5})
    optimizer.add_param_group({"params": [("k", kernel)], "role": "conv"})
    gain.danlu_role = "gain"  # a layer's declaration will do
    optimizer.add_param_group({"params": [("g", gain)]})
    muon, adamw = optimizer.rules
    assert [group["param_names"] for group in muon.param_groups[1:]] == [["m"], ["k"]]
    assert adamw.param_groups[-1]["params"] == [gain]
    assert optimizer.param_groups[-3]["lr"] == muon.param_groups[1]["lr"] == 0.5
    for parameter in (matrix, kernel, gain):
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in (matrix, kernel, gain)]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, (matrix, kernel, gain)))
    # Groups of different rules now alternate, and each still loads its own.
    again = copy.deepcopy(optimizer)
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert [group["param_names"] for group in again.param_groups] == [g["param_names"] for g in optimizer.param_groups]
    assert [group["lr"] for group in again.rules[0].param_groups] == [0.02, 0.5, 0.02]


def test_hooks_are_called_once_a_step_for_the_whole():
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    network, calls = model(), []
    optimizer = CONFIG.build(network)
    optimizer.register_step_pre_hook(lambda who, *_: calls.append(("before", who)))
    optimizer.register_step_post_hook(lambda who, *_: calls.append(("after", who)))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    optimizer.register_load_state_dict_pre_hook(lambda who, state: calls.append(("load", who)))
    optimizer.register_load_state_dict_post_hook(lambda who: calls.append(("loaded", who)))
    handles = [
        register_optimizer_step_pre_hook(lambda who, *_: calls.append(("all before", who))),
        register_optimizer_step_post_hook(lambda who, *_: calls.append(("all after", who))),
    ]
    train(network, optimizer, 1)
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["mark"] == 1
    assert [what for what, _ in calls] == ["all before", "before", "after", "all after", "load", "loaded"]
    assert {id(who) for _, who in calls} == {id(optimizer)}


def test_a_closure_is_evaluated_once_with_gradients():
    together, by_hand = model(), model()
    optimizer, calls = CONFIG.build(together), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(together)
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    train_apart(by_hand, apart(by_hand), 1)
    assert calls == [True]
    assert same(together, by_hand)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_goes_on_like_the_original(copied):
    network = model()
    optimizer = CONFIG.build(network)
    train(network, optimizer)
    twin_network, twin = copied((network, optimizer))
    assert train(network, optimizer) == train(twin_network, twin)
    assert same(network, twin_network)
    assert twin.param_groups[0] is twin.rules[0].param_groups[0]


def test_a_gradient_scaler_changes_nothing_but_skips_what_overflows():
    network, plain = model(), model()
    optimizer, scaler = CONFIG.build(network), torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(plain, CONFIG.build(plain), 1)
    scaler.scale(loss_of(network)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(list(network.parameters()), list(plain.parameters()))
    before = copy.deepcopy(network)
    optimizer.zero_grad()
    scaler.scale(loss_of(network) * torch.inf).backward()
    scaler.step(optimizer)
    assert same(network, before)


def test_gradients_are_cleared_and_clipped_over_all_rules():
    network = model()
    optimizer = CONFIG.build(network)
    loss_of(network).backward()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    clip_grad_norm_(params, 1e-3)
    assert torch.stack([p.grad.norm() for p in params]).norm() == pytest.approx(1e-3)
    optimizer.zero_grad()
    assert all(p.grad is None for p in network.parameters())


def test_step_compiles_to_what_it_is():
    torch._dynamo.reset()
    config = MuonConfig(lr=0.02, dtype="float32")
    network, plain = model(), model()
    optimizer, eager = config.build(network), config.build(plain)
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        for each, step in ((network, compiled), (plain, eager.step)):
            each.zero_grad()
            loss_of(each).backward()
            step()
    torch.testing.assert_close(list(network.parameters()), list(plain.parameters()))


class TestBadInput:
    """Two rules for a parameter, or none, are errors that name it."""

    def rules(self, network):
        muon = Muon([("1.weight", network[1].weight)])
        return muon, Lion([("1.bias", network[1].bias), ("3.bias", network[3].bias)])

    def test_a_parameter_with_two_rules(self):
        network = model()
        muon, _ = self.rules(network)
        rules = [(muon, ("matrix",)), (Lion(network.named_parameters()), ("head",))]
        with pytest.raises(ValueError, match=r"parameter 1\.weight of group 1 is in group 0 already"):
            CombinedOptimizer(rules)
        rules = [(Muon([network[1].weight]), ("matrix",)), (Lion(network.parameters()), ("head",))]
        with pytest.raises(ValueError, match=r"parameter 1\.weight of group 1 is in group 0 already"):
            CombinedOptimizer(rules, model=network)

    def test_parameters_without_a_rule(self):
        network = model()
        muon, lion = self.rules(network)
        with pytest.raises(ValueError, match=r"no group holds the parameters 0\.weight, 2\.weight, 2\.bias, 3\.weight"):
            CombinedOptimizer([(muon, ("matrix",)), (lion, ("bias",))], model=network)

    @pytest.mark.parametrize(
        ("group", "says"),
        [
            (
                {"params": [("0.weight", 0)], "role": "gain"},
                r"parameter 0\.weight of group 2 of role 'gain' has no rule",
            ),
            (
                {"params": [("0.weight", 0)]},
                r"parameter 0\.weight of group 2 has no rule: give the group a role, one of",
            ),
            ({"params": [("0.weight", 0)], "role": "matrx"}, "role of group 2 .* did you mean 'matrix'"),
            ({"params": [("1.weight", 1)], "role": "matrix"}, r"parameter 1\.weight of group 2 is in group 0 already"),
            ({"params": [("0.weight", 0)], "role": "matrix", "lr": -1.0}, "lr must be in"),
        ],
    )
    def test_an_added_group(self, group, says):
        network = model()
        muon, lion = self.rules(network)
        optimizer = CombinedOptimizer([(muon, ("matrix",)), (lion, ("bias",))])
        group["params"] = [(name, network[index].weight) for name, index in group["params"]]
        with pytest.raises(ValueError, match=says):
            optimizer.add_param_group(group)
        assert [len(each.param_groups) for each in (optimizer, muon, lion)] == [2, 1, 1]

    def test_a_role_with_two_rules_and_things_that_are_no_rules(self):
        muon, lion = self.rules(model())
        with pytest.raises(ValueError, match="two rules take the role 'bias'"):
            CombinedOptimizer([(muon, ("bias",)), (lion, ("bias",))])
        with pytest.raises(TypeError, match=r"must hold torch\.optim.Optimizer objects, got str"):
            CombinedOptimizer([("muon", ("bias",))])
        with pytest.raises(ValueError, match="at least one"):
            CombinedOptimizer([])

    def test_a_rule_that_evaluates_the_loss_itself(self):
        network = model()
        muon, _ = self.rules(network)
        with pytest.raises(TypeError, match="rules must step by the gradients alone, got LBFGS"):
            CombinedOptimizer([(muon, ("matrix",)), (torch.optim.LBFGS([network[3].bias]), ("bias",))])

    def test_the_list_of_states_of_the_previous_release(self):
        network = model()
        saved = [optimizer.state_dict() for optimizer in apart(network)]
        with pytest.warns(DeprecationWarning, match="build_optimizers"):
            optimizers = build_optimizers(network, CONFIG)
        for optimizer, state in zip(optimizers, saved):  # as the loop of such a training goes
            with pytest.raises(ValueError, match=r"loaded as merged_state_dicts"):
                optimizer.load_state_dict(state)
            with pytest.raises(TypeError, match=r"must be a dictionary, got a list; .*merged_state_dicts"):
                optimizer.load_state_dict(saved)
            optimizer.load_state_dict(merged_state_dicts(saved))

    def test_the_state_of_other_groups(self):
        optimizer = CONFIG.build(model())
        with pytest.raises(ValueError, match=r"groups of \[1, 1, 2\] parameters, expected \[2, 1, 1, 3\]"):
            optimizer.load_state_dict(AdamWConfig().build(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))).state_dict())

    def test_a_rule_that_rejects_its_state_leaves_the_groups_linked(self):
        network = model()
        optimizer = CONFIG.build(network)
        train(network, optimizer)
        state = optimizer.state_dict()
        state["state"] = {0: {"strange": torch.zeros(2)}}
        with pytest.raises(ValueError, match="it holds strange, expected momentum_buffer"):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0] is optimizer.rules[0].param_groups[0]
        train(network, optimizer)

    def test_a_second_rule_that_rejects_its_state_leaves_the_first_as_it_was(self):
        network = model()
        rules = self.rules(network)
        optimizer = CombinedOptimizer(list(zip(rules, [("matrix",), ("bias",)])))
        schedule = LambdaLR(optimizer, lambda count: 0.5**count)
        train(network, optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        momentum = optimizer.state[network[1].weight]["momentum_buffer"].clone()
        state["state"][0]["momentum_buffer"].zero_()
        state["param_groups"][0]["lr"] = 7.0
        state["state"][1] = {"strange": torch.zeros(2)}
        with pytest.raises(ValueError, match="it holds strange, expected exp_avg"):
            optimizer.load_state_dict(state)
        assert all(group is rule.param_groups[0] for group, rule in zip(optimizer.param_groups, rules, strict=True))
        assert all(rule.state is optimizer.state for rule in rules)
        assert torch.equal(optimizer.state[network[1].weight]["momentum_buffer"], momentum)
        rate = optimizer.param_groups[0]["lr"]
        schedule.step()
        assert rules[0].param_groups[0]["lr"] == 0.5 * rate
