"""What the tests of distributions share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def arguments_are_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch's default for these tests: torch.compile switches the validation off in its process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
