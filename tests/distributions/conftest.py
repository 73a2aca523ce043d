"""What the tests of distributions share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def arguments_are_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch's default for these tests: some libraries switch the validation off for the whole process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
