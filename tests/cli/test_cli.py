"""The command line as a person meets it: what it answers, in how many lines, and with which exit code."""

import itertools
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from danlu.cli import common, main
from danlu.cli.overrides import apply, change, values
from danlu.cli.parser import COMMANDS, parse
from danlu.config import Draft
from danlu.data import TextConfig
from danlu.recipes import load


@dataclass(frozen=True, kw_only=True)
class Latent:
    heads: int = 4
    kv_rank: int = 64

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads must be an integer of at least 1, got {self.heads}")


@dataclass(frozen=True, kw_only=True)
class Grouped:
    heads: int = 4
    groups: int | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    dim: int = 256
    attention: Grouped | Latent = field(default_factory=Grouped)
    experts: Latent | None = None
    tied: bool = True
    activation: Literal["silu", "gelu"] = "silu"


@dataclass(frozen=True, kw_only=True)
class Data:
    path: tuple[str, ...] | None = None
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Run:
    recipe: str
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    lr: float = 0.02


RECIPE = Run(recipe="tiny", model=Model(dim=99, attention=Latent(heads=2, kv_rank=7)))


def test_an_option_set_by_its_path_leaves_the_recipes_other_values_alone() -> None:
    changed = apply(RECIPE, ["--model.attention.kv_rank", "3", "--lr", "1e-3"])
    assert changed == Run(recipe="tiny", model=Model(dim=99, attention=Latent(heads=2, kv_rank=3)), lr=1e-3)


def test_one_of_several_sections_is_reached_by_its_number() -> None:
    config = load("lm-hybrid")
    first, *others = apply(config, ["--model.mixers.0.kernel.state", "16"]).model.mixers
    assert first.kernel.state == 16
    assert others == list(config.model.mixers[1:])
    assert apply(config, ["--model.mixers", "none"]).model.mixers == (None,)
    kinds = [type(mixer).__name__ for mixer in apply(config, ["--model.mixers", "gqa,none,ssm"]).model.mixers]
    assert kinds == ["GQAConfig", "NoneType", "SSMConfig"]


def test_no_overrides_change_nothing() -> None:
    assert apply(RECIPE, []) == RECIPE


def test_hyphens_equal_signs_lists_and_truth_values_are_understood() -> None:
    words = [
        "--model.attention.kv-rank=3",
        "--data.path",
        "a.txt",
        "b",
        "--model.tied",
        "False",
        "--data.betas",
        "0",
        "1",
    ]
    changed = apply(RECIPE, words)
    assert changed.model.attention == Latent(heads=2, kv_rank=3)
    assert changed.data == Data(path=("a.txt", "b"), betas=(0.0, 1.0))
    assert changed.model.tied is False


def test_every_leaf_can_be_set_to_the_value_it_has() -> None:
    for path, value in values(RECIPE):
        words = [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
        assert apply(RECIPE, [f"--{path}", *words]) == RECIPE


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model.dmi", "3"], ["--model.dmi", "did you mean --model.dim?"]),
        (["--kv_rank", "3"], ["did you mean --model.attention.kv_rank?"]),
        (["--zzzzzz", "3"], ["no option --zzzzzz", "danlu show"]),
        (["--model.attention", "x"], ["--model.attention must be grouped|latent, got 'x'"]),
        (["--model.attention", "latnet"], ["did you mean 'latent'?"]),
        (["--model.attention.groups", "2"], ["model.attention is latent here", "--model.attention grouped"]),
        (["--model.experts.heads", "3"], ["there is no model.experts here", "--model.experts latent"]),
        (["--model", "x"], ["--model is a section", "--model.dim"]),
        (["--model.dim", "many"], ["--model.dim must be int, got 'many'"]),
        (["--model.dim", "3", "4"], ["'4' belongs to no option"]),
        (["--model.activation", "gelo"], ["'gelo'", "silu|gelu", "did you mean 'gelu'?"]),
        (["--model.tied", "perhaps"], ["true|false"]),
        (["--data.betas", "1"], ["--data.betas", "2 values"]),
        (["--data.betas", "nan,1"], ["must be float"]),
        (["--lr"], ["--lr", "1 value"]),
        (["--epochs", "3"], ["no epochs", "--train.steps"]),
        (["stray"], ["'stray' belongs to no option"]),
        (["--model.attention.heads", "0"], ["model.attention: heads must be an integer of at least 1, got 0"]),
        (["--recipe", "other"], ["no option --recipe"]),
    ],
)
def test_what_cannot_be_set_is_rejected_in_one_line_that_helps(
    words: list[str], parts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        apply(RECIPE, words, fixed=["recipe"])
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert "--" * 2 not in message
    assert capfd.readouterr() == ("", "")


def test_train_takes_its_recipe_first_and_keeps_the_rest_for_the_configuration() -> None:
    arguments = parse(["train", "--train.steps", "300", "--data", "a.txt", "b.txt", "--data", "c", "--out", "x"])
    assert arguments.recipe is None
    assert arguments.data == ["a.txt", "b.txt", "c"]
    assert arguments.out == "x"
    assert arguments.overrides == ["--train.steps", "300"]


@pytest.mark.parametrize(
    "words",
    [
        ["lm-dense", "--out", "o", "--train.steps", "3"],
        ["--out", "o", "lm-dense", "--train.steps", "3"],
        ["--train.steps", "3", "lm-dense", "--out=o"],
        ["--out", "o", "--train.steps=3", "lm-dense"],
    ],
)
def test_the_recipe_may_stand_anywhere(words: list[str]) -> None:
    arguments = parse(["train", *words])
    assert arguments.recipe == "lm-dense"
    assert arguments.out == "o"
    assert apply(load("lm-dense"), arguments.overrides).train.steps == 3


def danlu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "danlu", *words], capture_output=True, text=True)


