"""Configurations of earlier releases: renamed fields, absent keys, formats."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest

from danlu import config
from danlu.config import Draft, migrations


@dataclass(frozen=True, kw_only=True)
class Attention:
    num_heads: int = 8
    num_kv_heads: int | None = None
    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads", "groups": "num_kv_heads"}


@dataclass(frozen=True, kw_only=True)
class Root:
    name: str
    attention: Attention = Attention()
    added_later: float = 0.5


def test_old_names_are_read_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read = config.from_tree(Root, {"name": "x", "attention": {"heads": 4, "groups": 2}})
    assert read.attention == Attention(num_heads=4, num_kv_heads=2)
    (record,) = caplog.records
    assert "attention.heads is now num_heads; attention.groups is now num_kv_heads" in record.getMessage()


def test_both_names_at_once_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"attention\.heads is the old name of num_heads, and both are given"):
        config.from_tree(Root, {"name": "x", "attention": {"heads": 4, "num_heads": 4}})


def test_new_files_have_the_new_names_only() -> None:
    assert config.to_tree(Root(name="x"))["attention"] == {"num_heads": 8, "num_kv_heads": None}


def test_an_absent_key_is_today_s_default_also_in_a_comparison(caplog: pytest.LogCaptureFixture) -> None:
    saved = {"name": "x", "attention": {"heads": 8, "groups": None}}
    with caplog.at_level(logging.WARNING):
        assert config.differences(Root(name="x"), saved) == []
        assert config.differences(Root(name="x", added_later=0.7), saved) == ["added_later: 0.7 and 0.5"]
    assert caplog.records == [], "the run's own file has already been read with the warning"


def test_a_key_that_no_longer_exists_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'attention\.window'"):
        config.differences(Root(name="x"), {"name": "x", "attention": {"window": 4}})


def test_files_carry_their_format_and_files_without_are_the_first() -> None:
    document = config.to_document(Root(name="x"))
    assert document["format"] == config.FORMAT
    assert config.from_document(Root, document) == config.from_document(Root, config.to_tree(Root(name="x")))


@pytest.mark.parametrize(
    ("number", "message"),
    [(99, "run.json has format 99.* use a newer"), (0, "format must be"), ("2", "format must be")],
)
def test_a_format_that_is_not_known_is_rejected(number: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.from_document(Root, {"format": number, "name": "x"}, name="run.json")


def test_migrations_lead_from_every_format_to_today_s() -> None:
    assert sorted(migrations._STEPS) == list(range(1, config.FORMAT))


def test_a_class_that_moved_is_found_through_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from danlu.config.hints import loaded_class
    from danlu.optim.schedules import Cosine

    monkeypatch.setitem(migrations.MOVED, "danlu.long_ago:Annealing", "danlu.optim.schedules:Cosine")
    assert loaded_class("danlu.long_ago:Annealing", "schedule") is Cosine


def test_a_part_of_a_configuration_changes_what_it_names_under_old_names_too() -> None:
    draft = Draft.of(Root(name="x", attention=Attention(num_heads=2, num_kv_heads=1)))
    draft.overlay({"attention": {"heads": 6}}, config.tree.Reader())
    assert draft.build() == Root(name="x", attention=Attention(num_heads=6, num_kv_heads=1))
    with pytest.raises(ValueError, match=r"unknown key 'attention\.haeds'; did you mean"):
        draft.overlay({"attention": {"haeds": 6}}, config.tree.Reader())


@pytest.mark.parametrize("held", [{}, {"no_decay": []}, {"no_decay": ["gain"]}])
def test_muon_in_a_file_of_the_first_format_decays_what_it_did(held: dict[str, object]) -> None:
    optim = {"type": "danlu.optim.build:MuonConfig", "lr": 0.1, **held}
    old = migrations.migrate({"optim": optim}, "config.json")
    assert old["optim"] == {**optim, "no_decay": held.get("no_decay", [])}
    new = {"format": config.FORMAT, "optim": optim}
    assert migrations.migrate(new, "config.json")["optim"] == optim


@pytest.mark.parametrize(("eps", "latent"), [(1e-6, {}), (1e-5, {"norm_eps": 1e-6})])
def test_latent_attention_in_a_file_of_the_first_format_keeps_the_eps_of_its_own_norms(
    eps: float, latent: dict[str, float]
) -> None:
    mla, gqa = {"type": "danlu.nn.attention.mla:MLAConfig", "kv_rank": 8}, {"type": "GQAConfig"}
    old = {"model": {"attention": mla, "mixers": [None, gqa, mla], "norm_eps": eps}}
    expected = {"attention": {**latent, **mla}, "mixers": [None, gqa, {**latent, **mla}], "norm_eps": eps}
    assert migrations.migrate(old, "config.json")["model"] == expected
    new = {"format": config.FORMAT, **old}
    assert migrations.migrate(new, "config.json") == old
