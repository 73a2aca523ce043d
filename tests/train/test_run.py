"""Run folders, and the language model in them."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from danlu.data import TextConfig, load_tokenizer
from danlu.models import TransformerConfig
from danlu.nn import MLAConfig, MoEConfig
from danlu.objectives import CausalLMConfig
from danlu.optim import MuonConfig, WarmupStableDecay
from danlu.train import (
    RunConfig,
    TrainConfig,
    Trainer,
    assemble,
    checkpoint,
    evaluate,
    load,
    read_config,
    resume,
    train,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}, and a half is {n * n / 2}.\n" for n in range(400)))
    return path


def language(text: Path, **loop: Any) -> RunConfig:
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
        optim=MuonConfig(lr=0.01),
        schedule=WarmupStableDecay(warmup=2),
        train=TrainConfig(
            **{"steps": 7, "eval_every": 4, "eval_batches": 3, "precision": "float32", "threads": 1, **loop}
        ),
    )


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANLU_CACHE", str(cache))
        run = tmp_path_factory.mktemp("runs") / "lm"
        assert train(language(text), run, quiet=True) == 0
    return run


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "items_per_second", "mfu")} for line in lines]


def test_a_run_folder_holds_what_later_verbs_need(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.json",
        "history.json",
        "manifest.json",
        "metrics.jsonl",
        "tokenizer.json",
        "checkpoints",
        "tensorboard",
        ".lock",
    }
    log = records(trained)
    assert [r["step"] for r in log] == list(range(1, 8))
    assert [r["step"] for r in log if "val_bpb" in r] == [4, 7]
    assert all({"loss", "items", "max_vio"} <= r.keys() for r in log)
    assert log[-1]["items"] == 7 * 3 * 12


def test_the_language_model_resumes_bit_for_bit(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stops = Trainer._train_step, {2, 5}

    def step(self: Trainer, stop: Any) -> None:
        real(self, stop)
        if self.step in stops:
            stops.remove(self.step)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", step)
    run = tmp_path / "run"
    assert train(language(text), run, quiet=True) == 130
    assert resume(run, quiet=True) == 130
    assert resume(run, quiet=True) == 0
    assert records(run) == records(trained)
    states = [checkpoint.load(folder / "checkpoints" / "step-00000007").state for folder in (run, trained)]
    (a, _), (b, _) = (checkpoint.pack({**state, "seconds": 0}) for state in states)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.endswith("balancer.bias") and bool(a[name].any()) for name in a)


def test_the_model_takes_the_vocabulary_of_the_tokenizer(trained: Path) -> None:
    model, config = load(trained)
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    assert tokenizer.vocab_size == config.model.vocab_size == model.embedding.shape[0] == 270
    assert not model.training
    assert model.compute_dtype is torch.float32


def test_a_loaded_model_is_the_one_that_was_evaluated(trained: Path) -> None:
    last = records(trained)[-1]
    found = evaluate(trained, batches=3)
    assert found == {key: last[key] for key in last if key.startswith("val_")}
    assert set(found) == {"val_loss", "val_bpb", "val_max_vio"}
    assert evaluate(trained).keys() == found.keys()


def test_text_that_was_edited_since_is_refused(trained: Path, text: Path) -> None:
    before = text.read_text()
    try:
        text.write_text(before + "One more line.\n")
        with pytest.raises(ValueError, match=r"have changed: .*SHA-256"):
            evaluate(trained)
    finally:
        text.write_text(before)


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is left as it is; choose another folder, or: danlu resume"):
        train(toy.run_config(), tmp_path)
    with pytest.raises(FileExistsError, match="exists and is left as it is"):
        train(toy.run_config(), tmp_path / "precious")
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_run_may_use_an_empty_folder_and_says_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy.run_config(steps=2), tmp_path) == 0
    said = capsys.readouterr().out
    assert "Model: 66 parameters." in said
    assert "step 2/2: loss" in said
    assert f"Trained 2 steps in 0 s; the run is in {tmp_path}" in said
    assert read_config(tmp_path) == toy.run_config(steps=2)


def test_an_interrupted_run_says_how_to_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.SIGNALS[4] = signal.SIGINT
    assert train(toy.run_config(), tmp_path) == 130
    said = capsys.readouterr().out
    assert f"Stopped after step 4; everything is saved. Continue with: danlu resume {tmp_path}" in said


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(toy.run_config(seed=seed), tmp_path / name, quiet=True)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert records(tmp_path / "a")[0]["loss"] != records(tmp_path / "c")[0]["loss"]


def test_an_objective_takes_what_it_needs_from_the_data() -> None:
    assert assemble(toy.run_config()).objective.scale == 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberConfig:
    def build(self, **others: Any) -> int:
        return 3


def test_a_model_that_is_no_module_is_rejected_by_its_configuration_s_name() -> None:
    with pytest.raises(TypeError, match=r"model: NumberConfig\.build\(\) must return a torch\.nn\.Module, got int"):
        assemble(dataclasses.replace(toy.run_config(), model=NumberConfig()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrokenConfig:
    def build(self, model: Any, **others: Any) -> Any:
        raise ValueError("this optimizer is broken")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnreadConfig:
    def open(self, **others: Any) -> Any:
        raise AssertionError("the data were opened")


def test_what_is_wrong_with_the_optimizer_is_said_before_the_data_are_opened(tmp_path: Path) -> None:
    config = dataclasses.replace(toy.run_config(), optim=BrokenConfig(), data=UnreadConfig())
    with pytest.raises(ValueError, match="this optimizer is broken"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_cannot_be_loaded(tmp_path: Path) -> None:
    train(toy.run_config(steps=2), tmp_path / "run", quiet=True)
    for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints"):
        shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint yet"):
        load(tmp_path / "run")