@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_help_has_examples_and_exits_with_zero(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*([command] if command else []), "--help"]) == 0
    text = capsys.readouterr().out
    if command:
        assert "examples:" in text
        assert f"danlu {command}" in text
    else:
        assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--out", "o", "/zh.txt", "--data", "/crlf.txt"], "no recipe is called '/zh.txt'"),
        (["train", "lm", "lm-dense"], "takes one recipe, got 'lm' and 'lm-dense'"),
        (["train", "--train.steps", "3", "x"], "'x' belongs to no option"),
        (["train", "--train.seed", "99999999999999999999999"], "seed must be"),
        (["train", "--train.threads", "3000"], "threads must be"),
        (["train", "-x"], "no option -x"),
        (["train", "--data", "lm-dense"], "put the recipe 'lm-dense' before --data"),
        (["train", "--config", "no.json"], "no.json"),
        (["sample"], "RUN"),
        (["sample", "x", "--topk", "3"], "did you mean --top-k?"),
        (["sample", "x", "--tokens", "q"], "--tokens"),
        (["recipes", "x"], "'x'"),
        (["show", "lmm"], "lm"),
        (["train", "lmm"], "lm"),
        (["train", "--train.stepps", "3"], "--train.steps"),
        (["train", "--train.steps", "three"], "three"),
        (["train", "--data"], "--data"),
        (["train", "--data", "no/such/file.txt"], "no/such/file.txt"),
        (["resume", "no/such/run"], "no/such/run"),
        (["sample", "no/such/run"], "no/such/run"),
        (["eval", "no/such/run"], "no/such/run"),
        (["report", "no/such/run"], "no/such/run"),
        (["verify", "no_such_claim"], "no_such_claim"),
        (["verify", "--bogus"], "--bogus"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_two(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("danlu")
    assert err.count("\n") == 1, err
    assert part in err
    assert list(tmp_path.iterdir()) == [], "a rejected command leaves nothing behind"


def test_a_traceback_is_shown_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_DEBUG", "1")
    with pytest.raises(ValueError, match="did you mean"):
        main(["trian"])


def test_the_command_exits_with_its_code_and_prints_errors_on_stderr() -> None:
    done = danlu("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert danlu("--version").stdout.startswith("danlu ")


SMALL = [
    "--train.steps=4",
    "--train.eval_every=2",
    "--train.checkpoint_every=2",
    "--train.precision=float32",
    "--train.threads=1",
    "--data.vocab_size=300",
    "--data.length=32",
    "--data.batch=2",
    "--model.dim=32",
    "--model.layers=2",
    "--model.hidden=48",
    "--model.attention.num_heads=2",
    "--model.attention.kv_rank=16",
    "--model.attention.nope_dim=8",
    "--model.attention.rope_dim=8",
    "--model.attention.value_dim=8",
    "--model.experts.num_experts=4",
    "--model.experts.top_k=2",
    "--model.experts.hidden=16",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that `danlu train` made of a small text."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text("".join(f"line {i} of the text, and {i * i % 97} more\n" for i in range(400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANLU_CACHE", str(place / "cache"))
        assert main(["train", "--data", str(place / "text.txt"), "--out", str(place / "run"), *SMALL]) == 0
    return place / "run"


def test_a_run_folder_holds_what_the_other_commands_need(trained: Path) -> None:
    expected = ["config.json", "manifest.json", "metrics.jsonl", "tokenizer.json", "samples.txt", "report.html"]
    assert [name for name in expected if not (trained / name).is_file()] == []
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all({"loss", "items", "time"} <= record.keys() for record in records)
    assert [("val_loss" in record, "val_bpb" in record) for record in records] == [(False,) * 2, (True,) * 2] * 2


def test_a_run_that_writes_no_text_is_reported_all_the_same(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = ["--objective", "masked-lm", "--model.attention.mask", "bidirectional"]
    text = ["--data", str(trained.parent / "text.txt"), "--out", str(tmp_path / "run")]
    assert main(["train", *text, *SMALL, *encoder]) == 0
    assert "No samples: a layer with mask 'bidirectional'" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "samples.txt").exists()


def test_samples_of_one_seed_are_the_same_text_and_begin_with_the_prompt(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["sample", str(trained), "--prompt", "line 7", "--tokens", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("line 7")
    assert texts[0] == texts[1] != texts[2]


def test_a_temperature_of_zero_needs_no_seed_and_count_writes_several(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(trained), "--temperature", "0", "--tokens", "5", "--count", "2"]) == 0
    first, second = capsys.readouterr().out.split("--- 2 of 2\n")
    assert first == f"--- 1 of 2\n{second}"


def test_each_line_of_a_file_is_continued_and_ends_before_a_stop(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("line 7\n\nthe\n")
    options = ["--temperature", "0", "--tokens", "30", "--repetition-penalty", "1.1"]
    alone = []
    for prompt in ("line 7", "the"):
        assert main(["sample", str(trained), "--prompt", prompt, "--stop", "\\n", *options]) == 0
        alone.append(capsys.readouterr().out)
        assert alone[-1].count("\n") == 1
    file = str(tmp_path / "prompts.txt")
    assert main(["sample", str(trained), "--prompts", file, "--stop", "\\n", *options]) == 0
    assert capsys.readouterr().out == f"--- 1 of 2\n{alone[0]}--- 2 of 2\n{alone[1]}"
    assert main(["sample", str(trained), "--prompts", file, "--prompt", "x"]) == 2
    assert "not both" in capsys.readouterr().err


def test_a_terminal_is_not_given_the_escape_sequences_that_a_model_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2Jb\tc\r\n\x07é"
    assert common.printable(text) == text, "a pipe is given the text as it is"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert common.printable(text) == "a\ufffd[2Jb\tc\ufffd\n\ufffdé"


def test_eval_prints_the_measures_of_the_last_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained)]) == 0
    said = capsys.readouterr()
    assert said.err == "all of the validation data (training measured 16 batches of it)\n"
    printed = dict(line.split() for line in said.out.splitlines())
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(printed["val_loss"]) == pytest.approx(last["val_loss"], rel=1e-5)
    assert float(printed["val_bpb"]) == pytest.approx(last["val_bpb"], rel=1e-5)


def test_eval_says_how_much_it_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--batches", "2"]) == 0
    assert capsys.readouterr().err == "2 batches of the validation data (training measured 16 batches of it)\n"
    assert main(["eval", str(trained), "--batches", "16"]) == 0
    assert capsys.readouterr().err == "16 batches of the validation data\n"


def test_a_run_folder_is_never_overwritten(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert main(["train", "--data", str(trained.parent / "text.txt"), "--out", str(trained), *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "danlu resume" in error
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.parametrize(
    "option", ["--tokens=-1", "--count=0", "--temperature=-0.5", "--top-k=0", "--top-p=1.5", "--min-p=2"]
)
def test_impossible_sampling_options_are_rejected_by_their_name(
    trained: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(trained), option]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"danlu: {option.split('=')[0]} must be")


@pytest.mark.parametrize("name", ["lm", "lm-hybrid", "lm-baseline", "digits-edm"])
def test_the_options_that_show_prints_give_the_recipe_back(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name, "--format", "options"]) == 0
    words = [word for line in capsys.readouterr().out.splitlines() for word in shlex.split(line)]
    assert apply(load(name), words, fixed=["recipe"]) == load(name)
    assert main(["show", name, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == name


def test_show_lists_every_option_with_what_it_accepts_its_default_and_its_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["show", "lm"]) == 0
    shown = capsys.readouterr().out
    assert main(["train", "lm", "--help"]) == 0
    assert shown in capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.startswith("  --")}
    assert {f"--{path}" for path, _ in values(load("lm"))} - {"--recipe"} <= lines.keys()
    assert lines["--model.dim"] == ["--model.dim", "int", "256", "model", "size"]
    assert lines["--model.attention"][1:3] == ["mla|gqa|kv-shared|ssm|module:Class", "mla"]
    assert lines["--optim.betas"][1:3] == ["float,float", "0.9,0.95"]


def test_the_order_on_the_line_does_not_matter_and_another_class_starts_from_its_defaults() -> None:
    words = [["--model.attention", "grouped"], ["--model.attention.heads", "8"], ["--lr", "3"]]
    expected = Run(recipe="tiny", model=Model(dim=99, attention=Grouped(heads=8)), lr=3.0)
    for order in itertools.permutations(words):
        assert apply(RECIPE, [word for pair in order for word in pair]) == expected
    assert apply(RECIPE, ["--model.attention", "latent"]) == RECIPE, "the class that it is keeps its values"
    assert apply(RECIPE, ["--model.attention", "grouped"]).model.attention == Grouped()


def test_a_section_can_be_taken_out_and_put_in() -> None:
    taken_in = apply(RECIPE, ["--model.experts.kv_rank", "9", "--model.experts", "latent"])
    assert taken_in.model.experts == Latent(kv_rank=9)
    for none in ("none", "None", "null"):
        assert apply(taken_in, ["--model.experts", none]).model.experts is None


@pytest.mark.parametrize("word", ["true", "True", "TRUE"])
def test_truth_and_comma_lists_have_several_spellings(word: str) -> None:
    changed = apply(RECIPE, ["--model.tied", word, "--data.betas", "0.8,0.9", "--data.path", "None"])
    assert (changed.model.tied, changed.data.betas, changed.data.path) == (True, (0.8, 0.9), None)


def test_paths_become_absolute_wherever_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data.path", "notes", "--data.tokenizer", "mine/tokenizer.json"]
    data = apply(load("lm"), words).data
    assert data.path == (str(tmp_path / "notes"),)
    assert data.tokenizer == str(tmp_path / "mine" / "tokenizer.json")
    own = replace(load("lm"), data=TextConfig(path=("a,b.txt",)))
    assert apply(own, []).data.path == (str(tmp_path / "a,b.txt"),)


def test_short_names_lead_to_the_option_that_every_training_has() -> None:
    changed = apply(load("lm-baseline"), ["--steps", "7", "--lr", "0.5", "--batch-size", "3", "--seed", "9"])
    assert (changed.train.steps, changed.optim.lr, changed.data.batch, changed.train.seed) == (7, 0.5, 3, 9)


def test_an_old_name_of_an_option_is_taken_with_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    draft = Draft.of(load("lm"))
    said = change(draft, ["--model.attention.heads", "2", "--model.experts.active", "1"])
    assert said == ["model.attention.heads is now num_heads", "model.experts.active is now top_k"]
    assert draft.build().model.attention.num_heads == 2


@pytest.mark.parametrize(
    ("words", "steps", "minutes"),
    [
        ([], 600, 8),
        (["--steps", "2000"], 2000, None),
        (["--minutes", "60"], None, 60),
        (["--steps", "2000", "--minutes", "60"], 2000, 60),
    ],
)
def test_a_length_in_steps_replaces_the_recipe_s_minutes_and_the_other_way_round(
    words: list[str], steps: int | None, minutes: float | None
) -> None:
    from danlu.cli.overrides import apply
    from danlu.recipes import load

    changed = apply(load("lm"), words)
    assert (changed.train.steps, changed.train.minutes) == (steps, minutes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "dit"], "model must be a language model"),
        (
            ["--objective", "flow-matching"],
            "needs 'images' in a batch, and TextData gives tokens, targets",
        ),
    ],
)
def test_components_that_do_not_fit_are_one_line_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 40)
    assert main(["train", "lm-dense", "--data", "text.txt", "--out", "run", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
