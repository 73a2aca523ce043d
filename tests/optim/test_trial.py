"""What every optimizer of the room has to pass, one table over all of them."""

import copy
import io
import math
from functools import partial

import pytest
import tensors
import torch
from torch import nn

from danlu.optim import Amos, Lion, Muon, Tiger

gaussian = partial(tensors.gaussian, dtype=torch.float32)


def without_decay(options):
    """What the table calls decay is called extra_l2 by Amos, whose decay is its own."""
    return {{"weight_decay": "extra_l2"}.get(name, name): value for name, value in options.items()}


OPTIMIZERS = {
    "muon": lambda params, **options: Muon(params, **{"weight_decay": 0.0, **options}),
    "muon-bf16-momentum": lambda params, **o: Muon(params, **{"momentum_dtype": torch.bfloat16, **o}),
    "lion": Lion,
    "lion-decay": lambda params, **options: Lion(params, **{"weight_decay": 0.1, **options}),
    "lion-foreach": lambda params, **options: Lion(params, foreach=True, **options),
    "tiger": lambda params, **options: Tiger(params, **{"scale": "none", **options}),
    "tiger-relative": Tiger,
    "amos": lambda params, **options: Amos(params, **without_decay(options)),
    "amos-momentum": lambda params, **options: Amos(params, **{"momentum": 0.9, **without_decay(options)}),
}
RATES = {"muon": 0.3, "lion": 0.05, "tiger": 0.05, "amos": 0.2}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def rate(name):
    return RATES[name.split("-")[0]]


