"""Places that take any component: how their classes are written, read, and found by name."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Protocol

import pytest

from danlu import config
from danlu.config import Known, place


class Schedule(Protocol):
    def factor(self, step: int, total: int) -> float: ...


class Mixer(Protocol):
    def build(self, dim: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Grouped:
    heads: int = 4

    def build(self, dim: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Mine:
    width: int = 3

    def build(self, dim: int) -> Any: ...

    def factor(self, step: int, total: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class NoMixer:
    width: int = 3


@dataclass(frozen=True, kw_only=True)
class Root:
    mixer: Grouped | Mixer | None = Grouped()
    schedule: Annotated[Schedule, Known("danlu.optim")] = Mine()


THIS = Mine.__module__


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    # Test modules are not in sys.modules under their own name; the user's code is.
    module = ModuleType(THIS)
    module.__dict__.update(Mine=Mine, NoMixer=NoMixer)
    monkeypatch.setitem(sys.modules, THIS, module)


def test_a_member_of_the_union_is_written_by_its_name_and_another_class_with_its_module() -> None:
    tree = config.to_tree(Root(mixer=Mine(width=5)))
    assert tree["mixer"] == {"type": f"{THIS}:Mine", "width": 5}
    assert config.to_tree(Root())["mixer"] == {"type": "Grouped", "heads": 4}
    for root in (Root(), Root(mixer=Mine()), Root(mixer=None)):
        assert config.loads(Root, config.dumps(root)) == root


def test_a_component_of_the_named_package_is_written_by_its_name_alone() -> None:
    from danlu.optim import Cosine

    root = Root(schedule=Cosine())
    assert config.to_tree(root)["schedule"]["type"] == "Cosine"
    assert config.loads(Root, config.dumps(root)) == root


def test_an_old_file_s_module_is_ignored_where_the_name_is_known() -> None:
    tree = {"schedule": {"type": "danlu.optim.a_file_of_long_ago:Cosine"}}
    assert type(config.from_tree(Root, tree).schedule).__name__ == "Cosine"


def test_only_classes_with_the_protocol_s_methods_are_known() -> None:
    known = place(Root.__dataclass_fields__["schedule"].type).known()
    assert {"Cosine", "WarmupStableDecay", "Constant"} <= known.keys()
    assert not [name for name in known if name.endswith("Config")]


def test_a_class_without_the_methods_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"mixer\.type names .*NoMixer', which has no method build"):
        config.from_tree(Root, {"mixer": {"type": f"{THIS}:NoMixer"}})


def test_a_module_that_only_the_file_names_is_never_imported() -> None:
    with pytest.raises(ValueError, match="import 'antigravity' yourself"):
        config.from_tree(Root, {"mixer": {"type": "antigravity:fly"}})
    assert "antigravity" not in sys.modules


def test_an_unknown_name_is_answered_with_the_nearest_and_with_what_else_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"schedule\.type must be one of .*'Cosine'.*'module:Class', got 'Cosin'; did"):
        config.from_tree(Root, {"schedule": {"type": "Cosin"}})


def test_an_object_written_before_the_place_had_several_classes_is_still_read() -> None:
    assert config.from_tree(Root, {"mixer": {"heads": 9}}).mixer == Grouped(heads=9)


@pytest.mark.parametrize(("word", "name"), [("cosine", "Cosine"), ("warmup-stable-decay", "WarmupStableDecay")])
def test_short_names_find_their_class(word: str, name: str) -> None:
    found = place(Root.__dataclass_fields__["schedule"].type).find(word)
    assert found is not None
    assert found.__name__ == name


def test_a_class_that_no_import_finds_is_not_written() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Inner(Mine):
        pass

    with pytest.raises(ValueError, match=r"class Inner is defined inside test_a_class.* top level of a file"):
        config.to_document(Root(mixer=Inner()))
    Script = type("Script", (Mine,), {"__module__": "__main__"})
    with pytest.raises(ValueError, match=r"class Script is defined in the script that is run \(__main__\)"):
        config.dumps(Root(schedule=Script()))
