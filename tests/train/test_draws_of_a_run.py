"""What a run draws does not depend on how its batches are divided: micro-batches, processes, or where it is resumed."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.config import Pretrained
from danlu.data.loader import validation_batches
from danlu.models import MAEConfig, Transformer, TransformerConfig, UNetConfig
from danlu.nn import GQAConfig
from danlu.objectives import (
    CausalLM,
    CausalLMConfig,
    Denoising,
    DenoisingConfig,
    FlowMatching,
    MaskedImage,
    MaskedImageConfig,
    MaskedLM,
    MaskedLMConfig,
    MeanFlow,
    MeanFlowConfig,
    ScoreMatching,
    ScoreMatchingConfig,
    SiD,
    SiDConfig,
)
from danlu.optim import AdamWConfig, Constant
from danlu.protocols import Batch
from danlu.recipes import load
from danlu.train import TrainConfig, Trainer
from danlu.train.device import choose
from danlu.train.parallel import ParallelConfig, parallelize

SIZE = 8


def language_model(mask: str) -> Transformer:
    attention = GQAConfig(num_heads=2, mask=mask)
    return Transformer(TransformerConfig(vocab_size=31, dim=16, layers=1, hidden=24, attention=attention))


def unet(**options: Any) -> Any:
    return UNetConfig(image_size=SIZE, num_classes=3, widths=(8, 8), blocks=(1, 1), **options).build()


def sid() -> SiD:
    edm = SiDConfig(teacher=Pretrained(run="unused")).denoising
    return SiD(unet(), SiDConfig(teacher=Pretrained(run="unused")), teacher=Denoising(unet(), edm))


MAKE = {
    "masked tokens": lambda: MaskedLM(language_model("bidirectional")),
    "masked tokens of which some are dropped": lambda: MaskedLM(
        language_model("bidirectional"), MaskedLMConfig(drop_tokens=0.5)
    ),
    "dropped tokens": lambda: CausalLM(language_model("causal"), CausalLMConfig(drop_tokens=0.5)),
    "denoising": lambda: Denoising(unet(), DenoisingConfig(label_dropout=0.5)),
    "flow matching": lambda: FlowMatching(unet()),
    "mean flow": lambda: MeanFlow(unet(two_times=True), MeanFlowConfig(share=0.3, power=0.0)),
    "score matching": lambda: ScoreMatching(unet(), ScoreMatchingConfig(loss="sliced")),
    "masked patches": lambda: MaskedImage(
        MAEConfig(image_size=SIZE, patch=4, dim=16, layers=1, num_heads=2, decoder_dim=8, decoder_num_heads=1).build(),
        MaskedImageConfig(mask=0.5),
    ),
    "distillation": sid,
}


def examples(name: str, numbers: range) -> Batch:
    def row(number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        if "tokens" in name:
            stream = torch.randint(31, (20,), generator=generator)
            return {"tokens": stream[:-1], "targets": stream[1:]}
        image = torch.rand(1, SIZE, SIZE, generator=generator) * 2 - 1
        return {"images": image, "labels": torch.randint(3, (), generator=generator)}

    rows = [row(number) for number in numbers]
    return {key: torch.stack([one[key] for one in rows]) for key in rows[0]}


class Stream:
    """A loader as the data have them: of ``batch`` examples a step each process takes a part."""

    def __init__(self, name: str, batch: int, rank: int, world: int) -> None:
        self.name, self.batch, self.rank, self.world, self.position = name, batch, rank, world, 0

    def __next__(self) -> Batch:
        share = self.batch // self.world
        first = self.position + self.rank * share
        self.position += self.batch
        return examples(self.name, range(first, first + share))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def trainer(name: str, *, batch: int, accumulate: int = 1, rank: int = 0, world: int = 1, **loop: Any) -> Trainer:
    torch.manual_seed(0)
    objective = MAKE[name]()
    for parameter in objective.parameters():  # zeros at the start would hide what is drawn
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    policy = choose("float32", device="cpu", threads=1)
    mesh = parallelize(objective, ParallelConfig(), policy)
    torch.manual_seed(10 + rank)  # as in a run: what is not a function of the position is another on each process

    def validation(batches: int | None) -> Any:
        return [examples(name, range(100 + 6 * k + rank, 106 + 6 * k, world)) for k in range(batches or 2)]

    options = {"steps": 2, "eval_every": 2, "log_every": 1, "precision": "float32", "device": "cpu", **loop}
    return Trainer(
        objective,
        AdamWConfig(lr=1e-3).build(objective),
        Constant(warmup=1),
        Stream(name, batch, rank, world),
        TrainConfig(**{"accumulate": accumulate, "threads": 1, "checkpoint_every": None, "seed": 5, **options}),
        policy=policy,
        validation=validation,
        mesh=mesh,
    )


def records(run: Trainer) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    run.reporters = [lambda record: found.append(dict(record))]
    run.fit()
    kept = ("loss", "grad_norm", "val_loss", "val_accuracy")
    return [{key: record[key] for key in kept if key in record} for record in found]


@pytest.mark.parametrize("name", ["masked tokens of which some are dropped", "mean flow", "masked patches"])
def test_two_micro_batches_are_one_batch_of_twice_the_size(name: str) -> None:
    whole, halves = records(trainer(name, batch=8)), records(trainer(name, batch=4, accumulate=2))
    assert len(whole) == 2
    for one, other in zip(whole, halves, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    other_seed = records(trainer(name, batch=8, seed=6, steps=1))
    assert whole[0]["loss"] != pytest.approx(other_seed[0]["loss"], rel=1e-4)


def _alone(rank: int, world: int) -> dict[str, Any]:
    return {name: records(trainer(name, batch=8, rank=rank, world=world)) for name in MAKE}


def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / f"{rank}.json")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    together = json.loads((tmp_path / "0.json").read_text())
    for name, found in _alone(0, 1).items():
        assert len(found) == len(together[name]) == 2
        assert "val_loss" in found[-1]
        for one, other in zip(found, together[name], strict=True):
            assert one == pytest.approx(other, rel=1e-6), name


@pytest.mark.parametrize("name", ["masked tokens", "mean flow"])
def test_a_resumed_run_draws_on_bit_by_bit(name: str) -> None:
    whole = trainer(name, batch=4)
    first = trainer(name, batch=4)
    for run, steps in ((whole, 3), (first, 2)):
        for _ in range(steps):
            run._train_step(_Never())
    again = trainer(name, batch=4)
    again.load_state_dict(first.state_dict())
    again._train_step(_Never())
    for one, other in zip(whole.objective.parameters(), again.objective.parameters(), strict=True):
        assert torch.equal(one, other)


class _Never:
    signal = None


@pytest.mark.parametrize(("share", "rows"), [(0.25, 1), (0.3, 2), (0.1, 7), (0.75, 32)])
def test_mean_flow_learns_large_steps_on_its_share_of_the_images_whatever_the_batch(share: float, rows: int) -> None:
    objective = MeanFlow(unet(two_times=True), MeanFlowConfig(share=share))
    images, chosen, first = torch.zeros(rows, 1, 2, 2), 0, 2**61 + 12345
    steps = -(-400 // rows)
    for step in range(steps):
        most = -(-rows * objective._share[0] // objective._share[1])
        keys = first + step * rows + torch.arange(rows)
        draw = objective._draw({"images": images}, keys, objective._share, most=most)
        chosen += int((draw.r != draw.t).sum())
    assert abs(chosen - share * steps * rows) < 1


def test_validation_is_numbered_as_the_windows_of_the_text_are() -> None:
    tokens = torch.arange(200).numpy()
    for world in (1, 2):
        for rank in range(world):
            batches = list(validation_batches(tokens, end=0, length=5, batch=4, rank=rank, world=world))
            firsts = torch.cat([batch["targets"][:, 0] for batch in batches])
            assert firsts.tolist() == [5 * window for window in range(rank, 40, world)]


def test_captions_are_measured_by_the_words_and_patches_of_all_processes() -> None:
    pytest.importorskip("sklearn")
    recipe = load("digits-caption")
    config = replace(recipe.data, batch=8, validation_examples=21)
    torch.manual_seed(0)
    objective = recipe.objective.build(recipe.model.build(), data=config.open())
    objective.eval()

    def measured(world: int) -> dict[str, float | None]:
        with torch.no_grad():
            parts = [objective.evaluate(config.open(rank=rank, world=world).validation()) for rank in range(world)]
        sums = {
            name: replace(
                parts[0][name],
                total=sum(part[name].total for part in parts),
                denominator=sum(part[name].denominator for part in parts),
            )
            for name in parts[0]
        }
        return {name: measure.value() for name, measure in sums.items()}

    assert measured(1)["val_loss"] == pytest.approx(measured(2)["val_loss"], rel=1e-6)
    assert measured(1) == pytest.approx(measured(4), rel=1e-6)


if __name__ == "__main__":
    from danlu.train.distributed import init_distributed

    with init_distributed("cpu") as place:
        answers = _alone(place.rank, place.size)
    Path(sys.argv[1]).write_text(json.dumps(answers))
