"""Sources mixed by weight: exact proportions, and a source and a place in it for every position."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.config import dumps, loads
from danlu.data import TextConfig, open_text, tokenize
from danlu.data.loader import Loader
from danlu.data.mixture import PERIOD, MixedLoader, Mixture
from danlu.recipes import load
from danlu.train import RunConfig

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=7)
FEW = settings(max_examples=8)


@FEW
@given(weights=WEIGHTS, seed=st.integers(0, 99))
def test_every_beginning_has_every_source_to_within_one_example_and_every_window_to_within_two(weights, seed):
    mixture = Mixture(weights, seed=seed)
    assert sum(mixture.counts) == PERIOD
    shares = np.array(mixture.counts) / PERIOD
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 1 / PERIOD
    drawn = mixture.sources(range(3 * PERIOD))[:, None] == np.arange(len(weights))
    behind = drawn.cumsum(axis=0) - np.arange(1, 3 * PERIOD + 1)[:, None] * shares
    # The stream begins inside a period, so that its beginning is itself a window.
    assert (behind.max(axis=0) - np.minimum(behind.min(axis=0), 0) < 2).all()
    first = PERIOD - mixture._offset
    aligned = drawn[first:].cumsum(axis=0) - np.arange(1, 3 * PERIOD - first + 1)[:, None] * shares
    assert np.abs(aligned).max() < 1


@FEW
@given(weights=WEIGHTS, seed=st.integers(0, 9), position=st.integers(0, 5 * PERIOD))
def test_what_came_before_a_position_is_what_was_counted(weights, seed, position):
    mixture = Mixture(weights, seed=seed)
    counted = np.bincount(mixture.sources(range(position)), minlength=len(weights))
    assert (mixture.before(position) == counted).all()
    far = 10**15 + position
    step = mixture.before(far + 1) - mixture.before(far)
    assert step.tolist() == [int(n == mixture.sources(range(far, far + 1))[0]) for n in range(len(weights))]


def test_two_sources_alternate_as_evenly_as_they_can():
    order = Mixture([0.5, 0.5]).sources(range(100))
    assert (order[1:] != order[:-1]).mean() > 0.9
    gaps = np.diff(np.flatnonzero(Mixture([0.9, 0.1]).sources(range(5000)) == 1))
    assert gaps.min() >= 8
    assert gaps.max() <= 12


def sources(**options):
    arrays = [np.arange(1000 * n + 1, 1000 * n + 1 + size, dtype=np.uint16) for n, size in enumerate((97, 401, 233))]
    loaders = [Loader(array, end=0, length=7, batch=1, seed=n) for n, array in enumerate(arrays)]
    return MixedLoader(loaders, [5, 3, 2], seed=11, **options)


def test_each_source_is_gone_through_in_its_own_order_whoever_takes_the_batches():
    loader = sources(batch=12)
    rows = torch.cat([next(loader)["tokens"] for _ in range(50)]).numpy()
    came = rows[:, 0] // 1000
    for n, source in enumerate(loader.loaders):
        mine = rows[came == n]
        assert (mine == source.rows(0, len(mine))[:, :-1]).all()
    for world in (2, 3, 4):
        ranks = [sources(batch=12, rank=rank, world=world) for rank in range(world)]
        together = torch.cat([next(rank)["tokens"] for _ in range(50) for rank in ranks])
        assert (together.numpy() == rows).all()


def test_a_mixed_run_goes_on_exactly_and_refuses_other_sources():
    walked, jumped = sources(batch=6, sha256="a"), sources(batch=6, sha256="a", rank=1, world=2)
    for _ in range(23):
        next(walked)
    jumped.load_state_dict(walked.state_dict())
    assert torch.equal(next(walked)["tokens"][3:], next(jumped)["tokens"])
    with pytest.raises(ValueError, match="cannot resume: sha256"):
        sources(batch=6, sha256="b").load_state_dict(walked.state_dict())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("sources")
    for name, count in (("web", 400), ("code", 100)):
        lines = [json.dumps({"text": f"{name} {n} is the text number {n} of {name}."}) for n in range(count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    first = None
    for name in ("web", "code"):
        tokenize([str(place / f"{name}.jsonl")], place / name, vocab_size=300, tokenizer=first, validation=0.1)
        first = place / "web" / "tokenizer.json"
    tokenize([str(place / "code.jsonl")], place / "other", vocab_size=270, validation=0.1)
    return place


def config(folders, *names, **options):
    return TextConfig(path=tuple(str(folders / name) for name in names), length=11, batch=10, **options)


def test_folders_are_mixed_by_weight_or_by_size_and_validated_on_all_of_their_text(folders):
    data = open_text(config(folders, "web", "code", weights=(1, 4)))
    web = {tuple(row) for row in np.concatenate([data.train.loaders[0].rows(0, 400)])[:, :-1].tolist()}
    taken = torch.cat([next(data.train)["tokens"] for _ in range(20)]).tolist()
    assert abs(sum(tuple(row) in web for row in taken) - 40) <= 2
    assert [s["share"] for s in data.manifest["sources"]] == [0.2, 0.8]
    targets = torch.cat([b["targets"][b["targets"] >= 0] for b in data.validation()])
    assert int(data.byte_lengths[targets].sum()) == data.manifest["validation_bytes"]
    assert data.manifest["documents"] == 500
    by_size = open_text(config(folders, "web", "code")).manifest["sources"]
    assert by_size[0]["share"] == pytest.approx(
        by_size[0]["train_tokens"] / sum(s["train_tokens"] for s in by_size), abs=1e-4
    )
    assert by_size[0]["share"] > 0.7
    digests = {open_text(config(folders, *p)).manifest["sha256"] for p in (("web",), ("web", "code"), ("code", "web"))}
    assert len({data.manifest["sha256"], *digests}) == 4


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("web", "other"), {}, r"other has another vocabulary than .*--tokenizer"),
        (("web", "code.jsonl"), {}, r"code.jsonl is no folder of tokens and .*web is one"),
        (("web", "code"), {"weights": (1.0,)}, "one number for each of 2 folders, got 1"),
        (("web", "code"), {"weights": (1.0, 0.0)}, "weights"),
        (("web", "code"), {"weights": (1.0, 1e-5)}, "less than one example in 10,000"),
        (("web.jsonl",), {"weights": (1.0,)}, "weights mix folders of tokens, and path names none"),
    ],
)
def test_sources_that_do_not_fit_are_one_sentence(folders, names, options, message):
    with pytest.raises(ValueError, match=message):
        open_text(config(folders, *names, **options))


def test_weights_survive_the_file_of_a_configuration():
    from dataclasses import replace

    run = load("lm")
    run = replace(run, data=replace(run.data, path=("/a", "/b"), weights=(0.7, 0.3)))
    assert loads(RunConfig, dumps(run), name="config.json") == run
