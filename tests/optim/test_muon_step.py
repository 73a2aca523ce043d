"""Muon beside its definition, the plan that it keeps, and variants of it that are a hook or two."""

import copy

import pytest
import torch
from steps import muon_reference, step
from tensors import gaussian
from torch import nn

import danlu.optim.muon_step
from danlu.linalg import mclip
from danlu.optim import Muon
from danlu.optim.muon_step import SCALES

EXACT = {"method": "auto", "steps": 12}  # so many that the polar factor is exact to 1e-7


def by_definition(W, gradients, cut, **options):
    """Apply the definition to each matrix of a parameter, as ``cut`` takes it apart and puts it together."""
    apart, together = cut
    pieces = zip(apart(W), *(apart(G) for G in gradients))
    return together([muon_reference(W, gradients, **options) for W, *gradients in pieces])


CUTS = {
    "matrix": ((7, 5), {}, (lambda W: [W], lambda found: found[0])),
    "experts": ((3, 7, 5), {}, (list, torch.stack)),
    "heads": ((12, 5), {"split": 3}, (lambda W: W.split(4), torch.cat)),
    "query, key and value": ((9, 5), {"split": (5, 2, 2)}, (lambda W: W.split((5, 2, 2)), torch.cat)),
    "kernels": (
        (6, 2, 3, 3),
        {"role": "conv"},
        (lambda W: [W.flatten(1)], lambda found: found[0].view(6, 2, 3, 3)),
    ),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CUTS)
def test_a_step_is_its_definition_for_each_matrix(name, scale):
    shape, group, cut = CUTS[name]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "scale": scale}
    start, gradients = gaussian(*shape), [gaussian(*shape, seed=seed) for seed in (1, 2, 3)]
    weight = nn.Parameter(start.clone())
    optimizer = Muon([{"params": [weight], **group}], **options, **EXACT)
    for gradient in gradients:
        step(optimizer, gradient)
    torch.testing.assert_close(weight.detach(), by_definition(start, gradients, cut, **options), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"nesterov": False}, {"ema": False}, {"nesterov": False, "ema": False}])
def test_each_kind_of_momentum_is_its_definition(options):
    options = {"lr": 0.1, "momentum": 0.8, **options}
    start, gradients = gaussian(7, 5), [gaussian(7, 5, seed=seed) for seed in (1, 2, 3)]
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], weight_decay=0.0, scale="plain", **options, **EXACT)
    for gradient in gradients:
        step(optimizer, gradient)
    torch.testing.assert_close(weight.detach(), muon_reference(start, gradients, **options), rtol=0, atol=1e-5)


class TestPlan:
    """Parameters are classified once, and again whenever something changes that the classification depends on."""

    def counted(self, monkeypatch):
        calls, original = [], danlu.optim.muon_step.layout
        monkeypatch.setattr(danlu.optim.muon_step, "layout", lambda *a: calls.append(a) or original(*a))
        return calls

    def test_steps_after_the_first_classify_nothing(self, monkeypatch):
        optimizer = Muon([nn.Parameter(gaussian(5, 7)), nn.Parameter(gaussian(3, 5, 7))])
        calls = self.counted(monkeypatch)
        for seed in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 / (seed + 1)  # an option of the step, not of the plan
            step(optimizer, gaussian(5, 7, seed=seed), gaussian(3, 5, 7, seed=seed))
        assert len(calls) == 2

    @pytest.mark.parametrize(
        "change",
        [
            lambda o: o.param_groups[0].update(split=(4, 2)),
            lambda o: o.param_groups[0].update(role="conv"),
            lambda o: setattr(o.param_groups[0]["params"][0], "grad", None),
            lambda o: o.add_param_group({"params": [nn.Parameter(gaussian(6, 4, seed=9))]}),
            lambda o: setattr(o, "chunk_bytes", 200),
            lambda o: setattr(o, "dtype", torch.float32),
            lambda o: o.load_state_dict(o.state_dict()),
            lambda o: [setattr(p, "data", p.data.float()) or setattr(p, "grad", p.grad.float()) for p in held(o)],
        ],
    )
    def test_a_change_between_steps_is_seen(self, change):
        optimizer = Muon([nn.Parameter(gaussian(6, 4)), nn.Parameter(gaussian(6, 4, seed=1))], lr=0.1)
        step(optimizer, gaussian(6, 4, seed=2), gaussian(6, 4, seed=3))
        fresh = copy.deepcopy(optimizer)  # a copy has no plan
        for each in (optimizer, fresh):
            for seed, parameter in enumerate(held(each)):
                parameter.grad = gaussian(6, 4, seed=4 + seed)
            change(each)
            for parameter in each.param_groups[-1]["params"][-1:]:
                parameter.grad = gaussian(6, 4, seed=7).to(parameter.dtype)
            each.step()
        for one, other in zip(held(optimizer), held(fresh), strict=True):
            assert torch.equal(one, other)


