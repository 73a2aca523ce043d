from types import SimpleNamespace

import pytest
import torch
import toy
from torch import Tensor, nn

from danlu.optim import state_bytes
from danlu.train import TrainConfig, assemble
from danlu.train.device import Policy
from danlu.train.plan import activation_bytes, sentences, training_flops


class Product(nn.Module):
    """Keeps exactly its input (for the weight's gradient) and its tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return torch.tanh(batch["x"] @ self.weight.T).sum()


def test_activations_are_counted_and_nothing_is_changed() -> None:
    objective, x = Product(), torch.randn(11, 3, 5)
    before = torch.get_rng_state()
    assert activation_bytes(objective, {"x": x}) == 11 * 4 * (3 * 7) + 11 * x.untyped_storage().nbytes()
    assert float(objective.calls) == 0
    assert objective.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_optimizer_state_is_what_the_optimizer_will_hold() -> None:
    parts = assemble(toy.run_config())
    batch = next(parts.data.train)
    parts.objective(batch).backward()
    parts.optimizer.step()
    held = sum(
        value.nbytes
        for state in parts.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    assert state_bytes(assemble(toy.run_config()).optimizer) == held


class Mixture(nn.Linear):
    def parameter_counts(self) -> tuple[int, int]:
        return 2_000_000, 500_000


class Counted(Product):
    unit = "tokens"

    def denominator(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(batch["x"].shape[0])


def test_the_plan_says_sizes_tokens_and_time() -> None:
    policy = Policy(
        device=torch.device("cpu"),
        dtype=torch.float32,
        matmul_precision="highest",
        threads=2,
        gflops={"float32": 100.0, "bfloat16": 50.0},
        name="a processor",
    )
    said = " ".join(
        sentences(
            TrainConfig(steps=100, accumulate=2, compile=True),
            model=Mixture(2, 3),
            objective=Counted(),
            optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
            batch={"x": torch.randn(10, 3, 5)},
            policy=policy,
            processes=2,
            flops=1e9,
            manifest={
                "source": "a book",
                "bytes": 1_500_000,
                "documents": 1,
                "train_tokens": 1000,
                "warnings": ["It is short."],
            },
        )
    )
    for part in (
        "Data: a book, 1.50 MB in 1 document. It is short.",
        "Model: 2 million parameters (500 thousand active per token).",
        "Training: 100 steps, 40 tokens per step, 4 thousand in all (4.0 passes over the data).",
        "a processor: computes in float32 on 2 threads, float32 products at precision 'highest'",
        "Time: about 50 s at 40% of the measured speed.",  # 4000 * 1e9 / (0.4 * 2 * 1e11)
        "The first step compiles the model",
    ):
        assert part in said


@pytest.mark.parametrize("ema", [None, 0.9])
def test_an_average_of_the_weights_costs_memory(ema: float | None) -> None:
    objective = Counted()
    objective.weight = nn.Parameter(torch.zeros(2**18, 5))
    said = sentences(
        TrainConfig(ema=ema),
        model=nn.Linear(1, 1),
        objective=objective,
        optimizer=torch.optim.AdamW(objective.parameters()),
        batch={"x": torch.randn(1, 1, 5)},
        policy=assemble(toy.run_config()).policy,
    )
    copies = 5 if ema else 4
    assert f"Memory: about {round(copies * 5 + 1)} MiB" in " ".join(said)


class Text(nn.Module):
    def training_flops(self, length: int | None = None) -> float:
        return 10.0 * (length or 1)


def test_the_work_of_a_token_is_the_model_s_own_count_at_the_length_of_the_data_or_unknown() -> None:
    windows = SimpleNamespace(manifest={"length": 32})
    assert training_flops(Text(), windows) == 320
    assert training_flops(Text(), SimpleNamespace(manifest={})) == 10
    assert training_flops(nn.Linear(1, 1), windows) is None
