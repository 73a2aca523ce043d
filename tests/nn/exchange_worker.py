"""Checks of experts cut among four processes, for ``test_exchange.py``: ``python THIS_FILE FOLDER SEED``.

Each check is a function of the world; what it raises goes into ``FOLDER/RANK.json``. The four are forks of one process
that has imported everything. Every process draws all the tokens and keeps its own, so that what one process would
compute of all of them is at hand.
"""

import json
import multiprocessing
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils.checkpoint import checkpoint

from danlu.nn import AuxiliaryLossConfig, DynamicConfig, MoE, MoEConfig, balance
from danlu.nn.exchange import exchanged_experts, is_cut
from danlu.nn.grouped import routed_experts
from danlu.optim import MuonConfig, clip_grad_norm_

PROCESSES = 4
TOKENS = (5, 0, 13, 1)
"""of each process"""
EXPERTS, DIM, HIDDEN = 12, 11, 7
SEED = 0


def mesh_of(experts: int) -> Any:
    return init_device_mesh("cpu", (PROCESSES // experts, experts), mesh_dim_names=("copies", "experts"))


def cut(weight: Tensor, mesh: Any) -> Any:
    return distribute_tensor(weight.detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None).requires_grad_()


def own(rows: Tensor) -> Tensor:
    return rows.split(TOKENS)[dist.get_rank()]


def gathered(gradient: Any, mesh: Any) -> Tensor:
    """The whole gradient, added up over the processes that hold the same experts."""
    part = gradient.to_local().clone()
    dist.all_reduce(part, group=mesh.get_group("copies"))
    whole: Tensor = distribute_tensor(part, mesh["copies"], [Replicate()], src_data_rank=None).to_local()
    parts = [torch.empty_like(whole) for _ in range(mesh.size(1))]
    dist.all_gather(parts, whole, group=mesh.get_group("experts"))
    return torch.cat(parts)


def drawn(form: str, *, experts: int = EXPERTS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Tokens, gates, choices and weights for all processes."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = sum(TOKENS)
    x = torch.randn(tokens, DIM, generator=generator, dtype=torch.float64)
    w_up = torch.randn(experts, 2 * HIDDEN, DIM, generator=generator, dtype=torch.float64) / DIM**0.5
    w_down = torch.randn(experts, DIM, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    if form == "numbers":
        chosen = scores.topk(3, dim=-1).indices
        gate = scores.gather(-1, chosen)
    elif form == "one process":  # whose experts all tokens want
        chosen = scores[:, :3].topk(2, dim=-1).indices
        gate = scores.gather(-1, chosen)
    else:
        chosen, gate = scores > 0.7, scores
        chosen[2] = False  # a token that wants none
    return [x.to(dtype), gate.to(dtype), chosen, w_up.to(dtype), w_down.to(dtype)]


@contextmanager
def traffic() -> Iterator[list[Tensor]]:
    """What this process sends by all-to-all."""
    sent: list[Tensor] = []
    really = dist.all_to_all_single

    def counted(received: Tensor, rows: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(rows)
        return really(received, rows, *args, **options)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield sent


def compare(form: str, experts: int, rms: float | None) -> None:
    mesh = mesh_of(experts)
    x, gate, chosen, w_up, w_down = drawn(form)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED + 1), dtype=x.dtype)
    whole = [t.clone().requires_grad_() for t in (x, gate, w_up, w_down)]
    y = routed_experts(whole[0], whole[1], chosen, *whole[2:], rms=rms)
    expected = torch.autograd.grad(y, whole, upstream)
    here = [own(x).clone().requires_grad_(), own(gate).clone().requires_grad_(), cut(w_up, mesh), cut(w_down, mesh)]
    part = exchanged_experts(here[0], here[1], own(chosen), here[2], here[3], rms=rms)
    found = torch.autograd.grad(part, here, own(upstream))
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(part, own(y), **close)
    torch.testing.assert_close(found[:2], (own(expected[0]), own(expected[1])), **close)
    for gradient, right in zip(found[2:], expected[2:]):
        torch.testing.assert_close(gathered(gradient, mesh), right, **close)


def check_values_and_gradients_are_those_of_one_process() -> None:
    for form in ("numbers", "mask", "one process"):
        for experts in (2, 4):
            compare(form, experts, None)
        compare(form, 2, 1.3)


def check_the_derivative_of_a_derivative_travels_as_well() -> None:
    mesh = mesh_of(2)
    x, gate, chosen, w_up, w_down = drawn("numbers")
    wide = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(routed_experts(wide, gate, chosen, w_up, w_down).sum(), wide, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), wide)
    here = own(x).clone().requires_grad_()
    y = exchanged_experts(here, own(gate), own(chosen), cut(w_up, mesh), cut(w_down, mesh))
    (slope,) = torch.autograd.grad(y.sum(), here, create_graph=True)
    (found,) = torch.autograd.grad(slope.square().sum(), here)
    torch.testing.assert_close(found, own(expected), rtol=1e-10, atol=1e-10)


def check_a_layer_used_twice_and_run_again_in_the_backward_pass_has_the_same_gradients() -> None:
    mesh = mesh_of(2)
    x, gate, chosen, w_up, w_down = drawn("mask")
    found = []
    for again in (False, True):
        here = [own(x).clone().requires_grad_(), cut(w_up, mesh), cut(w_down, mesh)]

        def layer(x: Tensor, here: list[Any] = here) -> Tensor:
            return x + exchanged_experts(x, own(gate), own(chosen), here[1], here[2])

        first = checkpoint(layer, here[0], use_reentrant=False) if again else layer(here[0])
        second = checkpoint(layer, first, use_reentrant=False) if again else layer(first)  # type: ignore[arg-type]
        grads = torch.autograd.grad(second.square().sum(), here)  # type: ignore[union-attr]
        found.append([grads[0], *(gathered(gradient, mesh) for gradient in grads[1:])])
    wide = [t.clone().requires_grad_() for t in (x, w_up, w_down)]
    y = wide[0]
    for _ in range(2):
        y = y + routed_experts(y, gate, chosen, *wide[1:])
    expected = list(torch.autograd.grad(y.square().sum(), wide))
    expected[0] = own(expected[0])
    for grads in found:
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)


def check_a_token_goes_to_a_process_once_whatever_it_chose_there() -> None:
    mesh = mesh_of(2)
    x, gate, chosen, w_up, w_down = drawn("numbers")
    here, half = own(chosen), EXPERTS // 2
    with traffic() as sent:
        exchanged_experts(own(x), own(gate), here, cut(w_up, mesh), cut(w_down, mesh))
    pairs = (here < half).any(-1).sum() + (here >= half).any(-1).sum()
    rows = [len(rows) for rows in sent if rows.dtype == x.dtype and rows.shape[-1] == DIM]
    assert rows[0] == pairs
    assert len(rows) == 2  # there and back
    if len(here) > 4:
        assert pairs < here.numel()


def check_bfloat16_is_near_float32_and_autocast_sends_what_it_computes_in() -> None:
    mesh = mesh_of(2)
    x, gate, chosen, w_up, w_down = drawn("numbers", dtype=torch.float32)
    y = own(routed_experts(x, gate, chosen, w_up, w_down))
    weights = cut(w_up, mesh), cut(w_down, mesh)
    low = exchanged_experts(own(x).bfloat16(), own(gate), own(chosen), *weights)
    with torch.autocast("cpu", torch.bfloat16), traffic() as sent:
        cast = exchanged_experts(own(x), own(gate), own(chosen), *weights)
    assert all(rows.dtype == torch.bfloat16 for rows in sent if rows.shape[-1] == DIM)
    for found in (low, cast):
        assert found.dtype == torch.bfloat16
        assert (found.float() - y).norm() <= 0.03 * y.norm()


def check_a_token_that_is_not_finite_harms_no_other() -> None:
    mesh = mesh_of(4)
    x, gate, chosen, w_up, w_down = drawn("numbers")
    expected = own(routed_experts(x, gate, chosen, w_up, w_down))
    broken, ruined = x.clone(), torch.zeros(len(x), dtype=torch.bool)
    broken[1], ruined[1] = torch.nan, True
    found = exchanged_experts(own(broken), own(gate), own(chosen), cut(w_up, mesh), cut(w_down, mesh))
    assert found[own(ruined)].isnan().all()
    torch.testing.assert_close(found[~own(ruined)], expected[~own(ruined)], rtol=1e-12, atol=1e-12)


def check_what_cannot_travel_is_refused() -> None:
    mesh = mesh_of(4)
    x, gate, chosen, w_up, w_down = drawn("numbers")
    ten = [cut(w[:10], mesh) for w in (w_up, w_down)]
    with pytest.raises(ValueError, match="multiple of the 4 processes that share them, got 10"):
        exchanged_experts(own(x), own(gate), own(chosen) % 10, *ten)
    rows = distribute_tensor(w_up, mesh, [Replicate(), Shard(1)], src_data_rank=None)
    assert is_cut(rows)
    with pytest.raises(ValueError, match=r"placed as Shard\(0\) along the last dimension"):
        exchanged_experts(own(x), own(gate), own(chosen), rows, w_down)
    weights = cut(w_up, mesh), cut(w_down, mesh)
    with pytest.raises(RuntimeError, match=r"no torch\.func transforms"):
        torch.func.jvp(lambda x: exchanged_experts(x, own(gate), own(chosen), *weights), (own(x),), (own(x),))
    other = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("shards",))
    assert not is_cut(distribute_tensor(w_up, other, [Shard(0)], src_data_rank=None))


