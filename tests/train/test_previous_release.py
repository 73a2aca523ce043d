"""A run that release 0.1 began and kept under its old names goes on in this one as it would have there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import toy

from danlu import config as configs
from danlu.cli import main
from danlu.train import checkpoint

HERE = Path(__file__).parents[1] / "data" / "run-0.1"
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old run, after 4 of 8 steps: latent attention, experts, Muon; its data have a relative path."""
    shutil.copytree(HERE, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "place" / "run"


def test_it_resumes_with_the_losses_that_the_old_release_would_have_had(run: Path) -> None:
    assert main(["resume", str(run)]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {str(record["step"]): record["loss"] for record in records}
    assert list(losses) == [str(step) for step in range(1, 9)]
    same = (torch.__version__, torch.backends.cpu.get_cpu_capability()) == (EXPECTED["torch"], EXPECTED["capability"])
    for step, loss in EXPECTED["losses"].items():
        # Kernels of other processors sum in another order.
        assert losses[step] == (loss if same else pytest.approx(loss, rel=1e-5))
    assert records[-1]["val_loss"] == pytest.approx(EXPECTED["val_loss"], rel=1e-5)


def test_it_is_sampled_evaluated_and_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["sample", str(run), "--tokens", "5"], ["eval", str(run)], ["report", str(run)]):
        assert main(words) == 0, capsys.readouterr().err
    assert (run / "report.html").is_file()


def test_its_configuration_is_one_of_today_s_and_says_so_when_it_is_written(run: Path) -> None:
    from danlu.train import RunConfig

    old = (run / "config.json").read_text()
    config = configs.loads(RunConfig, old)
    assert "format" not in json.loads(old)
    assert '"heads"' in old
    document = json.loads(configs.dumps(config))
    assert document["format"] == configs.FORMAT
    assert document["model"]["attention"]["num_heads"] == 2
    assert document["model"]["experts"]["top_k"] == 2
    saved = toy.newest(run)
    assert configs.differences(config, checkpoint.load(saved).config) == []
