"""A task small enough to train in a test: a two-layer network that draws random numbers from every generator.

Run as a script it trains or resumes a run folder, so that tests can kill it or start it twice:
``python toy.py train|resume FOLDER [--steps N] [--kill-in-save K]``.
"""

import argparse
import os
import random
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danlu.optim import AdamWConfig, MuonConfig, WarmupStableDecay
from danlu.protocols import Batch, Measure
from danlu.train import RunConfig, TrainConfig, checkpoint, resume, train

# Signals to send to this process when the batch of a step is drawn, or an evaluation begins: {step: signal}.
SIGNALS: dict[int, int] = {}
EVALUATION_SIGNALS: list[int] = []


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    width: int = 7
    dropout: float = 0.25

    def build(self, **others: Any) -> "Net":
        return Net(self)


class Net(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.first = nn.Linear(5, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.second = nn.Linear(config.width, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.dropout_rate = config.dropout

    def forward(self, x_bi: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.second(self.dropout(torch.tanh(self.first(x_bi))))


@dataclass(frozen=True, kw_only=True)
class SquaresConfig:
    noise: float = 0.1

    def build(self, model: Net, *, data: "Opened | None" = None, **others: Any) -> "Squares":
        return Squares(model, self, scale=1.0 if data is None else data.scale)


class Squares(nn.Module):
    """Squared errors of the units that have a target (a NaN marks those that have none)."""

    unit = "targets"
    labels = {"calls": "calls"}  # noqa: RUF012

    def __init__(self, model: Net, config: SquaresConfig, *, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.config, self.scale = model, config, scale

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        jitter = self.config.noise * (random.random() + np.random.rand()) if self.training else 0.0  # noqa: NPY002
        error = self.scale * (self.model(batch["x"]) + jitter) - batch["y"].nan_to_num()
        return error[~batch["y"].isnan()].square().sum()

    def denominator(self, batch: dict[str, Tensor]) -> Tensor:
        return (~batch["y"].isnan()).sum()

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Measure]:
        total, targets = torch.zeros(2, dtype=torch.float64).unbind()
        for batch in batches:
            torch.rand(3), random.random()
            total += self(batch)
            targets += self.denominator(batch)
        return {"val_loss": Measure(total, targets)}

    def metrics(self) -> dict[str, float]:
        return {"calls": float(self.model.calls)}


@dataclass(frozen=True, kw_only=True)
class PointsConfig:
    batch: int = 4
    version: int = 0

    def open(self, *, seed: int, rank: int = 0, world: int = 1, **others: Any) -> "Opened":
        return Opened(Points(self, seed, rank, world), {"source": "points", "sha256": f"{self.version:064d}"})


class Points:
    """Batches drawn by position; every row lacks a different number of targets."""

    def __init__(self, config: PointsConfig, seed: int, rank: int, world: int) -> None:
        self.batch, self.seed, self.rank, self.world = config.batch, seed, rank, world
        self.position = 0

    def at(self, position: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + position)
        x = torch.randn(self.batch, 5, generator=generator)
        y = torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2].abs()], 1)
        y[torch.rand(y.shape, generator=generator) < 0.4] = torch.nan
        y[:, 0] = x.sum(1)
        share = self.batch // self.world
        rows = slice(self.rank * share, (self.rank + 1) * share)
        return {"x": x[rows], "y": y[rows]}

    def __next__(self) -> dict[str, Tensor]:
        self.position += 1
        if self.position in SIGNALS:
            signal.raise_signal(SIGNALS.pop(self.position))
        return self.at(self.position)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@dataclass(frozen=True)
class Opened:
    train: Points
    manifest: dict[str, Any]
    scale: float = 0.5
    sizes: dict[str, int] = field(default_factory=dict)

    def validation(self, batches: int | None = None) -> Iterator[dict[str, Tensor]]:
        for index in range(batches or 6):
            if index == 1 and EVALUATION_SIGNALS:
                signal.raise_signal(EVALUATION_SIGNALS.pop())
            yield self.train.at(-1 - index)


def run_config(*, muon: bool = True, dropout: float = 0.25, noise: float = 0.1, **loop: Any) -> RunConfig:
    defaults = {"steps": 11, "eval_every": 3, "eval_batches": 2, "checkpoint_every": 4, "precision": "float32"}
    return RunConfig(
        recipe="toy",
        model=NetConfig(dropout=dropout),
        objective=SquaresConfig(noise=noise),
        data=PointsConfig(),
        optim=MuonConfig(lr=0.02) if muon else AdamWConfig(lr=0.02),
        schedule=WarmupStableDecay(warmup=2),
        train=TrainConfig(**{**defaults, "device": "cpu", "threads": 1, "tensorboard": False, **loop}),
    )


def plain_config(**loop: Any) -> RunConfig:
    """A run in which nothing is drawn, so that several processes can do what one does."""
    return run_config(dropout=0.0, noise=0.0, **loop)


def newest(run: Path) -> Path:
    """The last complete checkpoint of a run."""
    return checkpoint.checkpoints(run / "checkpoints")[-1]


def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("train", "resume"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="float64, neither dropout nor noise")
    parser.add_argument("--interrupt-at", type=int, default=0, help="SIGTERM to this process in the K-th step")
    parser.add_argument("--kill-in-save", type=int, default=0, help="SIGKILL this process in its K-th save")
    parser.add_argument("--async-save", action="store_true", help="save in the background")
    words = parser.parse_args()
    if words.kill_in_save:
        saves = 0
        real = os.rename

        def rename(source: Any, target: Any) -> None:
            nonlocal saves
            saves += 1
            if saves == words.kill_in_save:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.rename = rename
    if words.interrupt_at:
        SIGNALS[words.interrupt_at] = signal.SIGTERM
    if words.plain:
        torch.set_default_dtype(torch.float64)
    if words.verb == "resume":
        return resume(words.folder, quiet=True)
    config = plain_config if words.plain else run_config
    loop = {"steps": words.steps, "accumulate": words.accumulate, "async_save": words.async_save}
    return train(config(**loop), words.folder, quiet=True)


if __name__ == "__main__":
    sys.modules["toy"] = sys.modules["__main__"]  # configurations name the module their classes are in
    for kind in (NetConfig, Net, SquaresConfig, Squares, PointsConfig):
        kind.__module__ = "toy"
    sys.exit(_main())
