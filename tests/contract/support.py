"""What works with what: the table of the contract as data, from which a support matrix can be written.

>>> from contract.support import support
>>> support()["swiglu"]["second derivatives"]  # works
''
>>> sorted({type(words) for row in support().values() for words in row.values()}, key=str)
[<class 'str'>]

Rows are the functions and layers (`CASES`), columns the conditions (`contract.conditions.CONDITIONS`). Every cell is
what `test_contract.py` tests, so that a matrix written from it cannot be out of date.
"""

from contract.conditions import CONDITIONS
from contract.layers import CASES as LAYERS
from contract.matrices import CASES as MATRICES
from contract.table import CASES as FUNCTIONS
from contract.table import Case

CASES: list[Case] = [*FUNCTIONS, *MATRICES, *LAYERS]


def support() -> dict[str, dict[str, str]]:
    """Return for each function and each condition an empty string where it works, else words of its error.

    The order is that of the tables.
    """
    return {
        case.name: {condition.name: case.raises.get(condition.name, "") for condition in CONDITIONS} for case in CASES
    }
