"""The measures of a step: the root mean square of updates and the entropy of singular values."""

import math

import pytest
import torch
from tensors import gaussian
from torch import nn

from danlu.models import TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import CausalLM
from danlu.optim import AdamWConfig, Muon, MuonConfig, measured_step, singular_entropy


def test_the_entropy_is_that_of_the_shares_of_energy():
    M = torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    expected = -(4 / 6 * math.log(4 / 6) + 2 * (1 / 6) * math.log(1 / 6)) / math.log(4)
    assert singular_entropy(M).item() == pytest.approx(expected, rel=1e-12)
    assert singular_entropy(-1e-30 * M).item() == pytest.approx(expected, rel=1e-12)


def test_the_entropy_runs_from_rank_one_to_all_values_equal():
    assert singular_entropy(torch.eye(5, 7)).item() == pytest.approx(1, abs=1e-6)
    assert singular_entropy(gaussian(5, 1) @ gaussian(1, 7)).item() == pytest.approx(0, abs=1e-12)
    assert singular_entropy(torch.zeros(3, 5)).item() == 0
    assert singular_entropy(gaussian(1, 5)).item() == 0


def test_a_stack_has_an_entropy_a_matrix():
    M = gaussian(2, 3, 5, 7)
    found = singular_entropy(M)
    assert found.shape == (2, 3)
    assert found[1, 2].item() == pytest.approx(singular_entropy(M[1, 2]).item(), rel=1e-12)


def test_an_orthogonal_update_raises_the_entropy_of_the_weight_that_a_gradient_of_rank_one_lowers():
    start = gaussian(11, 7)
    ends = {}
    for make in (Muon, torch.optim.SGD):
        weight = nn.Parameter(start.clone())
        optimizer = make([weight], lr=5.0, weight_decay=0.0)
        weight.grad = gaussian(11, 1, seed=1) @ gaussian(1, 7, seed=2) + 1e-2 * gaussian(11, 7, seed=3)
        ends[make] = measured_step(optimizer)[0].entropy
    assert ends[Muon] > ends[torch.optim.SGD]


@pytest.mark.parametrize(("scale", "low", "high"), [("rms", 0.2, 0.2), ("moonlight", 0.195, 0.203)])
@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (3, 48, 32)])
def test_muons_update_has_the_root_mean_square_of_adamw(scale, low, high, shape):
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gaussian(*shape, dtype=torch.float32)
    (found,) = measured_step(Muon([("w", weight)], lr=0.37, weight_decay=0.0, scale=scale, dtype=torch.float32))
    assert found.name == "w"
    assert low - 1e-5 <= found.rms <= high + 1e-5


def test_every_parameter_with_a_gradient_is_measured_and_a_vector_has_no_entropy():
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25) if p.requires_grad else None
    found = {update.name: update for update in measured_step(optimizer)}
    assert list(found) == ["0.weight", "1.weight", "1.bias"]
    assert all(update.rms == pytest.approx(0.25, rel=1e-6) for update in found.values())
    assert found["1.bias"].entropy is None
    assert 0 < found["0.weight"].entropy <= 1


def test_the_step_is_the_optimizers_own_and_a_closure_is_called():
    weights = [nn.Parameter(gaussian(5, 3)) for _ in range(2)]
    for weight, step in zip(weights, (lambda o, c: o.step(c), measured_step)):

        def closure(weight=weight):
            weight.grad = None
            weight.square().sum().backward()
            return 1.0

        step(torch.optim.AdamW([weight], lr=0.1), closure)
    assert torch.equal(*weights)


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="group 0 has the learning rate 0"):
        measured_step(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.0))


def test_muon_leaves_weights_of_higher_entropy_than_adamw_at_the_same_loss():
    # arXiv 2502.16982, section 3.4: of more than nine tenths of the matrices. Here: of all.
    entropies, losses = {}, {}
    for name, config in {"muon": MuonConfig(lr=4e-2), "adamw": AdamWConfig(lr=1e-2)}.items():
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "dim": 32, "layers": 1, "hidden": 48, "attention": GQAConfig(num_heads=2)}
        objective = CausalLM(TransformerConfig(**sizes).build())
        optimizer = config.build(objective, process_group=None)
        following = torch.randint(32, (32,))
        for _ in range(100):
            rows = [torch.randint(32, (8, 1))]
            for _ in range(16):
                rows.append((following[rows[-1]] + torch.randint(3, (8, 1))) % 32)
            text = torch.cat(rows, 1)
            batch = {"tokens": text[:, :-1], "targets": text[:, 1:]}
            loss = objective(batch) / objective.denominator(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        matrices = [w.detach() for block in objective.model.blocks for w in block.parameters() if w.dim() == 2]
        entropies[name], losses[name] = torch.stack([singular_entropy(w) for w in matrices]), loss.item()
    assert losses["muon"] == pytest.approx(losses["adamw"], abs=0.25)
    assert (entropies["muon"] > entropies["adamw"]).all()
