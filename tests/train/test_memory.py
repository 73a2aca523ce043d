"""The memory of a step that is foretold from sizes, against what PyTorch's allocator hands out in a real one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from danlu.models import TransformerConfig, UNetConfig
from danlu.nn import GQAConfig, MLAConfig, MoEConfig
from danlu.objectives import CausalLMConfig, MaskedLMConfig, MeanFlowConfig
from danlu.optim import AdamWConfig, MuonConfig, state_bytes
from danlu.train import TrainConfig, plan
from danlu.train.device import Policy
from danlu.train.memory import LiveBytes, pass_bytes

VOCAB, TIME, ROWS = 211, 67, 5
GQA = TransformerConfig(vocab_size=VOCAB, dim=32, layers=3, hidden=104, attention=GQAConfig(num_heads=4))
MLA = replace(
    GQA,
    attention=MLAConfig(num_heads=2, kv_rank=24, nope_dim=16, rope_dim=8, value_dim=16),
    experts=MoEConfig(num_experts=5, top_k=2, hidden=40, num_shared_experts=1),
)
UNET = UNetConfig(num_classes=3, two_times=True, widths=(16, 32), blocks=(1, 1))


def allocated(work: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's allocator had handed out at once while ``work`` ran, by its own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def text(packed: bool) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCAB, (ROWS, TIME))
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    if packed:
        batch["documents"] = (torch.arange(TIME) > 40).long().expand(ROWS, -1).contiguous()
    return batch


def causal(config: TransformerConfig, dtype: torch.dtype) -> nn.Module:
    model = config.build()
    model.compute_dtype = dtype
    return CausalLMConfig().build(model)


def masked(dtype: torch.dtype) -> nn.Module:
    model = replace(GQA, attention=GQAConfig(num_heads=4, mask="bidirectional")).build()
    model.compute_dtype = dtype
    return MaskedLMConfig().build(model)


def meanflow(dtype: torch.dtype) -> nn.Module:
    model = UNET.build()
    model.compute_dtype = dtype
    return MeanFlowConfig(share=0.6).build(model, batches=10)


def a_pass(objective: nn.Module, batch: dict[str, Tensor]) -> None:
    objective.zero_grad()
    loss = objective(batch)
    (loss * 0.5).backward()


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda dtype: causal(GQA, dtype), lambda: text(packed=False)),
        (lambda dtype: causal(GQA, dtype), lambda: text(packed=True)),
        (lambda dtype: causal(MLA, dtype), lambda: text(packed=False)),
        (masked, lambda: text(packed=False)),
        (meanflow, lambda: {"images": torch.randn(ROWS, 1, 16, 16), "labels": torch.arange(ROWS) % 3}),
    ],
    ids=["dense", "packed", "experts", "masked", "meanflow"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_holds_what_its_sizes_say_to_ten_percent(make: Any, batch: Any, dtype: torch.dtype) -> None:
    objective, inputs = make(dtype), batch()
    a_pass(objective, inputs)  # tables that are made once are there
    foretold = pass_bytes(objective, inputs, "cpu")
    assert foretold == pytest.approx(allocated(lambda: a_pass(objective, inputs)), rel=0.10, abs=2**16)


@pytest.mark.parametrize(("accumulate", "ema"), [(1, None), (3, None), (1, 0.9)])
def test_the_memory_of_a_step_is_that_of_a_real_one(accumulate: int, ema: float | None) -> None:
    objective = causal(GQA, torch.float32)
    optimizer = MuonConfig().build(objective)
    policy = Policy(
        device=torch.device("cpu"),
        dtype=torch.float32,
        matmul_precision="highest",
        threads=1,
        gflops={"float32": 1.0},
        name="a processor",
    )
    config = TrainConfig(accumulate=accumulate, ema=ema)
    batches = [text(packed=False) for _ in range(accumulate)]

    def step() -> None:
        for batch in batches:
            (objective(batch) * 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    there = (2 if ema else 1) * sum(p.nbytes for p in objective.parameters()) + state_bytes(optimizer)
    there += sum(value.nbytes for batch in batches for value in batch.values())
    foretold = plan.step_memory(config, objective, optimizer, batches[0], policy)
    assert foretold == pytest.approx(there + allocated(step), rel=0.10, abs=2**16)


def test_telling_the_memory_changes_nothing_and_takes_none() -> None:
    objective = meanflow(torch.float32)
    inputs = {"images": torch.randn(ROWS, 1, 16, 16), "labels": torch.arange(ROWS) % 3}
    a_pass(objective, inputs)
    before, metrics = torch.get_rng_state(), objective.metrics()
    gradients = [None if p.grad is None else p.grad.clone() for p in objective.parameters()]
    taken = allocated(lambda: pass_bytes(objective, inputs, "cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert objective.metrics() == metrics
    assert all(p.device.type == "cpu" for p in objective.parameters())
    assert all(a is b.grad or torch.equal(a, b.grad) for a, b in zip(gradients, objective.parameters()))
    assert taken < 0.02 * pass_bytes(objective, inputs, "cpu")


class Reads(nn.Module):
    """Asks for a number, which a tensor without numbers cannot give."""

    unit = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.weight * (1.0 if batch["x"].sum() > 0 else 2.0)).square().sum()

    def denominator(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["x"]))


def test_an_objective_that_reads_a_number_is_counted_by_what_it_keeps() -> None:
    objective = Reads()
    with pytest.raises(RuntimeError, match="meta"):
        pass_bytes(objective, {"x": torch.ones(2)}, "cpu")
    policy = Policy(
        device=torch.device("cpu"), dtype=torch.float32, matmul_precision="highest", threads=1, gflops={}, name=""
    )
    optimizer = AdamWConfig().build(objective)
    found = plan.step_memory(TrainConfig(), objective, optimizer, {"x": torch.ones(2)}, policy)
    assert found >= 4 * 4000  # weights, gradients, two moments


def test_storages_are_counted_once_and_for_as_long_as_a_view_of_them_lives() -> None:
    with LiveBytes() as count:
        x = torch.empty(7, 11, device="meta")
        view = x[0]
        x.add_(1)
        assert count.live == 4 * 77
        del x
        assert count.live == 4 * 77
        del view
        assert (count.live, count.peak) == (0, 4 * 77)
