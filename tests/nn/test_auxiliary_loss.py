"""Auxiliary loss: its gradient, and that it follows the scale of the objective over micro-batches and checkpoints."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danlu.nn import AuxiliaryLossConfig, MoE, MoEConfig
from danlu.nn.auxiliary_loss import load_gradient, square, straight_through
from danlu.nn.balance import attach, follow_loss, max_violation, update


def routed(tokens: int = 101, experts: int = 8, active: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a gradient, normalised scores and 1 / K where chosen."""
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    share = logits.softmax(-1)
    selected = torch.zeros_like(share).scatter_(-1, share.topk(active, -1).indices, 1 / active)
    return logits, share, selected.detach()


def test_square_form_has_the_gradient_of_load_times_share() -> None:
    logits, share, selected = routed()
    load = straight_through(share, selected)
    uniform = torch.full_like(load, 1 / 8).detach()
    (ours,) = torch.autograd.grad((load - uniform).square().sum() / 2, logits, retain_graph=True)
    (usual,) = torch.autograd.grad(selected.mean(0) @ share.mean(0), logits)
    assert (ours - usual).abs().max() < 1e-17


def test_entropy_form_has_the_gradient_of_share_times_log_load() -> None:
    logits, share, selected = routed()
    load = straight_through(share, selected)
    (ours,) = torch.autograd.grad((load * load.log()).sum(), logits, retain_graph=True)
    (usual,) = torch.autograd.grad(selected.mean(0).log() @ share.mean(0), logits)
    assert (ours - usual).abs().max() < 1e-16


def test_any_loss_target_and_normalisation_can_be_written_in_the_load() -> None:
    logits, _, selected = routed()
    scores = logits.tanh()  # signed and not normalised
    target = torch.arange(1.0, 9.0, dtype=torch.float64) / 36
    (ours,) = torch.autograd.grad(
        (straight_through(scores, selected) - target).abs().pow(3).sum(), logits, retain_graph=True
    )
    excess = selected.mean(0) - target
    (expected,) = torch.autograd.grad((3 * excess * excess.abs()) @ scores.mean(0), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("form", ["square", "entropy"])
def test_target_is_where_the_gradient_pushes_no_share(form: str) -> None:
    config = AuxiliaryLossConfig(weight=1.0, form=form, target=(1.0, 2.0, 5.0))  # type: ignore[arg-type]
    at_target = load_gradient(torch.tensor([10.0, 20.0, 50.0], dtype=torch.float64), config)
    torch.testing.assert_close(at_target, at_target.mean().expand(3), rtol=0, atol=1e-12)  # constant: sum P is 1
    away = load_gradient(torch.tensor([50.0, 20.0, 10.0], dtype=torch.float64), config)
    assert away[0] > away[1] > away[2]


def test_an_expert_without_a_choice_keeps_the_entropy_finite() -> None:
    gradient = load_gradient(torch.tensor([9.0, 0.0, 3.0]), AuxiliaryLossConfig(form="entropy"))
    assert gradient.isfinite().all()
    assert gradient[1] < gradient[2] < gradient[0]


class Summed(nn.Module):
    """A summed loss that does not depend on the router, so that all its gradient is the auxiliary one."""

    def __init__(self, form: str = "square", *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        balance = AuxiliaryLossConfig(weight=0.3, form=form)  # type: ignore[arg-type]
        self.layer = MoE(6, MoEConfig(num_experts=5, top_k=2, hidden=4, num_shared_experts=0, balance=balance)).double()
        self.layer.w_down.data.zero_()
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.layer, x, use_reentrant=False) if self.checkpointed else self.layer(x)
        return y.sum()


def expected_router_gradient(module: Summed, x: Tensor) -> Tensor:
    """Of the weighted loss by straight-through over all tokens."""
    layer = module.layer
    scores = (x @ layer.router.T).sigmoid()
    share = scores / scores.sum(-1, keepdim=True)
    selected = torch.zeros_like(share).scatter_(-1, scores.topk(2, -1).indices, 0.5).detach()
    loss = 0.3 * square(straight_through(share, selected), torch.full((5,), 0.2, dtype=torch.float64))
    return torch.autograd.grad(loss, layer.router)[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layer_adds_the_gradient_of_the_loss_at_the_scale_of_the_objective(checkpointed: bool) -> None:
    module, x = Summed(checkpointed=checkpointed), torch.randn(23, 6, dtype=torch.float64)
    attach(module, torch.optim.SGD(module.parameters(), lr=0.1), summed_loss=module)
    (module(x) / 23).backward()
    torch.testing.assert_close(module.layer.router.grad, expected_router_gradient(module, x), rtol=1e-10, atol=1e-14)
    assert module.layer.balancer.counts.sum() == 46


@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.125])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_gradient_follows_whatever_scale_a_mean_loss_gets(scale: float, micro_batches: int) -> None:
    """Accumulation divides the loss, a gradient scaler multiplies it; of equal micro-batches the sum is the whole."""
    module, x = Summed(), torch.randn(23, 6, dtype=torch.float64)
    for _ in range(micro_batches):
        loss = follow_loss(module.layer(x).mean(), module)
        (scale * (loss / micro_batches)).backward()
    expected = scale * expected_router_gradient(module, x)
    torch.testing.assert_close(module.layer.router.grad, expected, rtol=1e-10, atol=1e-14)


