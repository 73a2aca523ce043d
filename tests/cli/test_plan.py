import json
import resource

import pytest

from danlu.cli import main


def test_a_plan_lists_the_ways_to_divide_a_run_and_allocates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = "plan lm-dense --processes 4 --device h100 --json --optim adamw --optim.lr 1e-3 --train.precision bfloat16"
    sizes = "--model.dim 8192 --model.layers 2 --model.hidden 28672 --data.vocab_size 128256 --data.length 4096"
    assert main([*words.split(), *sizes.split(), "--data.batch", "8"]) == 0
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] > 3e9  # 14 GB of weights
    assert taken < 1 << 19  # KiB
    assert found["items_per_step"] == 8 * 4096
    assert {(way["replicas"], way["shards"]) for way in found["ways"]} == {(1, 4), (2, 2), (4, 1)}
    assert {way["recompute"] for way in found["ways"]} == {"none", "blocks"}
    best = found["ways"][0]
    assert best["fits"]
    assert best["memory"] < 80e9
    assert 0.1 < best["mfu"] < 0.65


def test_a_plan_says_in_words_that_nothing_fits(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    file = f"{tmp_path}/small.json"
    with open(file, "w") as to:
        json.dump({"name": "small", "flops": 1e12, "memory": 1e6, "bandwidth": 1e11, "link": 1e9, "network": 1e9}, to)
    assert main(["plan", "digits-flow", "--processes", "2", "--device", file]) == 0
    said = capsys.readouterr().out
    assert "None of them fits" in said
    assert "2 x small" in said
    assert "Estimated by a cost model" in said


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("--processes 0", "processes"),
        ("--processes 5", "data.batch"),
        ("--processes 2 --train.parallel.replicas 3", "train.parallel.replicas"),
        ("--device h10", "h100"),
        ("--device", "--device"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(words: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "lm-dense", "--device", "h100", *words.split()]) == 2
    said = capsys.readouterr().err
    assert wrong in said
    assert said.count("\n") == 1
