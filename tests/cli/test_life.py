"""A run's life from the command line: checkpoints by name, other data, more steps, branches, restarts, divergence."""

import json
import shutil
from pathlib import Path

import pytest

from danlu.cli import main
from danlu.train import checkpoint
from danlu.train.load import checkpoint_steps

SMALL = [
    "--data.vocab_size=300",
    "--data.length=32",
    "--data.batch=2",
    "--model.dim=32",
    "--model.layers=1",
    "--model.hidden=48",
    "--model.attention.num_heads=2",
    "--train.steps=6",
    "--train.keep=9",
    "--train.eval_every=2",
    "--train.eval_batches=2",
    "--train.checkpoint_every=2",
    "--train.precision=float32",
    "--train.threads=1",
    "--train.tensorboard=false",
    "--schedule.warmup=1",
    "--schedule.decay=2",
]


def lines(n: int) -> str:
    return "".join(f"line {i} of the text, and {i * i % 97} more\n" for i in range(n))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with notes/ and a finished run in runs/a that was made of them."""
    project = tmp_path_factory.mktemp("there") / "project"
    (project / "notes").mkdir(parents=True)
    (project / "notes" / "text.txt").write_text(lines(400))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANLU_CACHE", str(project.parent / "cache"))
        patch.chdir(project)
        assert main(["train", "lm-dense", "--data.path", "notes/", "--out", "runs/a", *SMALL]) == 0
    return project


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.cli.finish._SAMPLE_TOKENS", 9)


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project at another place, which is the current folder; nothing is left at the first one."""
    moved = Path(shutil.copytree(made, tmp_path / "moved"))
    hidden = made.rename(made.with_name("gone"))
    monkeypatch.setenv("DANLU_CACHE", str(made.parent / "cache"))
    monkeypatch.chdir(moved)
    yield moved
    hidden.rename(made)


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, float]:
    capsys.readouterr()
    assert main(["eval", *words, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_checkpoints_are_measured_and_sampled_by_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [measured(capsys, f"runs/a@{at}")["val_loss"] for at in ("2", "6", "best", "last")]
    assert losses[0] > losses[1] == losses[2] == losses[3]
    assert main(["sample", "runs/a@2", "--tokens", "5"]) == 0
    for command in (["sample"], ["eval"], ["resume"], ["branch", "--out", "x"]):
        assert main([command[0], "runs/a@3", *command[1:]]) == 2
        error = capsys.readouterr().err
        assert "runs/a has no checkpoint of step 3: it has those of steps 2, 4 and 6" in error
        assert error.count("\n") == 1
    assert main(["report", "runs/a@2"]) == 0


def test_a_run_and_its_data_moved_together_are_found_from_any_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert measured(capsys, "moved/runs/a")["val_loss"] > 0
    shutil.rmtree(project / "runs" / "a" / "checkpoints" / "step-00000006")
    assert main(["resume", "moved/runs/a"]) == 0


def test_data_that_moved_alone_are_accepted_by_their_content(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = measured(capsys, "runs/a")
    (project / "notes").rename(project / "elsewhere")
    assert main(["eval", "runs/a"]) == 2
    assert "no file or folder is called" in capsys.readouterr().err
    assert measured(capsys, "runs/a", "--data", "elsewhere")["val_loss"] == expected["val_loss"]
    (project / "other.txt").write_text(lines(300))
    assert main(["resume", "runs/a", "--steps", "8", "--data", "other.txt"]) == 2
    error = capsys.readouterr().err
    assert "have changed" in error
    assert "other.txt has" in error
    assert main(["resume", "runs/a", "--steps", "8", "--data", "elsewhere"]) == 0
    assert main(["resume", "runs/a"]) == 0, "the new place is remembered"
    assert "complete: all 8 steps" in capsys.readouterr().out
    assert measured(capsys, "runs/a")["val_loss"] != expected["val_loss"]


def test_other_data_are_measured_by_the_run_s_own_tokenizer(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "other.txt").write_text("quite another text about foxes and dogs\n" * 100)
    own, other = measured(capsys, "runs/a"), measured(capsys, "runs/a", "--data", "other.txt")
    assert other["val_bpb"] > own["val_bpb"]
    assert other["data"].endswith("other.txt")
    assert main(["eval", "runs/a", "--data", "other.txt"]) == 0
    assert f"val_bpb {other['val_bpb']:.6g}" in capsys.readouterr().out


def test_a_finished_run_is_prolonged_and_branched(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["branch", "runs/a@4", "--out", "runs/b", "--steps", "3"]) == 0
    assert checkpoint_steps(project / "runs" / "b") == [4, 6, 7]
    assert (project / "runs" / "b" / "samples.txt").is_file()
    capsys.readouterr()
    assert main(["resume", "runs/a", "--train.steps", "9"]) == 0
    assert "Going on from step 4 to 9 steps." in capsys.readouterr().out
    assert (project / "runs" / "a" / "samples.txt").read_text() != (
        project / "runs" / "a" / "earlier" / "1" / "samples.txt"
    ).read_text()
    assert main(["resume", "runs/a", "--model.dim", "64", "--optim.lr", "1"]) == 2
    assert "keeps model.dim, optim.lr: another value would change its numbers" in capsys.readouterr().err
    assert main(["sample", "runs/a/earlier/1@6", "--tokens", "3"]) == 0


def test_a_run_on_other_data_begins_with_the_weights_and_the_tokenizer_of_another(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "other.txt").write_text(lines(300)[::-1])
    words = ["train", "lm-dense", "--data", "other.txt", "--init", "runs/a@best", *SMALL, "--train.steps=3"]
    assert main([*words, "--out", "runs/c"]) == 0
    then, now = (project / "runs" / name / "tokenizer.json" for name in "ac")
    assert then.read_bytes() == now.read_bytes()
    shutil.rmtree(project / "runs" / "a")
    (project / "runs" / "c").rename(project / "c")
    assert main(["resume", "c", "--steps", "4"]) == 0
    capsys.readouterr()
    assert (
        main(["train", "lm-dense", "--data", "other.txt", "--init", "c", "--out", "d", *SMALL, "--model.dim=16"]) == 2
    )
    error = capsys.readouterr().err
    assert "do not fit" in error
    assert "dim: 16 and 32" in error
    other = ["--data.tokenizer", "own.json"]
    from danlu.data import train_tokenizer

    train_tokenizer([lines(9)], vocab_size=300).save(project / "own.json")
    assert main(["train", "lm-dense", "--data", "other.txt", "--init", "c", "--out", "d", *SMALL, *other]) == 2
    assert "encoded by another tokenizer than that of c" in capsys.readouterr().err
    assert not (project / "d").exists()


def test_the_same_line_starts_continues_and_ends(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "lm-dense", "--data", "notes", *SMALL, "--resume"]
    assert main([*words, "--out", "d"]) == 0
    shutil.rmtree(project / "d" / "checkpoints" / "step-00000006")
    capsys.readouterr()
    assert main([*words, "--out", "d"]) == 0
    assert "Resuming d from step 4." in capsys.readouterr().out
    assert main([*words, "--out", "d"]) == 0
    assert "d is complete: all 6 steps are trained." in capsys.readouterr().out
    assert main([*words, "--out", "d", "--train.seed", "1"]) == 2
    assert "train.seed: 1 and 0" in capsys.readouterr().err
    assert main(words) == 2
    assert "--resume needs --out" in capsys.readouterr().err


def test_a_tokenizer_that_is_missing_is_written_again(project: Path) -> None:
    run = project / "runs" / "a"
    before = (run / "tokenizer.json").read_bytes()
    (run / "tokenizer.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert main(["resume", "runs/a"]) == 0
    assert (run / "tokenizer.json").read_bytes() == before


def test_metrics_with_damaged_bytes_do_not_keep_a_run_from_being_resumed(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = project / "runs" / "a"
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"step": 5}\n')
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert main(["resume", "runs/a"]) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.load(run / "checkpoints" / "step-00000006").step == 6


@pytest.mark.parametrize("patience", [2, 50])
def test_a_run_that_diverges_ends_with_a_sentence_its_report_and_its_last_good_samples(
    project: Path, patience: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from danlu.train import Trainer

    real = Trainer._apply

    def step(self: Trainer, elapsed: float) -> tuple:
        found = real(self, elapsed)
        if self.step == 2:  # the third step
            next(self.objective.parameters()).data.fill_(float("inf"))
        return found

    monkeypatch.setattr(Trainer, "_apply", step)
    words = ["train", "lm-dense", "--data", "notes", "--out", "d", *SMALL, f"--train.patience={patience}"]
    assert main([*words, "--train.checkpoint_every=2"]) == 1
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("danlu: the run has diverged: after step 4 model." if patience > 2 else "danlu: ")
    assert "Samples of step 2, the last whose weights are finite:" in said.out
    assert checkpoint_steps(project / "d") == [2]
    assert (project / "d" / "report.html").is_file()
    assert "--- sample 3 of 3" in (project / "d" / "samples.txt").read_text()


def test_weights_that_are_not_finite_are_answered_with_the_last_that_are(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As earlier releases saved them."""
    from danlu.train import Trainer

    real = Trainer._apply
    monkeypatch.setattr("danlu.train.trainer.check_finite", lambda *_: None)

    def step(self: Trainer, elapsed: float) -> tuple:
        found = real(self, elapsed)
        if self.step == 2:
            next(self.objective.parameters()).data.fill_(float("nan"))
        return found

    monkeypatch.setattr(Trainer, "_apply", step)
    assert main(["train", "lm-dense", "--data", "notes", "--out", "d", *SMALL]) == 0
    for command in (["sample", "d"], ["eval", "d"], ["train", "lm-dense", "--data", "notes", "--init", "d", *SMALL]):
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr()
        assert "diverged" in said.err.splitlines()[-1]
        assert "unexpected" not in said.err
    assert main(["sample", "d"]) == 2
    assert "take d@2" in capsys.readouterr().err