def test_a_loss_that_nobody_named_is_an_error_not_a_gradient_of_some_scale() -> None:
    module, x = Summed(), torch.randn(23, 6, dtype=torch.float64)
    follow_loss(module.layer(x).mean(), module).backward()
    with pytest.raises(RuntimeError, match="follow_loss"):
        module.layer(x).mean().backward()


def test_padding_has_no_part_in_the_loss() -> None:
    module, x = Summed(), torch.randn(23, 6, dtype=torch.float64)
    real = torch.arange(23) % 3 > 0
    follow_loss(module.layer(x, real=real).mean(), module).backward()
    expected = expected_router_gradient(module, x[real])
    torch.testing.assert_close(module.layer.router.grad, expected, rtol=1e-10, atol=1e-14)
    assert module.layer.balancer.counts.sum() == 2 * module.layer.balancer.tokens == 2 * real.sum()


def test_last_micro_batch_sees_the_load_of_all() -> None:
    """Of micro-batches with the same tokens the load is that of the whole, and so is the gradient."""
    module, x = Summed(), torch.randn(23, 6, dtype=torch.float64)
    attach(module, torch.optim.SGD(module.parameters(), lr=0.1), summed_loss=module)
    for _ in range(3):
        (module(x) / 69).backward()
    torch.testing.assert_close(module.layer.router.grad, expected_router_gradient(module, x), rtol=1e-10, atol=1e-14)
    assert module.layer.balancer.counts.sum() == 3 * 46


def test_evaluation_adds_and_counts_nothing() -> None:
    module, x = Summed().eval(), torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    module(x).backward()
    assert not module.layer.router.grad.any()  # type: ignore[union-attr]
    assert not module.layer.balancer.counts.any()


@pytest.mark.parametrize("form", ["square", "entropy"])
def test_descending_the_loss_balances_a_skewed_router(form: str) -> None:
    module = Summed(form)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 6, dtype=torch.float64, generator=generator)
    x[:, 0] += 2.0  # a common direction that favours some experts
    optimizer = torch.optim.Adam([module.layer.router], lr=0.02)
    violations = []
    for _ in range(150):
        follow_loss(module.layer(x).mean(), module).backward()
        violations.append(max_violation(module.layer.balancer.counts).item())
        optimizer.step()
        optimizer.zero_grad()
        update(module)
    assert violations[0] > 0.5
    assert violations[-1] < violations[0] / 3
    assert not module.layer.balancer.bias.any()


def test_the_square_form_weighs_the_excess_by_the_number_of_experts() -> None:
    """The gradient of ``weight n sum F_i P_i`` by P is ``weight n F``, up to what all experts share."""
    counts = torch.tensor([10.0, 3.0, 0.0, 1.0, 6.0], dtype=torch.float64)
    gradient = load_gradient(counts, AuxiliaryLossConfig(weight=0.3))
    torch.testing.assert_close(gradient, 0.3 * 5 * (counts / 20 - 0.2), rtol=1e-12, atol=1e-15)