def held(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class NorMuon(Muon):
    """Updates divided by a running root mean square of each row (Li et al., arXiv:2510.05491)."""

    complete = True

    def slots(self, parameter, options):
        return {**super().slots(parameter, options), "row_squares": torch.zeros_like(parameter[..., :1])}

    def before_update(self, group, W, update, rows):
        rows.lerp_(update.square().mean(-1, keepdim=True).to(rows.dtype), 0.05)
        update.div_(rows.sqrt().add_(1e-8))


class Cautious(Muon):
    """Decay only of weights that the update makes smaller as well."""

    def before_update(self, group, W, update):
        W.mul_(1 - group["lr"] * 0.5 * (W * update > 0))


class Bounded(Muon):
    """Weights whose singular values never exceed one."""

    complete = True

    def after_update(self, group, W, update):
        W.copy_(mclip(W, high=1.0, low=0.0))


class TestVariants:
    """What a variant of Muon needs is a hook before or after the update of a matrix, and perhaps a state of its own."""

    @pytest.mark.parametrize("foreach", [False, True])
    def test_rows_of_an_update_are_normalised_by_a_state_of_their_own(self, foreach):
        shapes = [(7, 5), (7, 5), (3, 7, 5)]
        params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
        options = {"lr": 1.0, "weight_decay": 0.0, "scale": "plain", **EXACT, "foreach": foreach}
        optimizer = NorMuon(
            [{"params": params[:1]}, {"params": params[1:2], "split": (4, 3)}, {"params": params[2:]}], **options
        )
        gradients = [gaussian(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        step(optimizer, *gradients)
        U, _, Vh = torch.linalg.svd(gradients[0], full_matrices=False)
        polar = U @ Vh
        squares = 0.05 * polar.square().mean(-1, keepdim=True)
        torch.testing.assert_close(optimizer.state[params[0]]["row_squares"], squares, rtol=0, atol=1e-6)
        torch.testing.assert_close(params[0].detach(), -polar / squares.sqrt(), rtol=1e-5, atol=1e-5)
        assert optimizer.state[params[2]]["row_squares"].shape == (3, 7, 1)
        # Every row of every update now has the same norm, in each block and each expert.
        for parameter in params:
            norms = parameter.detach().norm(dim=-1)
            torch.testing.assert_close(norms, torch.full_like(norms, (5 / 0.05) ** 0.5), rtol=1e-5, atol=0)

    def test_the_state_of_a_variant_is_saved_and_resumed(self):
        weight = nn.Parameter(gaussian(7, 5))
        optimizer = NorMuon([weight], lr=0.1)
        step(optimizer, gaussian(7, 5, seed=1))
        other = nn.Parameter(weight.detach().clone())
        resumed = NorMuon([other], lr=0.1)
        resumed.load_state_dict(optimizer.state_dict())
        for each in (optimizer, resumed):
            step(each, gaussian(7, 5, seed=2))
        assert torch.equal(weight, other)
        with pytest.raises(ValueError, match="holds momentum_buffer, row_squares, expected momentum_buffer"):
            Muon([nn.Parameter(gaussian(7, 5))]).load_state_dict(optimizer.state_dict())

    def test_a_decay_of_some_entries_only(self):
        start, gradient = gaussian(7, 5), gaussian(7, 5, seed=1)
        ends = {}
        for kind in (Cautious, Muon):
            weight = nn.Parameter(start.clone())
            step(kind([weight], lr=0.1, weight_decay=0.0, **EXACT), gradient)
            ends[kind] = weight.detach()
        move = ends[Muon] - start
        expected = torch.where(start * move < 0, 0.95 * start, start) + move
        torch.testing.assert_close(ends[Cautious], expected)

    def test_weights_that_stay_in_a_set(self):
        weight = nn.Parameter(gaussian(7, 5))
        optimizer = Bounded([weight], lr=0.5)
        for seed in range(3):
            step(optimizer, gaussian(7, 5, seed=seed))
            assert torch.linalg.matrix_norm(weight.detach(), 2) <= 1 + 1e-9
