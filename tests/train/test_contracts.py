"""What is wrong with somebody's own component is one sentence that names it, before anything is written."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from danlu.train import train


class Bare(nn.Module):
    """An objective that knows its loss and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return self.model(batch["x"]).sum()


class Vector(toy.Squares):
    def forward(self, batch: Any) -> Any:
        return self.model(batch["x"])


class Counting(toy.Squares):
    def denominator(self, batch: Any) -> Any:
        return len(batch["x"])


class Shadowing(toy.Squares):
    def metrics(self) -> Any:
        return {"loss": 0.0}


class Floats(toy.Squares):
    def evaluate(self, batches: Any) -> Any:
        return {"val_loss": 0.5}


class Detached(toy.Squares):
    def forward(self, batch: Any) -> Any:
        return super().forward(batch).detach()


@dataclass(frozen=True, kw_only=True)
class OwnObjectiveConfig:
    kind: Any

    def build(self, model: Any, **others: Any) -> Any:
        return self.kind(model, toy.SquaresConfig()) if issubclass(self.kind, toy.Squares) else self.kind(model)


class Wordless:
    manifest: dict[str, Any] = {}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class OwnDataConfig:
    found: Any

    def open(self, **others: Any) -> Any:
        return self.found


@dataclass(frozen=True, kw_only=True)
class OwnOptimizerConfig:
    share: int

    def build(self, model: Any, **others: Any) -> Any:
        if not self.share:
            return [torch.optim.SGD(model.parameters(), lr=0.1)]
        return torch.optim.SGD(list(model.parameters())[: self.share], lr=0.1)


def objective(kind: Any) -> dict[str, Any]:
    return {"objective": OwnObjectiveConfig(kind=kind)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (objective(Bare), "made a Bare, which lacks unit, labels, denominator, metrics, evaluate"),
        (objective(Vector), r"Vector must return its loss as .* without dimensions, got float32 of shape \(1, 3\)"),
        (objective(Counting), r"Counting\.denominator must return a tensor without dimensions, got 1 \(int\)"),
        (objective(Detached), "the loss of Detached depends on no parameter"),
        (objective(Shadowing), r"Shadowing\.metrics must leave these names to the loop: loss"),
        (objective(Floats), r"Floats\.evaluate must return danlu\.protocols\.Measure objects by name"),
        ({"data": OwnDataConfig(found=None)}, "made a NoneType, which lacks train, manifest, sizes, validation"),
        ({"data": OwnDataConfig(found=Wordless())}, "made a Wordless, which lacks train, sizes, validation"),
        ({"optim": OwnOptimizerConfig(share=0)}, "must return one torch.optim.Optimizer, got list"),
        ({"optim": OwnOptimizerConfig(share=3)}, "no group holds the parameter model.second.bias"),
    ],
)
def test_a_component_that_does_not_fit_is_named_with_what_it_lacks(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danlu.config.to_document", lambda config: {})
    monkeypatch.setattr("danlu.config.dumps", lambda config: "{}")
    monkeypatch.setattr("danlu.config.flatten", lambda config: {})
    with pytest.raises((TypeError, ValueError), match=message):
        train(replace(toy.run_config(steps=2, eval_every=1), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists() or changes["objective"].kind in (Floats, Shadowing)


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tmp_path: Path) -> None:
    def fail(self: Any, stop: Any) -> None:
        raise ValueError("no step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("danlu.train.trainer.Trainer._train_step", fail)
        with pytest.raises(ValueError, match="no step"):
            train(toy.run_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(toy.run_config(steps=2), tmp_path / "run") == 0


def test_a_run_that_fails_after_a_step_keeps_its_folder_though_nothing_was_logged(tmp_path: Path) -> None:
    from danlu.train import Trainer

    real = Trainer._train_step

    def fail(self: Any, stop: Any) -> None:
        if self.step == 2:
            raise ValueError("no third step")
        real(self, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", fail)
        with pytest.raises(ValueError, match="no third step"):
            train(toy.run_config(log_every=100, checkpoint_every=None, eval_every=None), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").is_file()
