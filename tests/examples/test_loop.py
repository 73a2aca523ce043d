"""The loop of one file trains what ``danlu train`` trains."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from danlu import train
from danlu.data import TextConfig
from danlu.models import TransformerConfig
from danlu.nn import MLAConfig, MoEConfig
from danlu.objectives import CausalLMConfig
from danlu.optim import MuonConfig, WarmupStableDecay
from danlu.train import RunConfig, TrainConfig

_spec = importlib.util.spec_from_file_location("loop", Path(__file__).parents[2] / "examples" / "loop.py")
assert _spec is not None
assert _spec.loader is not None
loop = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loop)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(300)))
    return RunConfig(
        recipe="small",
        model=TransformerConfig(
            dim=16,
            layers=2,
            hidden=24,
            attention=MLAConfig(num_heads=2, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
            experts=MoEConfig(num_experts=3, top_k=2, hidden=8),
        ),
        objective=CausalLMConfig(),
        data=TextConfig(path=(str(text),), vocab_size=270, length=12, batch=3),
        optim=MuonConfig(lr=0.02),
        schedule=WarmupStableDecay(warmup=2),
        train=TrainConfig(steps=5, accumulate=2, eval_batches=3, precision="float32", threads=1, tensorboard=False),
    )


def test_its_losses_are_those_of_danlu_train_bit_for_bit(config: RunConfig, tmp_path: Path) -> None:
    assert train.train(config, tmp_path / "run", quiet=True) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    *losses, (_, validation) = loop.train(config, steps=5)
    assert losses == [(record["step"], record["loss"]) for record in records]
    assert validation == records[-1]["val_loss"]


def test_a_parameter_without_an_owner_stops_it_by_its_name(config: RunConfig) -> None:
    model = replace(config.model, vocab_size=7).build()
    optimizer = config.optim.build(model)
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(AssertionError, match=r"blocks\.0\."):
        loop.check_ownership(model, optimizer)
