import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu import config


@dataclass(frozen=True, kw_only=True)
class Norm:
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Fast:
    lr: float = 0.1
    kind: Literal["a", "b", 3] = "a"


@dataclass(frozen=True, kw_only=True)
class Slow:
    lr: float = 0.01
    steps: int | None = None
    names: tuple[str, ...] | None = None
    pair: tuple[int, float] = (1, 2.0)
    table: tuple[tuple[float, ...], ...] = ((1.0,), (2.0, 3.0))

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Root:
    name: str
    norm: Norm = Norm()
    optim: Fast | Slow = Fast()
    maybe: Norm | None = None
    anything: Any = None
    flag: bool = False
    table: dict[str, int] = dataclasses.field(default_factory=dict)


def test_a_tree_survives_json() -> None:
    root = Root(name="x", optim=Slow(lr=3.0, names=("p", "q")), maybe=Norm(eps=1.0), anything=Fast(kind=3))
    text = config.dumps(root)
    assert config.loads(Root, text) == root
    assert json.loads(text)["optim"]["type"] == "Slow"
    assert "type" not in json.loads(text)["norm"]


@given(
    st.builds(
        Root,
        name=st.text(),
        norm=st.builds(Norm, eps=st.floats(allow_nan=False, allow_infinity=False)),
        optim=st.builds(
            Slow,
            lr=st.floats(min_value=1e-300, max_value=1e300),
            steps=st.none() | st.integers(),
            names=st.none() | st.tuples(st.text(), st.text()),
        )
        | st.builds(Fast, lr=st.floats(allow_nan=False, allow_infinity=False), kind=st.sampled_from(["a", "b", 3])),
        maybe=st.none() | st.just(Norm()),
        flag=st.booleans(),
        table=st.dictionaries(st.text(), st.integers(), max_size=3),
    )
)
def test_any_tree_survives_json_and_keeps_its_fingerprint(root: Root) -> None:
    back = config.loads(Root, config.dumps(root))
    assert back == root
    assert config.fingerprint(back) == config.fingerprint(root)


def test_an_unknown_key_is_rejected_with_the_nearest_path() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'norm\.esp'; did you mean 'norm\.eps'\?"):
        config.from_tree(Root, {"name": "x", "norm": {"esp": 1.0}})


def test_an_unknown_type_is_rejected_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"optim\.type must be one of 'Fast', 'Slow', got 'Fats'; did you mean 'Fast'"):
        config.from_tree(Root, {"name": "x", "optim": {"type": "Fats"}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": 3}, r"name must be str, got 3 \(int\)"),
        ({"name": "x", "flag": 1}, r"flag must be bool, got 1 \(int\)"),
        ({"name": "x", "norm": {"eps": "small"}}, r"norm\.eps must be float, got 'small'"),
        ({"name": "x", "norm": {"eps": True}}, r"norm\.eps must be float, got True"),
        ({"name": "x", "norm": 4}, r"norm must be Norm, got 4"),
        ({"name": "x", "optim": {"type": "Slow", "steps": 1.5}}, r"optim\.steps must be int or null, got 1\.5"),
        ({"name": "x", "optim": {"type": "Fast", "kind": "c"}}, r"optim\.kind must be one of 'a', 'b', 3, got 'c'"),
        ({"name": "x", "optim": {"type": "Slow", "names": [1]}}, r"optim\.names\[0\] must be str, got 1"),
        ({"name": "x", "table": {"k": "v"}}, r"table\.k must be int, got 'v'"),
        ([1], r"the configuration must be an object with keys, got \[1\]"),
    ],
)
def test_a_value_of_the_wrong_type_is_rejected_by_path(tree: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        config.from_tree(Root, tree)


def test_a_missing_key_without_default_is_named() -> None:
    with pytest.raises(ValueError, match="name is missing and has no default"):
        config.from_tree(Root, {})


def test_a_component_s_own_error_carries_its_path() -> None:
    with pytest.raises(ValueError, match=r"optim: lr must be positive, got -1"):
        config.from_tree(Root, {"name": "x", "optim": {"type": "Slow", "lr": -1}})


def test_a_pair_of_another_length_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"optim\.pair must have 2 values, got 3"):
        config.from_tree(Root, {"name": "x", "optim": {"type": "Slow", "pair": [1, 2, 3]}})


def test_reading_never_imports_a_foreign_module() -> None:
    with pytest.raises(ValueError, match="import 'antigravity' yourself"):
        config.from_tree(Root, {"name": "x", "anything": {"type": "antigravity:fly"}})
    with pytest.raises(ValueError, match=r"no module 'danlu\.nowhere'"):
        config.from_tree(Root, {"name": "x", "anything": {"type": "danlu.nowhere:X"}})
    with pytest.raises(ValueError, match="which is no dataclass of json"):
        config.from_tree(Root, {"name": "x", "anything": {"type": "json:JSONDecoder"}})


def test_broken_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        config.loads(Root, "{")


def test_infinity_is_rejected_when_writing() -> None:
    with pytest.raises(ValueError, match="eps must be finite"):
        config.dumps(Norm(eps=float("inf")))


def test_a_value_that_json_cannot_hold_is_rejected() -> None:
    with pytest.raises(TypeError, match="anything must be a plain value"):
        config.to_tree(Root(name="x", anything={1, 2}))
    with pytest.raises(TypeError, match="config must be an instance of a dataclass"):
        config.to_tree({"a": 1})


def test_differences_name_the_keys_of_both_sides() -> None:
    a, b = Root(name="x"), Root(name="x", optim=Slow(), flag=True)
    lines = config.differences(a, b)
    assert "flag: false and true" in lines
    assert 'optim.type: "Fast" and "Slow"' in lines
    assert 'optim.kind: "a" and (absent)' in lines
    assert config.differences(a, a) == []


def test_fingerprints_tell_two_configurations_apart() -> None:
    assert config.fingerprint(Root(name="x")) != config.fingerprint(Root(name="y"))
