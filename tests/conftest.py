"""One thread a test process (two OpenMP pools on one core wait on each other), one Hypothesis profile, one seed.

What a test draws must not depend on which tests its process ran before. ``DANLU_TEST_SEED=7 pytest`` draws other
numbers: a tolerance that holds for one seed only is wrong.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "danlu", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("many", settings.get_profile("danlu"), max_examples=50, derandomize=False)
settings.load_profile("danlu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(int(os.environ.get("DANLU_TEST_SEED", "0")))
