"""Every function and layer of the table under every condition, against its plain formula in float64.

A cell works, or raises the error that its case names (`table.Case.raises`); none is skipped.
"""

import copy
import re

import pytest
from contract.conditions import CONDITIONS, Condition
from contract.support import CASES, support
from contract.table import Case

ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError)  # the last by an export's guards


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_right_or_raises_one_clear_error(case: Case, condition: Condition) -> None:
    if (words := case.raises.get(condition.name)) is None:
        condition.check(case)
        return
    with pytest.raises(ERRORS, match=re.escape(words)):
        condition.check(case)


def test_cases_have_names_of_their_own_and_name_conditions_that_there_are() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert copy.copy(CASES[0]) == CASES[0]
    names = {condition.name for condition in CONDITIONS}
    assert len(names) == len(CONDITIONS)
    for case in CASES:
        assert set(case.raises) <= names
    assert all(set(row) == names for row in support().values())
