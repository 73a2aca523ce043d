"""Claims themselves: what is accepted and rejected, and that a control which passes is called broken."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

import danlu.claims as package
from danlu.claims import Claim, Tolerance, absolute, at_least, at_most, exact, judge, main, relative, select


def claim_of(value: float, control: float, **changes: object) -> Claim:
    claim = Claim(
        name="half",
        statement="one half is one half",
        source="arithmetic",
        expected=0.5,
        tolerance=absolute(0.01),
        measure=lambda: value,
        control=lambda: control,
    )
    return dataclasses.replace(claim, **changes)


@pytest.fixture
def toy(monkeypatch):
    """Register one toy method whose claims the test gives."""

    def install(*claims: Claim) -> None:
        module = type(sys)("danlu.claims.nn.toy")
        module.CLAIMS = claims
        monkeypatch.setitem(sys.modules, "danlu.claims.nn.toy", module)
        monkeypatch.setattr(package, "methods", lambda: ["nn/toy"])

    return install


@pytest.mark.parametrize(
    ("tolerance", "expected", "inside", "outside"),
    [
        (absolute(0.25), 2.0, (1.75, 2.0, 2.25), (1.7499, 2.2501)),
        (relative(0.1), -20.0, (-22.0, -18.0), (-22.01, -17.99, 20.0)),
        (exact(), 34560.0, (34560,), (34560.0001,)),
        (at_most(), 1e-12, (0.0, 1e-12, -5.0), (1.1e-12,)),
        (at_most(0.5), 1.0, (1.5,), (1.51,)),
        (at_least(), 2.0, (2.0, 7.0), (1.999,)),
        (at_least(0.5), 2.0, (1.5,), (1.49,)),
    ],
)
def test_a_tolerance_accepts_up_to_its_edge_and_nothing_beyond(tolerance, expected, inside, outside):
    assert all(tolerance.accepts(expected, value) for value in inside)
    assert not any(tolerance.accepts(expected, value) for value in outside)
    assert not any(tolerance.accepts(expected, value) for value in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("amount", [-1e-9, math.nan, math.inf])
def test_a_tolerance_without_a_size_is_rejected(amount):
    with pytest.raises(ValueError, match="amount"):
        Tolerance("absolute", amount)


@pytest.mark.parametrize(
    ("value", "control", "verdict"),
    [
        (0.505, 0.7, "holds"),
        (0.6, 0.7, "fails"),
        (0.5, 0.495, "broken control"),
        (0.6, 0.495, "broken control"),
        (0.5, math.nan, "holds"),
        (math.nan, 0.7, "fails"),
    ],
)
def test_a_verdict_needs_the_value_accepted_and_the_control_rejected(value, control, verdict):
    assert judge("toy/half", claim_of(value, control)).verdict == verdict


def test_a_measurement_that_raises_is_an_error_that_says_what_happened():
    result = judge("toy/half", dataclasses.replace(claim_of(0.5, 0.7), control=lambda: 1 / 0))
    assert (result.verdict, result.error) == ("error", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("claims", "code", "words"),
    [
        ((claim_of(0.5, 0.7),), 0, "1 of 1 claims hold"),
        ((claim_of(0.5, 0.7), claim_of(0.6, 0.7, name="other")), 1, "1 of 2 claims hold"),
        ((claim_of(0.5, 0.5),), 1, "passes too"),
        ((claim_of(0.5, 0.7), claim_of(0.6, 0.7, name="long", seconds=60.0)), 0, "1 slow ones left out"),
    ],
)
def test_verify_prints_the_table_and_returns_whether_all_hold(toy, capsys, claims, code, words):
    toy(*claims)
    assert main([]) == code
    assert words in capsys.readouterr().out


def test_slow_claims_are_measured_when_asked_for(toy):
    toy(claim_of(0.5, 0.7), claim_of(0.6, 0.7, name="long", seconds=60.0))
    assert main(["--slow"]) == 1
    assert main(["toy/long"]) == 1
    assert main(["nn/toy/long"]) == 1
    assert main(["toy/half"]) == 0
    assert main(["toy"]) == 0
    assert main(["nn"]) == 0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("toi", "toy"), ("nn/toi", "nn/toy"), ("toy/halve", "nn/toy/half"), ("nn/toy/halve", "nn/toy/half")],
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(toy, capsys, name, nearest):
    toy(claim_of(0.5, 0.7))
    assert main([name]) == 2
    assert f"did you mean {nearest!r}" in capsys.readouterr().err


def test_a_method_s_name_in_two_packages_is_an_error_that_gives_both(monkeypatch, capsys):
    monkeypatch.setattr(package, "methods", lambda: ["nn/toy", "optim/toy"])
    assert main(["toy"]) == 2
    assert "several methods: nn/toy, optim/toy" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--no-such-option"], 2)])
def test_help_and_unknown_options_return_their_codes(capsys, arguments, code):
    assert main(arguments) == code
    assert "danlu verify" in "".join(capsys.readouterr())


def test_the_json_file_holds_every_figure(toy, tmp_path):
    toy(claim_of(0.5, math.inf))
    path = tmp_path / "claims.json"
    assert main(["--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())
    assert (row["claim"], row["expected"], row["here"]) == ("nn/toy/half", 0.5, 0.5)
    assert (row["control"], row["verdict"], row["tolerance"]) == ("inf", "holds", "± 0.01")


def test_a_json_file_in_no_folder_is_rejected_before_anything_is_measured(toy, tmp_path, capsys):
    def fail() -> float:
        raise AssertionError("measured")

    toy(claim_of(0.5, 0.7, measure=fail))
    assert main(["--json", str(tmp_path / "none" / "claims.json")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_listing_measures_nothing(toy, capsys):
    toy(claim_of(0.5, 0.7, measure=lambda: 1 / 0))
    assert main(["--list"]) == 0
    assert "nn/toy/half" in capsys.readouterr().out


def test_a_method_s_claims_come_under_its_name(toy):
    toy(claim_of(0.5, 0.7), claim_of(0.6, 0.7, name="other"))
    assert [name for name, _ in select()] == ["nn/toy/half", "nn/toy/other"]
    assert [name for name, _ in select(["toy"])] == ["nn/toy/half", "nn/toy/other"]
    assert [name for name, _ in select(["toy/other"])] == ["nn/toy/other"]
    assert [name for name, _ in select(["nn/toy/other"])] == ["nn/toy/other"]


def test_the_methods_are_read_without_importing_torch():
    code = "import sys, danlu.claims as c; c.methods(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