def minimize(name, weight, loss_of, *, steps, lr):
    """Return the loss after a linear decay of the learning rate to zero."""
    optimizer = OPTIMIZERS[name]([weight], lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 - count / steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(weight).backward()
        optimizer.step()
        scheduler.step()
    return loss_of(weight).item()


@pytest.mark.parametrize("name", ["muon", "lion", "lion-foreach", "tiger", "amos", "amos-momentum"])
def test_a_quadratic_is_minimised(name):
    target = gaussian(3, 5, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    loss = minimize(name, weight, lambda w: (w - target).square().sum(), steps=400, lr=rate(name))
    assert loss < 1e-3


@pytest.mark.parametrize("name", ["muon", "lion", "lion-foreach", "tiger", "amos", "amos-momentum"])
def test_a_matrix_is_recovered_from_what_it_does_to_vectors(name):
    target, inputs = gaussian(5, 7, seed=1), gaussian(31, 7, seed=2)
    weight = nn.Parameter(torch.zeros(5, 7))
    loss = minimize(name, weight, lambda w: (inputs @ (w - target).T).square().mean(), steps=400, lr=rate(name))
    assert loss < 1e-3 * (inputs @ target.T).square().mean()


# Amos has its authors' own valley, with their options, in its file.
@pytest.mark.parametrize("name", ["muon", "lion", "tiger"])
def test_rosenbrocks_valley_is_followed_to_its_end(name):
    weight = nn.Parameter(torch.tensor([[-0.5, 1.0]], dtype=torch.float64))

    def valley(w):
        x, y = w[0]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    assert minimize(name, weight, valley, steps=1500, lr=0.02) < 1e-2


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_dtype_moves_and_stays_finite(name, dtype):
    weight = nn.Parameter(gaussian(5, 7, dtype=dtype))
    before = weight.detach().clone()
    optimizer = OPTIMIZERS[name]([weight], lr=0.1)
    for seed in range(3):
        weight.grad = gaussian(5, 7, seed=seed, dtype=dtype)
        optimizer.step()
    assert weight.dtype == dtype
    assert torch.isfinite(weight).all()
    assert not torch.equal(weight, before)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_saved_and_resumed_is_bit_identical_to_one_that_is_not(name, dtype):
    weight = nn.Parameter(gaussian(5, 7, dtype=dtype))
    optimizer = OPTIMIZERS[name]([("w", weight)], lr=0.1)

    def go(parameter, by, seeds):
        for seed in seeds:
            parameter.grad = gaussian(5, 7, seed=seed, dtype=dtype)
            by.step()

    go(weight, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"w": weight.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = nn.Parameter(saved["w"].clone())
    resumed = OPTIMIZERS[name]([("w", other)], lr=0.1)
    resumed.load_state_dict(saved["optimizer"])
    go(weight, optimizer, range(3, 6))
    go(other, resumed, range(3, 6))
    assert torch.equal(weight, other)


@every
def test_two_runs_are_bit_identical_and_gradients_stay_as_they_were(name):
    ends = []
    for _ in range(2):
        weight = nn.Parameter(gaussian(11, 7))
        optimizer = OPTIMIZERS[name]([weight], lr=0.1)
        for seed in range(3):
            weight.grad = gaussian(11, 7, seed=seed)
            optimizer.step()
            assert torch.equal(weight.grad, gaussian(11, 7, seed=seed))
        ends.append(weight.detach())
    assert torch.equal(*ends)


@every
def test_maximising_is_minimising_the_negative(name):
    up, down = nn.Parameter(gaussian(5, 7)), nn.Parameter(gaussian(5, 7))
    climb, descend = OPTIMIZERS[name]([up], lr=0.1, maximize=True), OPTIMIZERS[name]([down], lr=0.1)
    for seed in range(2):
        up.grad, down.grad = gaussian(5, 7, seed=seed), -gaussian(5, 7, seed=seed)
        climb.step()
        descend.step()
    assert torch.equal(up, down)


@every
def test_a_rate_that_is_a_tensor_gives_the_same_step(name):
    a, b = nn.Parameter(gaussian(5, 7)), nn.Parameter(gaussian(5, 7))
    for weight, lr in ((a, 0.125), (b, torch.tensor(0.125))):
        optimizer = OPTIMIZERS[name]([weight], lr=lr)
        weight.grad = gaussian(5, 7, seed=1)
        optimizer.step()
    torch.testing.assert_close(a, b)


@every
def test_a_zero_gradient_from_rest_moves_nothing_but_by_decay(name):
    weight = nn.Parameter(gaussian(5, 7))
    optimizer = OPTIMIZERS[name]([weight], lr=0.1, weight_decay=0.0)
    weight.grad = torch.zeros(5, 7)
    optimizer.step()
    assert torch.equal(weight, gaussian(5, 7))


@every
def test_parameters_without_gradient_frozen_late_and_in_empty_groups(name):
    still, frozen, moving, late = (nn.Parameter(gaussian(5, 7)) for _ in range(4))
    frozen.requires_grad_(False)
    optimizer = OPTIMIZERS[name]([{"params": [still, frozen, moving]}, {"params": []}], lr=0.1)
    moving.grad = gaussian(5, 7, seed=1)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    late.grad = gaussian(5, 7, seed=1)
    optimizer.step()
    assert torch.equal(still, gaussian(5, 7))
    assert torch.equal(frozen, gaussian(5, 7))
    assert not torch.equal(moving, gaussian(5, 7))
    assert not torch.equal(late, gaussian(5, 7))


@every
def test_a_copy_goes_on_like_the_original(name):
    weight = nn.Parameter(gaussian(5, 7))
    optimizer = OPTIMIZERS[name]([weight], lr=0.1)
    weight.grad = gaussian(5, 7, seed=1)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    other.grad = weight.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(weight, other)


@every
def test_named_parameters_are_kept_by_their_names(name):
    model = nn.Linear(7, 5, bias=False)
    optimizer = OPTIMIZERS[name](model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight"]


@every
def test_a_step_is_no_part_of_the_graph_and_returns_the_closures_loss(name):
    weight = nn.Parameter(gaussian(5, 7))
    optimizer = OPTIMIZERS[name]([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        (weight.grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad
    assert weight.is_leaf
    assert weight.grad_fn is None
    assert not any(tensor.requires_grad for tensor in optimizer.state[weight].values())


@every
def test_hooks_see_the_step_and_the_saved_state(name):
    weight, calls = nn.Parameter(gaussian(5, 7)), []
    optimizer = OPTIMIZERS[name]([weight], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append("load") or state)
    weight.grad = gaussian(5, 7, seed=1)
    optimizer.step()
    state = optimizer.state_dict()
    assert state.pop("mark") == 1
    optimizer.load_state_dict(state)
    assert calls == ["before", "after", "load"]


@pytest.mark.parametrize(
    "layout", [lambda w: w.T.contiguous().T, lambda w: torch.cat([w, w], 1)[:, : w.shape[1]]], ids=["turned", "gaps"]
)
@every
def test_memory_that_is_not_contiguous_changes_nothing(name, layout):
    plain, placed = nn.Parameter(gaussian(831, 251)), nn.Parameter(layout(gaussian(831, 251)))
    assert not placed.is_contiguous()
    for weight in (plain, placed):
        optimizer = OPTIMIZERS[name]([weight], lr=0.1)
        for seed in (1, 2):
            weight.grad = gaussian(831, 251, seed=seed)
            optimizer.step()
    torch.testing.assert_close(plain, placed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@every
def test_a_step_can_be_captured_in_a_cuda_graph(name):
    weight, plain = nn.Parameter(gaussian(5, 7).cuda()), nn.Parameter(gaussian(5, 7).cuda())
    captured, eager = OPTIMIZERS[name]([weight], lr=0.1), OPTIMIZERS[name]([plain], lr=0.1)
    weight.grad, plain.grad = gaussian(5, 7, seed=1).cuda(), gaussian(5, 7, seed=1).cuda()
    captured.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    graph.replay()
    eager.step()
    torch.testing.assert_close(weight, plain)


@pytest.mark.parametrize("name", ["muon", "lion", "tiger", "amos"])
def test_step_compiles_once(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    weight, plain = nn.Parameter(gaussian(5, 7)), nn.Parameter(gaussian(5, 7))
    # In bfloat16 a graph and single operations round differently.
    options = {"dtype": torch.float32} if name.startswith("muon") else {}
    optimizer = OPTIMIZERS[name]([weight], lr=torch.tensor(0.1), **options)
    eager = OPTIMIZERS[name]([plain], lr=torch.tensor(0.1), **options)
    counter = CompileCounter()
    compiled = torch.compile(optimizer.step, backend=counter)
    for seed in range(3):
        weight.grad, plain.grad = gaussian(5, 7, seed=seed), gaussian(5, 7, seed=seed)
        for made in (optimizer, eager):
            made.param_groups[0]["lr"].fill_(0.1 / (seed + 1))
        compiled()
        eager.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(weight, plain)


class TestBadInput:
    """The same refusals from every optimizer, naming the group and the parameter."""

    @every
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"lr": -1.0}, "lr must be in"),
            ({"lr": math.nan}, "lr must be in"),
            ({"lr": torch.ones(2)}, "lr as a tensor must have one element"),
            ({"weight_decay": math.inf}, "(weight_decay|extra_l2) must be in"),
            ({"weight_decay": -0.1}, "(weight_decay|extra_l2) must be in"),
        ],
    )
    def test_options(self, name, options, says):
        with pytest.raises(ValueError, match=says):
            OPTIMIZERS[name]([nn.Parameter(torch.zeros(2, 2))], **options)

    @every
    def test_a_duplicate(self, name):
        weight = nn.Parameter(torch.zeros(3, 2))
        twice = "parameter w of group 0 is in its group twice"
        with pytest.raises(ValueError, match=twice), pytest.warns(match="duplicate"):
            OPTIMIZERS[name]([{"params": [("w", weight), ("w", weight)]}])

    @every
    def test_a_complex_parameter(self, name):
        with pytest.raises(TypeError, match=r"parameter 0 of group 0 .*complex64"):
            OPTIMIZERS[name]([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])

    @every
    def test_a_sparse_gradient(self, name):
        weight = nn.Parameter(torch.zeros(3, 2))
        weight.grad = torch.zeros(3, 2).to_sparse()
        with pytest.raises(TypeError, match="parameter 0 of group 0 has a sparse gradient"):
            OPTIMIZERS[name]([weight]).step()

    @every
    def test_a_group_that_is_refused_is_not_kept(self, name):
        optimizer = OPTIMIZERS[name]([nn.Parameter(torch.zeros(2, 2))])
        with pytest.raises(ValueError, match="group 1: lr"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], "lr": -1.0})
        assert len(optimizer.param_groups) == 1

    @every
    def test_the_state_of_another_optimizer(self, name):
        weight = nn.Parameter(torch.zeros(2, 2))
        weight.grad = torch.ones(2, 2)
        other = torch.optim.AdamW([weight])
        other.step()
        with pytest.raises(ValueError, match="for parameter w of group 0 it holds step, exp_avg, exp_avg_sq"):
            OPTIMIZERS[name]([("w", weight)]).load_state_dict(other.state_dict())

    @every
    def test_the_state_of_another_shape(self, name):
        weight = nn.Parameter(torch.zeros(2, 3))
        optimizer = OPTIMIZERS[name]([weight])
        weight.grad = torch.ones(2, 3)
        optimizer.step()
        with pytest.raises(ValueError, match=r"of parameter 0 of group 0 in state_dict has shape \(2, [13]\)"):
            OPTIMIZERS[name]([nn.Parameter(torch.zeros(3, 2))]).load_state_dict(optimizer.state_dict())

    @every
    def test_a_state_saved_before_an_option_existed_takes_its_default(self, name):
        weight = nn.Parameter(torch.zeros(2, 3))
        optimizer = OPTIMIZERS[name]([weight], lr=0.5)
        state = optimizer.state_dict()
        del state["param_groups"][0]["maximize"]
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["maximize"] is False
        assert optimizer.param_groups[0]["lr"] == 0.5

    @pytest.mark.parametrize(("name", "other"), [("lion", "tiger"), ("tiger", "lion")])
    def test_the_options_of_another_optimizer_with_the_same_state(self, name, other):
        weight = nn.Parameter(torch.zeros(2, 3))
        optimizer = OPTIMIZERS[other]([("w", weight)])
        weight.grad = torch.ones(2, 3)
        optimizer.step()
        with pytest.raises(ValueError, match=r"group 0 \(of parameter w of group 0\) has .*betas?.*, expected"):
            OPTIMIZERS[name]([("w", weight)]).load_state_dict(optimizer.state_dict())
