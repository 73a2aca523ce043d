"""Every model in every stack: right, or one clear error."""

import re

import pytest
from stacks.table import MODELS, RAISES, STACKS, Stack

ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.name)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_right_or_raises_one_clear_error(model: str, stack: Stack) -> None:
    if (words := RAISES.get((model, stack.name))) is None:
        stack.check(model)
        return
    with pytest.raises(ERRORS, match=re.escape(words)):
        stack.check(model)


def test_names_are_their_own_and_errors_belong_to_cells() -> None:
    names = {stack.name for stack in STACKS}
    assert len(names) == len(STACKS)
    assert all(model in MODELS and stack in names for model, stack in RAISES)
