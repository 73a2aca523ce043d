"""What kinds of balancing share: when biases move, what is counted and saved, and what is reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danlu.nn import LossFreeConfig, MoE, MoEConfig
from danlu.nn.balance import Balancer, attach, expert_load, max_violation, update, watching
from danlu.protocols import BalanceConfig


def test_biases_move_after_the_parameters_and_count_every_micro_batch() -> None:
    torch.manual_seed(0)
    layer = MoE(8, MoEConfig(num_experts=5, top_k=2, hidden=4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(layer, optimizer)
    for _ in range(3):
        layer(torch.randn(7, 8)).sum().backward()
    assert not layer.balancer.bias.any()
    assert layer.balancer.counts.sum() == 3 * 7 * 2
    optimizer.step()
    assert layer.balancer.bias.any()
    assert layer.balancer.counts.sum() == 0
    assert layer.balancer.load.sum() == 3 * 7 * 2
    assert set(expert_load(layer)) == {"max_vio", "idle_experts"}


def test_a_rate_of_zero_freezes_the_biases() -> None:
    layer = MoE(8, MoEConfig(num_experts=5, top_k=2, hidden=4, balance=LossFreeConfig(rate=0)))
    layer(torch.randn(7, 8)).sum().backward()
    assert layer.balancer.counts.any()
    update(layer)
    assert not layer.balancer.bias.any()


def test_what_the_next_update_needs_is_saved_with_the_model() -> None:
    state = MoE(8, MoEConfig(num_experts=5, top_k=2, hidden=4)).state_dict()
    assert {"balancer.bias", "balancer.counts"} <= set(state)
    assert "balancer.load" not in state


def test_biases_freeze_after_the_given_updates_and_the_number_is_saved() -> None:
    balancer = Balancer(3, LossFreeConfig(freeze_after=2))
    history = []
    for _ in range(4):
        balancer.count(torch.tensor([6.0, 2.0, 4.0]), 6)
        update(balancer)
        history.append(balancer.bias.clone())
    assert not torch.equal(history[0], history[1])
    assert torch.equal(history[1], history[2])
    assert torch.equal(history[2], history[3])
    resumed = Balancer(3, LossFreeConfig(freeze_after=2))
    resumed.load_state_dict(balancer.state_dict())
    resumed.count(torch.tensor([6.0, 2.0, 4.0]), 6)
    update(resumed)
    assert torch.equal(resumed.bias, history[-1])


def test_scheduled_biases_follow_the_learning_rate_and_others_do_not() -> None:
    factors = [0.5, 1.0, 0.25, 0.0]

    def steps(scheduled: bool, *, schedule: bool = True) -> list[float]:
        layer = Balancer(3, LossFreeConfig(rate=0.5, rule="relative", scheduled=scheduled))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=3.0)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__) if schedule else None
        attach(layer, optimizer)
        moved = []
        for step in range(4):
            layer.count(torch.tensor([6.0, 2.0, 4.0]), 6)
            before = layer.bias.clone()
            optimizer.step()
            moved.append((layer.bias - before)[0].item())
            if rates and step < 3:
                rates.step()
        return moved

    assert steps(True) == pytest.approx([-0.25 * factor for factor in factors])
    assert steps(False) == pytest.approx([-0.25] * 4)
    assert steps(True, schedule=False) == pytest.approx([-0.25] * 4)


def test_a_rate_that_falls_averages_the_noise_of_batches_away() -> None:
    """The last 300 steps at a rate that falls to nothing: the biases balance many tokens better."""
    g = torch.Generator().manual_seed(0)
    offset = torch.randn(64, generator=g)
    tokens = (torch.randn(65_536, 64, generator=g) + offset).sigmoid()

    def held(falling: bool) -> float:
        draws, balancer = torch.Generator().manual_seed(1), Balancer(64, LossFreeConfig(rate=4e-3, scheduled=True))
        for step in range(700):
            scores = (torch.randn(1024, 64, generator=draws) + offset).sigmoid()
            balancer.count((scores + balancer.bias).topk(6, -1).indices.flatten().bincount(minlength=64), 1024)
            update(balancer, min(1.0, (700 - step) / 300) if falling else 1.0)
        return max_violation((tokens + balancer.bias).topk(6, -1).indices.flatten().bincount(minlength=64)).item()

    assert held(falling=True) < held(falling=False) / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_counts_stays_exact_whatever_the_module_is_cast_to(dtype: torch.dtype) -> None:
    layer = MoE(8, MoEConfig(num_experts=4, top_k=1, hidden=4, balance=LossFreeConfig(centered=False)))
    layer.balancer.bias += 0.6
    layer = layer.to(dtype)
    for _ in range(300):
        layer.balancer.count(torch.ones(4), 4)
    assert layer.balancer.counts.tolist() == [300.0] * 4
    layer.balancer.count(torch.tensor([0, 0, 0, 1]), 1)
    update(layer)
    torch.testing.assert_close(layer.balancer.bias, torch.tensor([0.601, 0.601, 0.601, 0.599]))
    assert layer.balancer.updates.dtype == torch.int64
    assert layer.router.dtype == dtype
    assert layer.double().balancer.counts.dtype == torch.float64


def test_padding_is_not_counted() -> None:
    torch.manual_seed(0)
    layer = MoE(8, MoEConfig(num_experts=5, top_k=2, hidden=4))
    x = torch.randn(4, 32, 8)
    real = torch.arange(32).expand(4, 32) < 4
    y = layer(x, real=real)
    y.sum().backward()
    assert layer.balancer.tokens == 16
    expected = torch.bincount(layer.route(x[real])[1].flatten(), minlength=5)
    assert torch.equal(layer.balancer.counts, expected.float())
    assert torch.equal(y, layer(x))
    with pytest.raises(ValueError, match="real must be booleans"):
        layer(x, real=real[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = MoE(8, MoEConfig(num_experts=5, top_k=2, hidden=4))
    x = torch.randn(7, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()  # type: ignore[union-attr]
    assert layer.balancer.counts.sum() == 7 * 2
    assert layer.balancer.tokens == 7


_RANK = """
import sys, torch
from danlu.nn import LossFreeConfig
from danlu.nn.balance import Balancer, update

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
balancer = Balancer(5, LossFreeConfig(rule="rms"))
balancer.count(torch.tensor([[7.0, 1, 0, 3, 1], [0.0, 2, 5, 1, 4]][rank]), 6)
update(balancer)
print(balancer.bias.tolist())
torch.distributed.destroy_process_group()
"""


def test_counts_are_added_over_ranks(tmp_path: Path) -> None:
    """Two processes that see different tokens end with the biases of one that saw all."""
    command = [sys.executable, "-c", _RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [json.loads(rank.communicate(timeout=240)[0]) for rank in ranks]
    alone = Balancer(5, LossFreeConfig(rule="rms"))
    alone.count(torch.tensor([7.0, 1, 0, 3, 1]) + torch.tensor([0.0, 2, 5, 1, 4]), 12)
    update(alone)
    assert found == [alone.bias.tolist()] * 2


def test_watching_counts_in_evaluation_and_stops_after_it() -> None:
    layer = MoE(8, MoEConfig(num_experts=5, top_k=2, hidden=4)).eval()
    with torch.no_grad(), watching(layer) as loads:
        layer(torch.randn(7, 8))
        layer(torch.randn(4, 8))
    assert loads[0].sum() == 22
    assert layer.balancer.watched is None
    assert not layer.balancer.counts.any()


def test_a_dense_model_has_no_balance_to_report() -> None:
    model = torch.nn.Linear(3, 3)
    update(model)
    assert expert_load(model) == {}


class Bounded(BalanceConfig):
    """A kind of one's own: experts without a token rise, and nothing else happens."""

    def step(self, counts_e: Tensor, tokens: Tensor, budget: float) -> Tensor:
        return 0.25 * (counts_e == 0)


def test_a_kind_of_balancing_from_outside_moves_the_biases() -> None:
    torch.manual_seed(0)
    layer = MoE(8, MoEConfig(num_experts=5, top_k=1, hidden=4, balance=Bounded()))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(layer, optimizer)
    layer(torch.randn(2, 8)).sum().backward()
    idle = layer.balancer.counts == 0
    optimizer.step()
    assert torch.equal(layer.balancer.bias, 0.25 * idle)
