import json
import signal
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn

from danlu.objectives import evaluate
from danlu.train import TrainConfig, Trainer
from danlu.train.ema import averaged
from danlu.train.signals import Stop


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "precision": "float32", "device": "cpu", "threads": 1, **changes})


class Rows:
    """Consecutive rows of fixed data, ``size`` at a time."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.size, self.position = x, y, size, 0

    def __next__(self) -> dict[str, Tensor]:
        rows = slice(self.position, self.position + self.size)
        self.position = (self.position + self.size) % len(self.x)
        return {"x": self.x[rows], "y": self.y[rows]}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


def points(rows: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    y = x[:, :3] * x[:, 1:4]
    y[torch.rand(y.shape, generator=generator) < 0.6] = torch.nan  # every row counts a different number of units
    y[:, 0] = 1.0
    return x, y


def squares(dtype: torch.dtype = torch.float64) -> toy.Squares:
    torch.manual_seed(0)
    return toy.Squares(toy.Net(toy.NetConfig(dropout=0.0)), toy.SquaresConfig(noise=0.0)).to(dtype)


def trainer(objective: nn.Module, loader: Any, loop: TrainConfig, lr: float = 0.1, **others: Any) -> Trainer:
    optimizer = torch.optim.SGD(objective.parameters(), lr=lr, momentum=0.9)
    return Trainer(objective, optimizer, Harmonic(), loader, loop, **others)


class Harmonic:
    def factor(self, step: int, total: int) -> float:
        return 1 / (1 + step)


class Log(list[Any]):
    """Collects records."""

    def __call__(self, record: Any) -> None:
        self.append(record)

    def close(self) -> None: ...


@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulated_micro_batches_are_one_large_batch(clip: float | None) -> None:
    x, y = points()
    whole, parts = squares(), squares()
    logs = Log(), Log()
    trainer(whole, Rows(x, y, 12), config(clip=clip), reporters=[logs[0]]).fit()
    trainer(parts, Rows(x, y, 3), config(clip=clip, accumulate=4), reporters=[logs[1]]).fit()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
        assert a["items"] == b["items"]


def test_the_first_step_is_the_gradient_of_the_mean_over_units() -> None:
    x, y = points()
    objective, reference = squares(), squares()
    trainer(objective, Rows(x, y, 12), config(steps=1, clip=None)).fit()
    batch = {"x": x[:12], "y": y[:12]}
    (reference(batch) / reference.denominator(batch)).backward()
    for trained, before in zip(objective.model.parameters(), reference.model.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(trained, before - 0.1 * before.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("descent", [1e-3, 1e3])
def test_a_step_of_gradient_descent_lowers_the_loss_by_at_most_the_limit_times_the_rate(descent: float) -> None:
    ends = []
    for limit in (None, descent):
        x, y = points()
        objective = squares()
        start = [weight.detach().clone() for weight in objective.parameters()]
        trainer(objective, Rows(x, y, 12), config(steps=1, clip=None, descent=limit)).fit()
        ends.append([weight.detach() - before for weight, before in zip(objective.parameters(), start)])
    # Of gradient descent <u, g> is |g|^2, and the step is 0.1 g.
    product = sum((part / 0.1).square().sum() for part in ends[0])
    factor = min(1.0, descent / product.item())
    for whole, limited in zip(*ends):
        torch.testing.assert_close(limited, factor * whole, rtol=1e-9, atol=1e-15)


def test_records_say_what_was_trained() -> None:
    x, y = points()
    log = Log()
    loop = trainer(squares(), Rows(x, y, 8), config(), reporters=[log], flops=100.0)
    loop.fit()
    assert [r["step"] for r in log] == [1, 2, 3, 4]
    units = [int((~y[start : start + 8].isnan()).sum()) for start in (0, 8, 16, 0)]
    assert [r["items"] for r in log] == [sum(units[: i + 1]) for i in range(4)]
    assert [r["lr"] for r in log] == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])
    times = [r["time"] for r in log]
    assert times == sorted(times)
    assert all(r["grad_norm"] > 0 for r in log)
    for r in log:
        assert r["mfu"] == pytest.approx(100 * r["items_per_second"] / loop.policy.rate)
        json.dumps(r, allow_nan=False)


def test_only_every_nth_step_and_the_last_are_logged() -> None:
    x, y = points()
    log = Log()
    trainer(squares(), Rows(x, y, 8), config(steps=7, log_every=3), reporters=[log]).fit()
    assert [r["step"] for r in log] == [3, 6, 7]


def test_a_gradient_that_is_not_finite_skips_the_step_and_names_the_parameter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, y = points()
    x[8] = torch.inf
    objective, log = squares(), Log()
    kept: list[Tensor] = []

    def remember(record: Any) -> None:
        kept.append(objective.model.second.weight.detach().clone())

    remember.close = lambda: None  # type: ignore[attr-defined]
    trainer(objective, Rows(x, y, 8), config(steps=3), reporters=[log, remember]).fit()
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])
    assert [r.get("skipped", 0) for r in log] == [0, 1, 1]
    assert "model.first.weight" in caplog.text
    assert all(bool(p.isfinite().all()) for p in objective.parameters())


def test_many_such_steps_in_a_row_stop_the_run() -> None:
    x, y = points()
    log = Log()
    loop = trainer(squares(), Rows(x * torch.nan, y, 8), config(steps=9, patience=2), reporters=[log])
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, in model\.first\.weight"):
        loop.fit()
    assert [r["step"] for r in log] == [1, 2]


@pytest.mark.parametrize("every", [1, 16])
def test_steps_decided_on_the_device_keep_weights_finite_count_and_name_the_parameter(
    every: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danlu.train.trainer._FLUSH_EVERY", {"cpu": every})
    x, y = points()
    x[8:16] = torch.nan
    log, objective = Log(), squares()
    loop = trainer(objective, Rows(x, y, 8), config(steps=5), reporters=[log])
    loop.deferred = True
    loop.fit()
    assert all(bool(p.isfinite().all()) for p in objective.parameters())
    assert all(bool(s["momentum_buffer"].isfinite().all()) for s in loop.optimizer.state.values())
    assert [r.get("skipped", 0) for r in log] == [0, 1, 1, 1, 2]
    assert "model.first.weight" in caplog.text


def test_many_such_steps_stop_a_run_whose_numbers_are_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.train.trainer._FLUSH_EVERY", {"cpu": 4})
    x, y = points()
    log, objective = Log(), squares()
    loop = trainer(objective, Rows(x * torch.nan, y, 8), config(steps=9, patience=2), reporters=[log])
    loop.deferred = True
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, in model\.first\.weight"):
        loop.fit()
    assert [r["step"] for r in log] == [1, 2]
    assert loop.step == 4
    assert all(bool(p.isfinite().all()) for p in objective.parameters())


def test_a_finite_step_decided_on_the_device_is_the_same_bit_for_bit() -> None:
    weights = []
    for deferred in (False, True):
        x, y = points()
        objective = squares()
        loop = trainer(objective, Rows(x, y, 8), config(steps=5))
        loop.deferred = deferred
        loop.fit()
        weights.append(objective.model.first.weight.detach())
    assert torch.equal(weights[0], weights[1])


def test_evaluating_more_often_trains_the_same_weights() -> None:
    weights = []
    for every in (1, 2, None):
        toy_data = toy.PointsConfig().open(seed=1)
        torch.manual_seed(5)
        objective = toy.Squares(toy.Net(toy.NetConfig()), toy.SquaresConfig(noise=0.0))
        log = Log()
        trainer(
            objective, toy_data.train, config(eval_every=every), validation=toy_data.validation, reporters=[log]
        ).fit()
        weights.append(objective.model.first.weight.detach())
        assert [r["step"] for r in log if "val_loss" in r] == {1: [1, 2, 3, 4], 2: [2, 4], None: [4]}[every]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_the_average_of_the_weights_is_what_is_evaluated() -> None:
    data = toy.PointsConfig().open(seed=1)
    objective = squares(torch.float32)
    average, log = averaged(objective, 0.99), Log()
    loop = config(eval_batches=6)
    trainer(objective, data.train, loop, validation=data.validation, reporters=[log], ema=average).fit()
    batches = list(data.validation(6))
    assert log[-1]["val_loss"] == pytest.approx(evaluate(average.module, batches)["val_loss"])
    assert log[-1]["val_loss"] != pytest.approx(evaluate(objective, batches)["val_loss"])


def test_a_signal_lets_the_step_under_way_finish() -> None:
    x, y = points()
    rows = Rows(x, y, 8)
    log = Log()
    loop = trainer(squares(), rows, config(), reporters=[log])

    def interrupt(record: Any) -> None:
        if record["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    interrupt.close = lambda: None  # type: ignore[attr-defined]
    loop.reporters.append(interrupt)  # type: ignore[arg-type]
    with Stop() as stop:
        loop.fit(stop)
    assert stop.exit_code == 143
    assert [r["step"] for r in log] == [1, 2]


def test_resumed_state_keeps_settings_that_json_cannot_hold() -> None:
    x, y = points()
    first = trainer(squares(), Rows(x, y, 8), config())
    first.optimizer.param_groups[0]["method"] = torch.float64
    first.fit()
    state = first.state_dict()
    assert "method" not in state["optimizer"]["param_groups"][0]
    second = trainer(squares(), Rows(x, y, 8), config())
    second.optimizer.param_groups[0]["method"] = torch.float32
    second.load_state_dict(state)
    assert second.optimizer.param_groups[0]["method"] is torch.float32
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"steps": None}, ValueError, "a run needs an end"),
        ({"minutes": 0}, ValueError, "minutes must be in"),
        ({"minutes": 1e9}, ValueError, "minutes must be in"),
        ({"threads": 3000}, ValueError, "threads must be an integer"),
        ({"seed": 2**64}, ValueError, "seed must be an integer"),
        ({"accumulate": 1.5}, TypeError, "accumulate must be an integer"),
        ({"seed": -1}, ValueError, "seed must be an integer from 0 to"),
        ({"clip": 0.0}, ValueError, "clip must be in"),
        ({"ema": 1.0}, ValueError, "ema must be in"),
        ({"eval_every": 0}, ValueError, "eval_every must be"),
        ({"precision": "bfloat"}, ValueError, "did you mean 'bfloat16'"),
        ({"device": "gpu"}, ValueError, "device must be one of 'auto', 'cpu', 'cuda'"),
    ],
)
def test_an_impossible_loop_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**changes)