def train(layer: nn.Module, tokens: list[Tensor], mesh: Any) -> list[float]:
    """Three steps on a summed loss, gradients added up by hand; the losses of all tokens."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    balance.attach(layer, optimizer)
    losses = []
    for x in tokens:
        optimizer.zero_grad()
        loss = (x - layer(x)).square().sum() / (DIM * sum(TOKENS))
        balance.follow_loss(loss, layer, summed=True)
        loss.backward()
        total = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(total)
            for parameter in layer.parameters():
                group = mesh.get_group("copies") if is_cut(parameter) else None
                gradient: Any = parameter.grad
                dist.all_reduce(gradient.to_local() if is_cut(parameter) else gradient, group=group)
        clip_grad_norm_(list(layer.parameters()), 0.1)
        optimizer.step()
        losses.append(total.item())
    return losses


def two_layers(config: MoEConfig, mesh: Any, dtype: torch.dtype = torch.float32) -> tuple[MoE, MoE]:
    """The same layer whole and cut."""
    layers = []
    for _ in range(2):
        torch.manual_seed(SEED)
        layers.append(MoE(DIM, config).to(dtype))
    for name in ("w_up", "w_down"):
        setattr(layers[1], name, nn.Parameter(cut(getattr(layers[1], name), mesh)))
    return layers[0], layers[1]


def same_training(config: MoEConfig, *, compiled: bool = False) -> None:
    generator = torch.Generator().manual_seed(SEED)
    tokens = [torch.randn(sum(TOKENS), DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
    close = {"rtol": 1e-10, "atol": 1e-11}
    for experts in (2, 4):
        mesh = mesh_of(experts)
        alone, shared = two_layers(config, mesh, torch.float64)
        with mock.patch.object(balance, "_several_ranks", return_value=False):
            expected = train(alone, tokens, None)
        if compiled:
            shared.compile(backend="eager")
        found = train(shared, [own(x) for x in tokens], mesh)
        torch.testing.assert_close(found, expected, **close)
        torch.testing.assert_close(shared.balancer.bias, alone.balancer.bias, **close)
        for name, right in alone.named_parameters():
            left: Any = shared.get_parameter(name)
            left = left.full_tensor() if is_cut(left) else left
            torch.testing.assert_close(left.detach(), right.detach(), **close)


def check_a_layer_trains_as_on_one_process() -> None:
    same_training(MoEConfig(num_experts=EXPERTS, top_k=3, hidden=HIDDEN))
    same_training(MoEConfig(num_experts=EXPERTS, top_k=3, hidden=HIDDEN, normalize_experts=True))


def check_a_layer_with_an_auxiliary_loss_trains_as_on_one_process() -> None:
    same_training(MoEConfig(num_experts=EXPERTS, top_k=3, hidden=HIDDEN, balance=AuxiliaryLossConfig(weight=0.1)))


def check_a_layer_with_a_number_of_experts_that_varies_trains_as_on_one_process() -> None:
    same_training(MoEConfig(num_experts=EXPERTS, top_k=3, hidden=HIDDEN, balance=DynamicConfig()))


def check_muon_and_clipping_take_the_cut_experts_as_they_are() -> None:
    generator = torch.Generator().manual_seed(SEED)
    alone, shared = two_layers(MoEConfig(num_experts=EXPERTS, top_k=3, hidden=HIDDEN), mesh := mesh_of(2))
    start = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    for name, parameter in alone.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        other = shared.get_parameter(name)
        other.grad = cut(parameter.grad, mesh).detach() if is_cut(other) else parameter.grad.clone()
    norms = [clip_grad_norm_(list(layer.parameters()), 0.1) for layer in (alone, shared)]
    torch.testing.assert_close(norms[1], norms[0])
    for layer in (alone, shared):
        MuonConfig(lr=0.02).build(layer).step()
    for name, right in alone.named_parameters():
        left: Any = shared.get_parameter(name)
        left = left.full_tensor() if is_cut(left) else left
        # Muon iterates in few bits, where the last bit of the norm shows; its rows split wrongly would be off by half.
        assert (left - right).norm() < 0.02 * (right - start[name]).norm(), name


def check_a_compiled_layer_trains_as_on_one_process() -> None:
    same_training(MoEConfig(num_experts=EXPERTS, top_k=3, hidden=HIDDEN), compiled=True)


CHECKS = {name.removeprefix("check_"): check for name, check in vars().items() if name.startswith("check_")}


def work(rank: int, folder: Path) -> None:
    limit = timedelta(seconds=120)  # a check that fails on one process leaves others waiting
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=limit
    )
    outcome = {}
    for name, check in CHECKS.items():
        try:
            check()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(outcome))
        dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> int:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else methods[0])
    workers = [context.Process(target=work, args=(rank, folder), daemon=True) for rank in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return int(any(worker.exitcode for worker in workers))


if __name__ == "__main__":
    SEED = int(sys.argv[2])
    sys.exit(main(Path(sys.argv[1])))
